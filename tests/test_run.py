"""The retrain command around its flow: the lock, checks, signals, and what is unchanged."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from flows.report import ModelReport, RunReport, write_report
from flows.run import find_unchanged, last_run, retrain, retrain_lock, save_last_run
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.io import read_json, write_json
from tasks.project import Project
from tasks.releases.signing import new_keys
from tasks.services.mlflow import CHAMPION
from tasks.services.s3 import S3Address
from tasks.stage import silent
from tests.fixtures import faults
from tests.fixtures.checkouts import BIN, Workshop, make_checkout, with_stages
from tests.fixtures.faults import Exchange, proxy_to
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.receiver import receiving


@pytest.fixture
def checkout(tmp_path: Path) -> Workshop:
    """A checkout without photos."""
    return make_checkout(tmp_path / "checkout")


def done(status: Any = "promoted") -> RunReport:
    return RunReport(status=status, model=ModelReport(name="hand-signs"))


def test_the_first_cause_is_reported_where_prefect_fails_at_the_end(
    checkout: Workshop, prefect_api: PrefectApi
) -> None:
    def gone(exchange: Exchange) -> None:
        (faults.resetting if checkout.project.run.exists() else faults.passed)(exchange)

    with (
        receiving("secret") as receiver,
        proxy_to(prefect_api.url.removesuffix("/api")) as prefect,
        prefect.failing(gone),
    ):
        services = {**prefect_api.named, "PREFECT_API_URL": f"{prefect.url}/api"}
        report = checkout.handsigns(
            "retrain",
            code=1,
            HANDSIGNS_NOTIFY_URLS=receiver.address,
            PREFECT_CLIENT_MAX_RETRIES="0",
            **services,
        )
    assert report["reason"].startswith("There are no photos yet.")
    assert checkout.report() == report
    titles = [message["title"] for message in receiver.messages]
    assert "handsigns: Prefect failed at the end of a retrain" in titles


def test_a_full_disk_does_not_hide_the_first_cause(checkout: Workshop) -> None:
    checkout.change("gate", min_acuracy=0.9)
    done = checkout.run_limited(100, "retrain")
    assert "min_acuracy" in done.stdout
    assert "artifacts/run.json cannot be written (File too large)" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_first_seconds_leaves_a_cancelled_run(
    checkout: Workshop, number: signal.Signals
) -> None:
    (checkout.project.data / "train/0").mkdir(parents=True)
    write_report(done("registered"), checkout.project)
    with subprocess.Popen(
        [BIN / "handsigns", "retrain", "--force"],
        cwd=checkout.project.root,
        env=checkout.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while checkout.project.run.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        stderr = ""
        for _ in range(10):  # Python itself may swallow one that comes during an import
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                _, stderr = process.communicate(timeout=15)
                break
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert checkout.report()["status"] == "cancelled"


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A checkout of one stage, in which nothing changed since its last release was promoted."""
    project = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(project.root)
    stages = yaml.safe_load((project.root / "dvc.yaml").read_text())["stages"]
    (project.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"audit": stages["audit"]}}))
    with Workspace(project, Settings()) as made:
        report = done()
        report.data.version = made.pipeline.version_data("photos")
        report.model.alias = CHAMPION
        made.pipeline.run("audit")
        (project.local / "mlflow.db").write_bytes(b"SQLite format 3\0")
        save_last_run(made, report)
        yield made


def remember(workspace: Workspace, **changes: Any) -> None:
    last = last_run(workspace.project)
    assert last is not None
    save_last_run(workspace, last.model_copy(update=changes))


def test_what_was_released_or_rejected_last_is_unchanged(released: Workspace) -> None:
    report = retrain(released, False, silent)
    assert report.status == read_json(released.project.run)["status"] == "unchanged"
    remember(released, status="rejected", reason="The gate rejected the model: loss 0.5 > 0.4.")
    report = retrain(released, False, silent)
    assert (report.status, report.reason) == (
        "unchanged",
        "Nothing changed; the last run was rejected: The gate rejected the model: loss 0.5 > 0.4.",
    )
    last = last_run(released.project)
    assert last is not None
    assert last.status == "rejected"


def test_a_second_retrain_is_refused_and_leaves_the_report_of_the_first(
    released: Workspace,
) -> None:
    write_report(done("registered"), released.project)
    with retrain_lock(released.project):
        refused = retrain(released, True, silent)
    assert refused.status == "failed"
    assert f"Another retrain of this checkout runs: process {os.getpid()}." in refused.reason
    assert read_json(released.project.run)["status"] == "registered"


def lose_storage(workspace: Workspace) -> None:
    store = workspace.project.local / "seaweedfs"
    shutil.rmtree(store)
    store.mkdir()


def garble_storage(workspace: Workspace) -> None:
    (workspace.project.local / "seaweedfs/handsigns.id").write_bytes(b"\xff\xfe")


def lose_registry(workspace: Workspace) -> None:
    (workspace.project.local / "mlflow.db").unlink()


def empty_registry(workspace: Workspace) -> None:
    (workspace.project.local / "mlflow.db").write_bytes(b"")


def record_other_photos(workspace: Workspace) -> None:
    file = workspace.project.data_file
    file.write_text(file.read_text().replace("md5: ", "md5: 0", 1))


def record_a_later_program(workspace: Workspace) -> None:
    record = workspace.project.local / "last_run.json"
    content = read_json(record)
    content["report"]["a_field_of_later"] = 1
    write_json(record, content)


def record_nonsense(workspace: Workspace) -> None:
    (workspace.project.local / "last_run.json").write_text("[]")


def use_other_keys(workspace: Workspace) -> None:
    _, public = new_keys(workspace.project.local)
    workspace.settings = workspace.settings.model_copy(update={"public_keys": (public,)})


DAMAGES = (
    lose_storage,
    garble_storage,
    lose_registry,
    empty_registry,
    record_other_photos,
    record_a_later_program,
    record_nonsense,
    use_other_keys,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_was_lost_or_exchanged_is_never_called_unchanged(
    released: Workspace, damage: Callable[[Workspace], None]
) -> None:
    damage(released)
    assert find_unchanged(released) is None


@pytest.mark.parametrize(
    ("file", "content", "advice"),
    [
        (".local/mlflow.db", b"garbage", "rebuild-registry"),
        ("data.dvc", b"outs: []\n", "data.dvc"),
        ("data.dvc", b"", "data.dvc"),
        ("dvc.yaml", b"", "dvc.yaml"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    released: Workspace, file: str, content: bytes, advice: str
) -> None:
    (released.project.root / file).write_bytes(content)
    report = retrain(released, False, silent)
    assert report.status == "failed"
    assert advice in report.reason
    assert "\n" not in report.reason


def test_another_registry_storage_remote_or_branch_is_filled_too(
    released: Workspace, s3: S3Address
) -> None:
    for changed in (
        {"database_url": SecretStr("postgresql://someone:secret@host/handsigns")},
        {"mlflow_tracking_uri": "http://mlflow:5000"},
        {"dvc_remote_url": "s3://key:secret@photos/dvc"},
        {"git_push": "handsigns/data"},
    ):
        released.settings = released.settings.model_copy(update=changed)
        assert find_unchanged(released) is None
        remember(released)
        assert find_unchanged(released) is not None
        assert b"secret" not in (released.project.local / "last_run.json").read_bytes()
    released.settings = released.services.settings = Settings.model_validate(
        {
            "s3_endpoint_url": s3.endpoint_url,
            "bucket": s3.bucket,
            "AWS_ACCESS_KEY_ID": s3.access_key_id,
            "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
        }
    )
    remember(released)
    assert find_unchanged(released) is None  # this storage has no champion


def test_a_remote_in_aws_needs_no_endpoint(tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two"}
    settings = Settings.model_validate({"dvc_remote_url": "s3://photos/dvc", **keys})
    remote = Workspace(Project(tmp_path), settings).remote()
    assert remote is not None
    known = {"region": "us-east-1", "access_key_id": "one", "secret_access_key": "two"}
    assert remote.options == known

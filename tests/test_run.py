"""The retrain command around its flow: the lock, checks, signals, and what is unchanged."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from flows.report import ModelReport, RunReport, data_changes, write_report
from flows.run import find_unchanged, last_run, retrain, retrain_lock, save_last_run
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.data.directory import stored_photos
from tasks.io import read_json, write_json
from tasks.project import Project
from tasks.releases.signing import new_keys
from tasks.services.mlflow import CHAMPION
from tasks.services.s3 import S3Address, Storage
from tasks.stage import silent
from tests.fixtures import faults
from tests.fixtures.checkouts import BIN, Repo, make_checkout, with_stages
from tests.fixtures.faults import Exchange, proxy_to
from tests.fixtures.photos import CHECKOUT, LABELS, write_photos
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.receiver import receiving


@pytest.fixture
def checkout(tmp_path: Path) -> Repo:
    """A checkout without photos."""
    return make_checkout(tmp_path / "checkout")


def done(status: Any = "promoted") -> RunReport:
    return RunReport(status=status, model=ModelReport(name="hand-signs"))


def test_the_first_cause_is_reported_where_prefect_or_the_disk_fails_too(
    checkout: Repo, prefect_api: PrefectApi
) -> None:
    def gone(exchange: Exchange) -> None:
        (faults.resetting if checkout.project.run.exists() else faults.passed)(exchange)

    with (
        receiving("secret") as receiver,
        proxy_to(prefect_api.url.removesuffix("/api")) as prefect,
        prefect.failing(gone),
    ):
        services = {**prefect_api.named, "PREFECT_API_URL": f"{prefect.url}/api"}
        services |= {"HANDSIGNS_NOTIFY_URLS": receiver.address, "PREFECT_CLIENT_MAX_RETRIES": "0"}
        report = checkout.handsigns("retrain", code=1, **services)
    assert report["reason"].startswith("There are no photos yet.")
    assert checkout.report() == report
    titles = [message["title"] for message in receiver.messages]
    assert "handsigns: Prefect failed at the end of a retrain" in titles

    checkout.change("gate", min_acuracy=0.9)
    full = checkout.run_limited(100, "retrain")
    assert "min_acuracy" in full.stdout
    assert "artifacts/run.json cannot be written (File too large)" in full.stderr


def test_a_run_of_the_schedule_logs_what_the_command_says_and_no_traceback(
    checkout: Repo, prefect_api: PrefectApi
) -> None:
    worker = {**prefect_api.named, "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks"}
    code = "from flows.retrain import retrain; state = retrain(return_state=True)"
    code += "; print(state.state_details.flow_run_id)"
    run = checkout.run("python", "-c", code, **worker).stdout.split()[-1]
    found, lines = prefect_api.ask(f"flow_runs/{run}"), prefect_api.logged(run)
    reason = "There are no photos yet. Run `handsigns import FOLDER`"
    assert found["name"].startswith(f"failed: {reason}")
    assert (found["state_type"], found["state_name"]) == ("FAILED", "Failed")
    assert any(line.startswith(f"failed: {reason}") for line in lines)
    assert not [line for line in lines if "Traceback" in line]
    said = checkout.run("handsigns", "retrain", code=1, **prefect_api.named).stderr.splitlines()
    assert said[0] == "Signatures are not checked: no public key is configured."
    assert set(said) <= set(lines)
    assert checkout.handsigns("status")["last_run"]["reason"].startswith(reason)


def test_a_signal_in_the_first_seconds_leaves_a_cancelled_run(checkout: Repo) -> None:
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
            process.send_signal(signal.SIGTERM)
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


def test_a_release_or_rejection_is_unchanged_and_a_second_retrain_is_refused(
    released: Workspace,
) -> None:
    report = retrain(released, False, silent)
    assert report.status == read_json(released.project.run)["status"] == "unchanged"
    remember(released, status="rejected", reason="The gate rejected the model: loss 0.5 > 0.4.")
    again = retrain(released, False, silent)
    assert (again.status, again.reason) == (
        "unchanged",
        "Nothing changed; the last run was rejected: The gate rejected the model: loss 0.5 > 0.4.",
    )
    with retrain_lock(released.project):
        refused = retrain(released, True, silent)
    assert refused.status == "failed"
    assert f"Another retrain of this checkout runs: process {os.getpid()}." in refused.reason
    assert read_json(released.project.run)["status"] == "unchanged"


def test_what_was_lost_or_exchanged_is_never_called_unchanged(
    released: Workspace, tmp_path: Path
) -> None:
    root = released.project.root
    recorded, data = (root / name for name in (".local/last_run.json", "data.dvc"))
    later = recorded.read_bytes().replace(b'"report": {', b'"report": {"a_field_of_later": 1,')
    for path, content in (
        (root / ".local/seaweedfs/handsigns.id", None),
        (root / ".local/mlflow.db", b"garbage"),
        (root / ".local/mlflow.db", None),
        (data, data.read_bytes().replace(b"md5: ", b"md5: 0", 1)),
        (recorded, later),
        (recorded, b"[]"),
    ):
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert find_unchanged(released) is None, path
        path.write_bytes(before)
        assert find_unchanged(released) is not None, path
    for file, content in (("data.dvc", b"outs: []\n"), ("data.dvc", b""), ("dvc.yaml", b"")):
        before = (root / file).read_bytes()
        (root / file).write_bytes(content)
        report = retrain(released, False, silent)
        assert report.status == "failed"
        assert file in report.reason
        assert "\n" not in report.reason
        (root / file).write_bytes(before)
    _, public = new_keys(tmp_path / "keys")
    released.settings = released.settings.model_copy(update={"public_keys": (public,)})
    assert find_unchanged(released) is None


def in_s3(s3: S3Address, **more: str) -> dict[str, Any]:
    """Settings that name this storage."""
    return {
        "s3_endpoint_url": s3.endpoint_url,
        "bucket": s3.bucket,
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
        **more,
    }


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
    released.settings = released.services.settings = Settings.model_validate(in_s3(s3))
    remember(released)
    assert find_unchanged(released) is None  # this storage has no champion


def test_an_s3_inbox_is_another_bucket_and_never_removes_what_a_person_put_there(
    s3_server: S3Address,
    s3: S3Address,
    checkout: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = checkout.project
    shutil.copy(CHECKOUT.root / "data.dvc", project.root)  # names the rendered sample
    monkeypatch.chdir(project.root)
    named = in_s3(s3, bucket=s3_server.bucket, inbox=f"s3://{s3.bucket}/signs/")
    drop, photos = Storage(s3), write_photos(tmp_path / "photos", per_class=2)
    for label in LABELS:
        drop.put(f"signs/{label}/a.png", photos / f"{label}/0000.png")
    with Workspace(project, Settings.model_validate(named)) as workspace:
        inbox = workspace.inbox()
        assert inbox is not None
        assert workspace.import_new(inbox, silent).usable
        assert workspace.pipeline.data_source() == "sample"  # until it is versioned
        assert len(stored_photos(project)) == 6
        # data/ differs from the sample that data.dvc names, so all of it stays.
        drop.put("signs/3/b.png", photos / "3/0001.png")
        inbox = workspace.inbox()
        assert inbox is not None
        report = workspace.import_new(inbox, silent)
        assert (sum(report.imported.values()), report.removed) == (1, 0)
        inbox.remember(workspace.pipeline.version_data("photos"))
        inbox = workspace.inbox()
        assert inbox is not None
        assert inbox.new == ()


def test_photos_that_came_went_and_were_relabelled_are_counted(tmp_path: Path) -> None:
    def index(**labels: str) -> dict[str, Any]:
        photos = [{"name": name, "label": label} for name, label in labels.items()]
        return {"labels": LABELS, "photos": photos}

    project, former = Project(tmp_path), index(a="0", b="0", c="1", d="2")
    write_json(project.dataset_index, index(b="0", c="5", d="2", e="3", f="3"))
    found = data_changes(project, former, since=4)
    assert (found.since, found.added, found.removed, found.relabelled) == (4, 2, 1, 1)
    assert found.per_class["0"] == {"before": 2, "added": 0, "removed": 1, "now": 1}
    assert found.per_class["3"] == {"before": 0, "added": 2, "removed": 0, "now": 2}
    first = data_changes(project, None, since=None)
    assert (first.since, first.added, first.removed) == (None, 5, 0)

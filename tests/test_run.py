"""The retrain command around its flow: the lock, checks, signals, and what is unchanged."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from flows.report import ModelReport, RunReport
from flows.run import find_unchanged, retrain, retrain_lock, save_last_run
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.data.directory import stored_photos
from tasks.io import read_json, write_json
from tasks.releases.signing import new_keys
from tasks.services.s3 import S3Address
from tasks.stage import silent
from tests.fixtures import faults
from tests.fixtures.checkouts import BIN, Repo, make_checkout, with_stages
from tests.fixtures.faults import Exchange, proxy_to, receiving
from tests.fixtures.photos import CHECKOUT, write_photos
from tests.fixtures.servers import PrefectApi
from tests.fixtures.service import named, soon


@pytest.fixture
def checkout(tmp_path: Path) -> Repo:
    """A checkout without photos."""
    return make_checkout(tmp_path / "checkout")


def test_the_first_cause_is_reported(checkout: Repo, prefect_api: PrefectApi) -> None:
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
    (run,) = checkout.handsigns("runs", "-n", "1")["runs"]
    assert (run["status"], run["reason"]) == ("failed", report["reason"])
    titles = [message["title"] for message in receiver.messages]
    assert "handsigns: Prefect failed at the end of a retrain" in titles

    checkout.change("gate", min_acuracy=0.9)
    full = checkout.run_limited(100, "retrain")
    assert "gate.min_acuracy" in full.stdout
    assert "artifacts/run.json cannot be written (File too large)" in full.stderr


def test_a_scheduled_run_logs_what_a_command_says(checkout: Repo, prefect_api: PrefectApi) -> None:
    worker = {**prefect_api.named, "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks"}
    code = "from flows.retrain import retrain; state = retrain(return_state=True)"
    code += "; print(state.state_details.flow_run_id)"
    run = checkout.run("python", "-c", code, **worker).stdout.split()[-1]
    found = prefect_api.ask(f"flow_runs/{run}")
    lines = prefect_api.logged(run)
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
    write_json(checkout.project.run, {})
    with subprocess.Popen(
        [BIN / "handsigns", "retrain", "--force"],
        cwd=checkout.project.root,
        env=checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        soon(lambda: not checkout.project.run.exists())
        while process.poll() is None:  # Python itself may swallow one that comes during an import
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert checkout.report()["status"] == "cancelled"


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A checkout of one stage, in which nothing changed since its last release was promoted."""
    project = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(project.root)
    stages = yaml.safe_load((project.root / "dvc.yaml").read_text())["stages"]
    (project.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"audit": stages["audit"]}}))
    with Workspace(project, Settings()) as made:
        made.pipeline.version_data("photos")
        made.pipeline.run("audit")
        (project.local / "mlflow.db").write_bytes(b"SQLite format 3\0")
        remember(made)
        yield made


def remember(workspace: Workspace, status: Any = "promoted", reason: str = "") -> None:
    report = RunReport(status=status, reason=reason, model=ModelReport(name="hand-signs"))
    report.data.version = workspace.pipeline.data_version() or ""
    save_last_run(workspace, report)


def test_a_release_or_rejection_is_unchanged_and_a_second_run_refused(released: Workspace) -> None:
    assert retrain(released, False, silent).status == "unchanged"
    remember(released, "rejected", "The gate rejected the model: loss 0.5 > 0.4.")
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
    released: Workspace, s3: S3Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, local = released.project.root, released.settings
    last = root / ".local/seaweedfs/last_run.json"
    registry, version = root / ".local/mlflow.db", root / "data.dvc"
    for path, content in (
        (registry, b"garbage"),
        (version, version.read_bytes().replace(b"md5: ", b"md5: 0", 1)),
        (last, last.read_bytes().replace(b'"report": {', b'"report": {"a_field_of_later": 1,')),
        (last, b"[]"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        assert find_unchanged(released) is None, path
        path.write_bytes(before)
        assert find_unchanged(released) is not None, path
    # Another key, registry, remote or storage gets what the former one had.
    _, public = new_keys(tmp_path / "keys")
    for changed in (
        {"public_keys": (public,)},
        {"database_url": SecretStr("postgresql://someone:secret@host/handsigns")},
        {"dvc_remote_url": "s3://key:secret@photos/dvc"},
    ):
        released.settings = released.settings.model_copy(update=changed)
        assert find_unchanged(released) is None
        remember(released)
        assert find_unchanged(released) is not None
        assert b"secret" not in last.read_bytes()
    with monkeypatch.context() as patch:
        for name, value in named(s3).items():
            patch.setenv(name, value)
        released.settings = released.services.settings = Settings()
    remember(released)
    assert find_unchanged(released) is None  # this storage has no champion
    released.settings = released.services.settings = local
    for file, content in (("data.dvc", b""), ("dvc.yaml", b"")):
        before = (root / file).read_bytes()
        (root / file).write_bytes(content)
        report = retrain(released, False, silent)
        assert (report.status, file in report.reason) == ("failed", True)
        assert "\n" not in report.reason
        (root / file).write_bytes(before)


def test_an_inbox_never_removes_what_a_person_put_there(
    checkout: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, inbox = checkout.project, write_photos(tmp_path / "inbox", per_class=1)
    shutil.copy(CHECKOUT.root / "data.dvc", project.root)  # names the rendered sample
    monkeypatch.chdir(project.root)
    with Workspace(project, Settings(inbox=str(inbox))) as workspace:
        for expected in ((6, 0), (6, 0)):
            found = workspace.inbox()
            assert found is not None
            report = workspace.import_new(found, silent)
            assert (sum(report.imported.values()), report.removed) == expected
            assert workspace.pipeline.data_source() == "sample"  # until it is versioned
            # data/ differs now from the sample that data.dvc names, so all of it stays.
            write_photos(inbox, per_class=2)
    assert len(stored_photos(project)) == 12

"""The retrain command around its flow: the lock, checks, signals, and what is unchanged."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from flows import run
from flows.preflight import find_unchanged, last_run, retrain_lock, save_last_run
from flows.report import GateReport, ModelReport, RunReport, write_report
from flows.run import Run, retrain
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import DataError, ServiceError
from tasks.io import read_json, write_json
from tasks.releases.pointer import Pointer, move_champion
from tasks.releases.signing import new_keys
from tasks.services.mlflow import CHAMPION
from tasks.services.s3 import S3Address, Storage
from tasks.stage import silent
from tests.fixtures.checkouts import BIN, make_checkout, with_stages
from tests.fixtures.receiver import receiving


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A checkout of the stages, with services that nobody asks."""
    project = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(project.root)
    with receiving("secret") as receiver:
        settings = Settings(notify_urls=SecretStr(receiver.address))
        with Workspace(project, settings) as made:
            yield made
        titles[:] = [message["title"] for message in receiver.messages]


titles: list[str] = []


def done(status: Any = "promoted") -> RunReport:
    return RunReport(status=status, model=ModelReport(name="hand-signs"))


def lose_prefect(monkeypatch: pytest.MonkeyPatch, written: RunReport | None) -> None:
    """Let Prefect fail, after the flow has ended with a report or before it began."""

    def flow(current: Run) -> None:
        if written:
            current.report, current.ended = written, True
        raise ServiceError("Prefect failed (Timeout).")

    monkeypatch.setattr(run, "_run_flow", flow)


@pytest.mark.parametrize(
    ("written", "status"), [(done(), "promoted"), (done("failed"), "failed"), (None, "failed")]
)
def test_the_outcome_of_the_flow_stands_if_prefect_fails(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    written: RunReport | None,
    status: str,
) -> None:
    lose_prefect(monkeypatch, written)
    report = retrain(workspace, True, silent)
    assert report.status == status
    if status == "failed":
        assert report.reason == "Prefect failed (Timeout)."
        assert read_json(workspace.project.run)["reason"] == "Prefect failed (Timeout)."


def test_a_second_retrain_is_refused_and_leaves_the_report_of_the_first(
    workspace: Workspace,
) -> None:
    write_report(done("registered"), workspace.project)
    with retrain_lock(workspace.project):
        refused = retrain(workspace, True, silent)
    assert refused.status == "failed"
    assert f"Another retrain of this checkout runs: process {os.getpid()}." in refused.reason
    assert read_json(workspace.project.run)["status"] == "registered"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_first_seconds_leaves_a_cancelled_run(
    tmp_path: Path, number: signal.Signals
) -> None:
    made = make_checkout(tmp_path / "checkout")
    (made.project.data / "train/0").mkdir(parents=True)
    write_report(done("registered"), made.project)
    with subprocess.Popen(
        [BIN / "handsigns", "retrain", "--force"],
        cwd=made.project.root,
        env=made.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while made.project.run.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert made.report()["status"] == "cancelled"


def test_a_full_disk_does_not_hide_the_first_cause(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flow(*_: Any) -> None:
        workspace.project.artifacts.write_text("no folder")
        raise ServiceError("The first cause.")

    monkeypatch.setattr(run, "_run_flow", flow)
    assert retrain(workspace, True, silent).reason == "The first cause."
    assert "artifacts/run.json cannot be written" in caplog.text


@pytest.fixture
def released(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A checkout in which nothing changed since its last release became champion."""
    version = workspace.pipeline.version_data("photos")
    monkeypatch.setattr(type(workspace.pipeline), "changed", lambda _self: {})
    workspace.project.local.joinpath("mlflow.db").write_bytes(b"SQLite format 3\0")
    report = done()
    report.data.version = version
    report.model.alias = CHAMPION
    save_last_run(workspace, report)
    return workspace


def remember(workspace: Workspace, **changes: Any) -> None:
    last = last_run(workspace.project)
    assert last is not None
    save_last_run(workspace, last.model_copy(update=changes))


def test_what_was_released_last_is_unchanged(released: Workspace) -> None:
    assert retrain(released, False, silent).status == "unchanged"
    assert read_json(released.project.run)["status"] == "unchanged"


def test_a_rejection_is_remembered_and_not_repeated_while_nothing_changes(
    released: Workspace,
) -> None:
    gate = GateReport(checks=[{"name": "loss", "value": 0.5, "limit": 0.4, "passed": False}])
    reason = f"The gate rejected the model: {gate.failures()[0]}."
    remember(released, status="rejected", reason=reason, gate=gate)
    report = retrain(released, False, silent)
    assert report.status == "unchanged"
    assert report.reason == (
        "Nothing changed; the last run was rejected: The gate rejected the model: "
        "loss 0.500 > 0.400."
    )
    last = last_run(released.project)
    assert last is not None
    assert last.headline() == "rejected: loss 0.500 > 0.400"


def test_a_record_of_another_version_of_the_program_is_no_reason_to_fail(
    released: Workspace,
) -> None:
    record = released.project.local / "last_run.json"
    content = read_json(record)
    content["report"]["a_field_of_later"] = 1
    write_json(record, content)
    assert find_unchanged(released) is None
    record.write_text("[]")
    assert find_unchanged(released) is None


def test_damaged_state_is_never_called_unchanged(released: Workspace) -> None:
    project = released.project
    database = project.local / "mlflow.db"
    database.write_bytes(b"garbage")
    assert "rebuild-registry" in retrain(released, False, silent).reason
    for lose in (Path.unlink, Path.touch):
        lose(database)
        assert find_unchanged(released) is None
    database.write_bytes(b"SQLite format 3\0")
    (project.local / "seaweedfs/handsigns.id").write_bytes(b"\xff\xfe")
    assert find_unchanged(released) is None
    remember(released)
    assert find_unchanged(released) is not None
    kept = project.data_file.read_text()
    project.data_file.write_text(kept.replace("md5: ", "md5: 0", 1))
    assert find_unchanged(released) is None
    for text in ("", "outs: []\n"):
        project.data_file.write_text(text)
        with pytest.raises(DataError, match=r"data\.dvc"):
            find_unchanged(released)


def test_an_empty_dvc_yaml_is_refused_in_one_line(workspace: Workspace) -> None:
    (workspace.project.root / "dvc.yaml").write_text("")
    report = retrain(workspace, False, silent)
    assert report.status == "failed"
    assert "dvc.yaml" in report.reason


def test_a_local_storage_that_was_removed_is_filled_again(released: Workspace) -> None:
    store = released.project.local / "seaweedfs"
    shutil.rmtree(store)
    store.mkdir()
    assert find_unchanged(released) is None


def test_other_keys_ask_for_another_look(released: Workspace, tmp_path: Path) -> None:
    _, public = new_keys(tmp_path)
    released.settings = released.settings.model_copy(update={"public_keys": (public,)})
    assert find_unchanged(released) is None


def test_another_registry_remote_or_branch_is_filled_too(released: Workspace) -> None:
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


def test_an_alias_that_did_not_follow_is_repaired_also_if_nothing_changed(
    released: Workspace, s3: S3Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    released.settings = released.settings.model_copy(
        update={
            "s3_endpoint_url": s3.endpoint_url,
            "bucket": s3.bucket,
            "aws_access_key_id": SecretStr(str(s3.access_key_id)),
            "aws_secret_access_key": SecretStr(str(s3.secret_access_key)),
        }
    )
    released.services.settings = released.settings
    remember(released)
    assert find_unchanged(released) is None  # the storage lost its champion
    move_champion(Storage(s3), None, Pointer(release="0" * 32, version=1))
    repaired: list[bool] = []
    monkeypatch.setattr(Workspace, "repair_alias", lambda _self: repaired.append(True) or True)
    assert find_unchanged(released) is not None
    assert repaired == [True]

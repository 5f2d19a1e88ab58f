"""What the command tells of a retrain that another one, or Prefect itself, got in the way of."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flows.launch import launch_retrain
from pydantic import SecretStr

from flows import launch
from flows.report import ModelReport, RunReport, remember, unchanged_since
from flows.retrain import retrain_lock
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import ServiceError
from tasks.io import read_json, write_json
from tasks.releases.pointer import Pointer, move_champion
from tasks.releases.signing import new_keys
from tasks.services.mlflow import CHAMPION
from tasks.services.s3 import S3Address, Storage
from tasks.stage import silent
from tests.fixtures.checkouts import with_stages

Losing = Callable[[RunReport | None], RunReport]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A checkout of the stages, with services that nobody asks."""
    project = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(launch, "notify_people", lambda *said: told.append(said[1]))
    told.clear()
    return Workspace(project, Settings())


told: list[str] = []


def done(status: Any = "promoted") -> RunReport:
    return RunReport(status=status, reason="", model=ModelReport(name="hand-signs"))


@pytest.fixture
def losing_prefect(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Losing:
    """Retrain with a flow that writes this report, if any, before Prefect is lost."""

    def retrain(written: RunReport | None) -> RunReport:
        def flow(*_: Any) -> None:
            if written:
                written.write(workspace.project)
            raise ServiceError("Prefect failed (Timeout).")

        monkeypatch.setattr(launch, "_run_flow", flow)
        return launch_retrain(workspace, True, silent)

    return retrain


def test_a_finished_runs_report_outlives_prefect(
    workspace: Workspace, losing_prefect: Losing
) -> None:
    assert losing_prefect(done()).status == "promoted"
    assert read_json(workspace.project.run)["status"] == "promoted"
    assert told == ["handsigns: Prefect failed at the end of a retrain"]


def test_a_run_that_lost_prefect_half_way_says_so(
    workspace: Workspace, losing_prefect: Losing
) -> None:
    assert losing_prefect(done("failed")).reason == "Prefect failed (Timeout)."
    assert read_json(workspace.project.run)["reason"] == "Prefect failed (Timeout)."
    assert told == ["handsigns: retrain failed"]


def test_a_run_that_never_began_is_reported_as_failed(
    workspace: Workspace, losing_prefect: Losing
) -> None:
    done().write(workspace.project)
    assert losing_prefect(None).status == "failed"
    assert read_json(workspace.project.run)["reason"] == "Prefect failed (Timeout)."
    assert told == ["handsigns: retrain failed before it began"]


def test_a_retrain_that_comes_while_another_starts_is_refused_and_leaves_its_report(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = workspace.project
    refused: list[RunReport] = []

    def flow(*_: Any) -> None:
        with retrain_lock(project) as alone:  # as the flow does, within the command's own hold
            assert alone
            done("registered").write(project)
            with ThreadPoolExecutor(1) as elsewhere:
                refused.append(elsewhere.submit(launch_retrain, workspace, True, silent).result())

    monkeypatch.setattr(launch, "_run_flow", flow)
    assert launch_retrain(workspace, True, silent).status == "registered"
    assert refused[0].status == "failed"
    assert f"Another retrain of this checkout runs. Received: process {os.getpid()}." in (
        refused[0].reason
    )
    assert read_json(project.run)["status"] == "registered"
    assert told == []


@pytest.fixture
def released(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A checkout in which nothing changed since its last release became champion."""
    monkeypatch.setattr(type(workspace.pipeline), "changed", lambda _self: {})
    report = done()
    report.model.alias = CHAMPION
    remember(workspace, report)
    return workspace


def test_what_was_released_last_is_unchanged(released: Workspace) -> None:
    found = unchanged_since(released)
    assert found is not None
    assert found.status == "unchanged"


def test_a_record_of_another_version_of_the_program_is_no_reason_to_fail(
    released: Workspace,
) -> None:
    record = released.project.local / "last_release.json"
    content = read_json(record)
    content["report"]["a_field_of_later"] = 1
    write_json(record, content)
    assert unchanged_since(released) is None


def test_a_local_storage_that_was_removed_is_filled_again(released: Workspace) -> None:
    store = released.project.local / "seaweedfs"
    shutil.rmtree(store)
    store.mkdir()
    assert unchanged_since(released) is None


def test_other_keys_ask_for_another_look(released: Workspace, tmp_path: Path) -> None:
    _, public = new_keys(tmp_path)
    released.settings = released.settings.model_copy(update={"public_keys": (public,)})
    assert unchanged_since(released) is None


def test_another_registry_remote_or_branch_is_filled_too(released: Workspace) -> None:
    known = released.settings
    for changed in (
        {"database_url": SecretStr("postgresql://someone:secret@host/handsigns")},
        {"mlflow_tracking_uri": "http://mlflow:5000"},
        {"dvc_remote_url": "s3://key:secret@photos/dvc"},
        {"git_push": "handsigns/data"},
    ):
        released.settings = known.model_copy(update=changed)
        assert unchanged_since(released) is None
        remember(released, done())
        assert unchanged_since(released) is not None
        assert b"secret" not in (released.project.local / "last_release.json").read_bytes()
    released.settings = known
    assert unchanged_since(released) is not None  # a branch that is not named any more


def test_a_storage_without_its_champion_is_filled_again(released: Workspace, s3: S3Address) -> None:
    released.settings = released.settings.model_copy(
        update={
            "s3_endpoint_url": s3.endpoint_url,
            "bucket": s3.bucket,
            "aws_access_key_id": SecretStr(str(s3.access_key_id)),
            "aws_secret_access_key": SecretStr(str(s3.secret_access_key)),
        }
    )
    report = done()
    report.model.alias = CHAMPION
    remember(released, report)
    assert unchanged_since(released) is None
    move_champion(Storage(s3), None, Pointer(release="0" * 32, version=1))
    assert unchanged_since(released) is not None

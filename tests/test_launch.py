"""What the command tells of a retrain that another one, or Prefect itself, got in the way of."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import launch
from flows.commands.launch import launch_retrain
from flows.exclusion import only_retrain
from flows.reports.record import unchanged_since
from flows.reports.report import ModelReport, RunReport
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import ServiceError
from tasks.progress import silent
from tasks.whole import read_json, write_json
from tests.fixtures.checkouts import with_stages

Flow = Callable[..., Any]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A checkout of the stages, with services that nobody asks."""
    layout = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(layout.root)
    monkeypatch.setattr(launch, "tell", lambda *said: told.append(said[1]))
    told.clear()
    return Workspace(layout, Settings())


told: list[str] = []


def done(status: Any = "promoted") -> RunReport:
    return RunReport(status=status, reason="", model=ModelReport(name="hand-signs"))


def test_a_finished_runs_report_outlives_prefect(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flow(*_: Any) -> None:
        done().write(workspace.layout)
        raise ServiceError("Prefect failed (Timeout).")

    monkeypatch.setattr(launch, "_run_flow", flow)
    assert launch_retrain(workspace, True, silent).status == "promoted"
    assert read_json(workspace.layout.run)["status"] == "promoted"
    assert told == ["handsigns: Prefect failed at the end of a retrain"]


def test_a_run_that_never_began_is_reported_as_failed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flow(*_: Any) -> None:
        raise ServiceError("Prefect failed (Timeout).")

    done().write(workspace.layout)
    monkeypatch.setattr(launch, "_run_flow", flow)
    assert launch_retrain(workspace, True, silent).status == "failed"
    assert read_json(workspace.layout.run)["reason"] == "Prefect failed (Timeout)."
    assert told == ["handsigns: retrain failed before it began"]


def test_a_retrain_that_begins_meanwhile_keeps_its_report(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.states import Cancelled

    layout = workspace.layout

    def flow(*_: Any) -> Any:
        with only_retrain(layout) as alone:
            assert alone
            done("registered").write(layout)
        return Cancelled()

    monkeypatch.setattr(launch, "_run_flow", flow)
    report = launch_retrain(workspace, True, silent)
    assert report.status == "failed"
    assert f"Another retrain of this checkout runs. Received: process {os.getpid()}." in (
        report.reason
    )
    assert read_json(layout.run)["status"] == "registered"


def test_a_record_of_another_version_of_the_program_is_no_reason_to_fail(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.reports.record import remember

    layout, pipeline = workspace.layout, workspace.pipeline
    monkeypatch.setattr(type(pipeline), "changed", lambda _self: {})
    remember(layout, workspace.settings, done())
    found = unchanged_since(layout, workspace.settings, pipeline)
    assert found is not None
    assert found.status == "unchanged"
    record = layout.local / "last_release.json"
    content = read_json(record)
    content["report"]["a_field_of_later"] = 1
    write_json(record, content)
    assert unchanged_since(layout, workspace.settings, pipeline) is None

"""Run the flows from the command line, on the Prefect server that is named or a local one."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.local.clients import TAG, advice, ask, point_prefect_at
from flows.preflight import another_runs, find_unchanged, preflight, retrain_lock
from flows.report import ModelReport, RunReport
from flows.workspace import Workspace
from tasks.errors import HandsignsError, PromotionError, ServiceError
from tasks.project import Project
from tasks.releases.pointer import Move
from tasks.services.s3 import redact_url
from tasks.stage import Progress

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """What a command shares with the flow that runs in its own process.

    Args:
        workspace: Open, checked, and with the retrain lock held.
        progress: Shows how far long stages are.
        report: Set by the flow; also if `run.json` could not be written.
    """

    workspace: Workspace
    progress: Progress
    report: RunReport | None = None


session: ContextVar[Session | None] = ContextVar("session", default=None)


def retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    """Run the retrain flow, unless nothing changed; that takes no server and no TensorFlow.

    Args:
        workspace: The checkout, open.
        force: Run every stage, changed or not.
        progress: Shows how far long stages are.

    Returns:
        What `run.json` says, whatever happened.
    """
    project = workspace.project
    current = Session(workspace, progress)
    with signals_interrupt(), retrain_lock(project) as alone:
        if not alone:  # run.json is the other one's
            return _ended(workspace, "failed", another_runs(project))
        try:
            project.run.unlink(missing_ok=True)  # it must not pass for the report of this run
            preflight(workspace)
            if not force and (found := find_unchanged(workspace)):
                write_report(found, project)
                return found
            _run_retrain(current, force)
        except HandsignsError as error:
            _fail(current, str(error))
        except KeyboardInterrupt:
            if current.report is None:
                current.report = _ended(workspace, "cancelled", "Interrupted before it began.")
                write_report(current.report, project)
    if current.report is None:
        raise ServiceError("Prefect did not run the flow. Look at its log, then run again.")
    return current.report


def _ended(workspace: Workspace, status: Any, reason: str) -> RunReport:
    model = ModelReport(name=workspace.settings.model_name)
    return RunReport(status=status, reason=reason, model=model)


def _fail(current: Session, reason: str) -> None:
    """Report what failed outside of the flow; the flow's own outcome stands."""
    from flows.notify import notify_people

    settings = current.workspace.settings
    if current.report and current.report.status != "failed":
        _log.warning(reason)
        notify_people(settings, "handsigns: Prefect failed at the end of a retrain", reason)
        return
    when = "" if current.report else " before it began"
    current.report = _ended(current.workspace, "failed", reason)
    write_report(current.report, current.workspace.project)
    notify_people(settings, f"handsigns: retrain failed{when}", reason)


def write_report(report: RunReport, project: Project) -> None:
    """Write `run.json`; log, don't raise, so that the first cause is the one reported."""
    try:
        report.write(project)
    except OSError as error:
        _log.warning("artifacts/run.json cannot be written (%s).", error.strerror or error)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt as Ctrl-C does, so that the run can say so."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    caught = [
        (number, signal.signal(number, interrupt))
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL  # nohup ignores SIGHUP
    ]
    try:
        yield
    finally:
        for number, before in caught:
            signal.signal(number, before)


def _run_retrain(current: Session, force: bool) -> None:
    services = current.workspace.services
    api = services.start_prefect()
    _point(current.workspace, api)
    # Imported while the server starts, one after the other: modules that two threads
    # import at once can see each other half made.
    import tensorflow  # noqa: F401

    from flows.retrain import retrain as flow
    from tasks.services.mlflow import load_mlflow

    load_mlflow()
    services.prefect()
    try:
        _in_prefect(lambda: flow(force=force, return_state=True), current)
    except Exception as error:  # the flow catches its own errors; these are the client's
        raise ServiceError(
            f"Prefect at {redact_url(api)} failed ({type(error).__name__}). "
            f"{advice(error)}, then run again."
        ) from error


def promote(workspace: Workspace, version: int, reason: str, force: bool) -> Move:
    """Make a version the champion; a flow run shows it where a Prefect server is named."""

    def flow() -> "State[Any]":
        from flows.promotion import promote as run

        return run(version=version, reason=reason, force=force, return_state=True)

    return _move(workspace, flow, lambda: workspace.promote(version, reason, force))


def rollback(workspace: Workspace, reason: str, expected: str | None = None) -> Move:
    """Return to the earlier champion; a flow run shows it where a Prefect server is named."""

    def flow() -> "State[Any]":
        from flows.promotion import rollback as run

        return run(reason=reason, expected=expected or "", return_state=True)

    return _move(workspace, flow, lambda: workspace.rollback(reason, expected=expected))


def _move(
    workspace: Workspace, flow: "Callable[[], State[Any]]", directly: Callable[[], Move]
) -> Move:
    """Move the champion; Prefect may fail, as taking back a bad champion must not wait for it.

    What is done directly after Prefect failed is the same move: if the flow made it
    already, it is not made again.
    """
    api = workspace.services.prefect_named()
    if api is None:
        return directly()
    if ask(f"{api}/health", seconds=3.0) is None:
        _log.warning("Prefect does not answer at %s; its UI will not show this.", redact_url(api))
        return directly()
    _point(workspace, api)
    try:
        state = _in_prefect(flow, None)
    except Exception as error:  # of many kinds, all of Prefect's client
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        _log.warning(
            "Prefect cannot be used at %s (%s), so that its UI does not show all of this. %s.",
            redact_url(api),
            status,
            advice(error),
        )
        return directly()
    if state.is_completed():
        return Move.model_validate(state.result())
    if state.name == "Refused":
        raise PromotionError(str(state.message))
    return directly()


def _point(workspace: Workspace, api: str) -> None:
    point_prefect_at(api, workspace.services.folder, workspace.settings)
    # The terminal shows progress; the UI has the log.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


def _in_prefect(flow: "Callable[[], State[Any]]", current: Session | None) -> "State[Any]":
    from prefect import tags
    from prefect.logging.handlers import APILogWorker

    token = session.set(current)
    try:
        with tags(TAG):
            return flow()
    finally:
        session.reset(token)
        APILogWorker.drain_all(timeout=5)  # the last lines, before the server stops

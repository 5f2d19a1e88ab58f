"""Run flows from the command line, on the Prefect server that is named or a local one."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from flows.local.clients import TAG, advice, ask, point_prefect_at
from flows.preflight import another_runs, find_unchanged, preflight, retrain_lock
from flows.report import ModelReport, RunReport, Status, write_report
from flows.workspace import Workspace
from tasks.errors import HandsignsError, ServiceError
from tasks.releases.pointer import Move
from tasks.services.s3 import redact_url
from tasks.stage import Progress

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Run:
    """One retrain, shared by the command, the flow in its process, and the flow's tasks.

    Args:
        workspace: Open; of a command also checked, and with the retrain lock held.
        force: Run every stage.
        progress: Shows how far long stages are.
    """

    def __init__(self, workspace: Workspace, force: bool, progress: Progress) -> None:
        self.workspace, self.force, self.progress = workspace, force, progress
        self.report = RunReport(model=ModelReport(name=workspace.settings.model_name))
        self.ended = False

    def end(self, status: Status, reason: str) -> None:
        """Set the outcome."""
        self.report.status, self.report.reason = status, reason
        self.ended = True


command: ContextVar[Run | None] = ContextVar("command", default=None)
"""The command's run, for the flow in its process."""


def retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    """Run the retrain flow, unless nothing changed; that takes no server and no TensorFlow.

    Returns:
        What `run.json` says, whatever happened.
    """
    project, run = workspace.project, Run(workspace, force, progress)
    with signals_interrupt(), retrain_lock(project) as alone:
        if not alone:  # run.json is the other one's
            run.end("failed", another_runs(project))
            return run.report
        try:
            project.run.unlink(missing_ok=True)  # it must not pass for the report of this run
            preflight(workspace)
            if not force and (found := find_unchanged(workspace)):
                run.report = found
            else:
                _run_flow(run)
        except HandsignsError as error:
            _fail(run, str(error))
        except KeyboardInterrupt:
            if not run.ended:
                run.end("cancelled", "Interrupted before it began.")
        write_report(run.report, project)
    return run.report


def _fail(run: Run, reason: str) -> None:
    """Report what failed outside of the flow; an outcome of the flow stands."""
    from flows.notify import notify_people

    title = "Prefect failed at the end of a retrain"
    if run.report.status == "failed":
        title = f"retrain failed{'' if run.ended else ' before it began'}"
        run.end("failed", reason)
    else:
        _log.warning(reason)
    notify_people(run.workspace.settings, f"handsigns: {title}", reason)


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


def _run_flow(run: Run) -> None:
    services = run.workspace.services
    api = services.start_prefect()
    _point(run.workspace, api)
    # Imported while the server starts, one after the other: modules that two threads
    # import at once can see each other half made.
    import tensorflow  # noqa: F401

    from flows.retrain import retrain as flow
    from tasks.services.mlflow import load_mlflow

    load_mlflow()
    services.prefect()
    token = command.set(run)
    try:
        _in_prefect(lambda: flow(force=run.force, return_state=True))
    except Exception as error:  # the flow catches its own errors; these are the client's
        raise ServiceError(
            f"Prefect at {redact_url(api)} failed ({type(error).__name__}). "
            f"{advice(error)}, then run again."
        ) from error
    finally:
        command.reset(token)


def show_move(workspace: Workspace, move: Move) -> None:
    """Show a move of the champion as a flow run, where a Prefect server is named.

    The move is made already: taking back a bad champion must not depend on Prefect.
    """
    api = workspace.services.prefect_named()
    if api is None:
        return
    if ask(f"{api}/health", seconds=3.0) is None:
        _log.warning("Prefect at %s does not answer; its UI lacks this move.", redact_url(api))
        return
    _point(workspace, api)
    try:
        from flows.promotion import record_move

        _in_prefect(lambda: record_move(workspace, move))
    except Exception as error:  # of many kinds, all of Prefect's client
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        _log.warning(
            "Prefect at %s cannot be used (%s); its UI lacks this move. %s.",
            redact_url(api),
            status,
            advice(error),
        )


def _point(workspace: Workspace, api: str) -> None:
    point_prefect_at(api, workspace.services.folder, workspace.settings)
    # The terminal shows progress; the UI has the log.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


def _in_prefect(flow: Callable[[], T]) -> T:
    from prefect import tags
    from prefect.logging.handlers import APILogWorker

    try:
        with tags(TAG):
            return flow()
    finally:
        APILogWorker.drain_all(timeout=5)  # the last lines, before the server stops

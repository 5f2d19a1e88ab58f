"""The retrain command: lock, checks before the start, and the flow if anything changed."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from flows.local.clients import TAG, advice, ask, check_reachable, point_prefect_at
from flows.local.servers import SQLITE
from flows.local.stack import find_running
from flows.report import ModelReport, RunReport, Status, log_run, quarantined, write_report
from flows.workspace import Workspace
from tasks.errors import BusyError, HandsignsError, ServiceError, SettingsError
from tasks.io import read_json, sha256, write_json
from tasks.params import load_params
from tasks.project import Project
from tasks.releases.champion import Move
from tasks.services.git import read_revision
from tasks.services.s3 import redact_url
from tasks.stage import Progress

MAGIC = b"SQLite format 3\0"

_log = logging.getLogger(__name__)


class Run:
    """One retrain, shared by the command, the flow in its process, and the flow's tasks."""

    def __init__(self, workspace: Workspace, force: bool, progress: Progress) -> None:
        self.workspace, self.force, self.progress = workspace, force, progress
        self.report = RunReport(model=ModelReport(name=workspace.settings.model_name))
        self.started = time.time()
        self.record: str | None = None  # the run in MLflow

    def end(self, status: Status, reason: str) -> None:
        """Set the outcome."""
        self.report.status, self.report.reason = status, reason


command: ContextVar[Run | None] = ContextVar("command", default=None)
"""The command's run, for the flow in its process."""


def retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    """Run the retrain flow, unless nothing changed; what `run.json` says, whatever happened."""
    project, run = workspace.project, Run(workspace, force, progress)
    try:
        with signals_interrupt(), retrain_lock(project):
            try:
                project.run.unlink(missing_ok=True)  # it must not pass for this run's report
                preflight(workspace)
                if not force and (found := find_unchanged(workspace)):
                    run.report = found
                else:
                    _run_flow(run)
            except HandsignsError as error:
                _fail(run, str(error))
            except KeyboardInterrupt:
                if not run.report.reason:
                    run.end("cancelled", "Interrupted before it began.")
            write_report(run.report, project)
            log_run(run.report, project)
    except BusyError as error:  # run.json is the other one's
        run.end("failed", str(error))
    return run.report


def _fail(run: Run, reason: str) -> None:
    """Report what failed outside of the flow; an outcome of the flow stands."""
    from flows.ui import notify_people

    title = "retrain failed before it began"
    if run.report.reason:
        title = "Prefect failed at the end of a retrain"
        _log.warning(reason)
    else:
        run.end("failed", reason)
    notify_people(run.workspace.settings, f"handsigns: {title}", reason)


@contextmanager
def retrain_lock(project: Project) -> Iterator[None]:
    """Hold the lock of the checkout's one retrain; `BusyError` names who has it."""
    project.local.mkdir(parents=True, exist_ok=True, mode=0o700)
    holder = project.retrain_lock.with_suffix(".pid")
    try:
        lock = FileLock(project.retrain_lock).acquire(timeout=0)
    except Timeout:
        known = holder.read_text(errors="replace").strip() if holder.exists() else "unknown process"
        raise BusyError(
            f"Another retrain of this checkout runs: {known}. Let it end, or cancel it, and run "
            "again."
        ) from None
    with lock:
        holder.write_text(f"process {os.getpid()}\n")
        yield


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


def preflight(workspace: Workspace) -> None:
    """Refuse a retrain that cannot end well, before anything is started or changed."""
    load_params(workspace.project.params)
    workspace.trust.check_signer()
    _check_approval(workspace)
    check_reachable(workspace.settings)
    workspace.pipeline.stages()
    if problem := read_revision(workspace.project.root).problem:
        _log.warning("Releases of this run name no commit and cannot be rebuilt: %s.", problem)


def _check_approval(workspace: Workspace) -> None:
    """Approval needs services that outlive the run, or nobody could answer."""
    settings, running = workspace.settings, find_running(workspace.services.folder)
    addresses = {
        "PREFECT_API_URL": workspace.services.prefect_named(),
        "HANDSIGNS_S3_ENDPOINT_URL": settings.s3_endpoint_url or (running and running.s3),
    }
    missing = [name for name, address in addresses.items() if address is None]
    if settings.promotion == "approval" and missing:
        raise SettingsError(
            f"HANDSIGNS_PROMOTION=approval cannot be used without {' and '.join(missing)}: "
            "a run that waits for approval needs services that others can reach meanwhile. Set "
            "them, start the service with `handsigns up`, or use HANDSIGNS_PROMOTION=auto."
        )


def find_unchanged(workspace: Workspace) -> RunReport | None:
    """Return an `unchanged` report if a run would come to the same end as the last one.

    MLflow's alias is repaired here if it does not follow the champion.
    """
    project, pipeline = workspace.project, workspace.pipeline
    version, report = pipeline.data_version(), last_run(project)
    if report is None or read_json(_last_run(project)).get("inputs") != _inputs(workspace):
        return None
    if report.data.version != version or not project.data.is_dir() or pipeline.changed():
        return None
    if (inbox := workspace.inbox()) and inbox.new:
        return None
    if report.status == "rejected":
        outcome = f"the last run was rejected: {report.reason}"
    elif _is_registered(workspace):
        outcome = f"data, parameters and code are those of version {report.model.version}."
    else:
        return None
    report.data.quarantined = quarantined(project)
    changes = {"status": "unchanged", "reason": f"Nothing changed; {outcome}", "seconds": {}}
    return report.model_copy(update=changes)


def _is_registered(workspace: Workspace) -> bool:
    """Whether champion and registry still are what the last run left, or were repaired."""
    settings, registry = workspace.settings, workspace.project.local / SQLITE["mlflow"]
    if not (settings.mlflow_tracking_uri or settings.database_url):
        head = registry.read_bytes()[: len(MAGIC)] if registry.exists() else b""
        if head != MAGIC:
            return False
    if settings.s3_endpoint_url is None:
        if not _store_mark(workspace.project).exists():
            return False
        if not workspace.alias_pending.exists():
            return True
    return workspace.champion() is not None and workspace.repair_alias()


def save_last_run(workspace: Workspace, report: RunReport) -> None:
    """Remember how a run ended, for `find_unchanged`; log, don't raise, if that fails."""
    content = {"inputs": _inputs(workspace), "report": report.model_dump(mode="json")}
    mark = _store_mark(workspace.project)
    try:
        if workspace.settings.s3_endpoint_url is None:
            mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            mark.touch()
        write_json(_last_run(workspace.project), content)
    except OSError as error:
        _log.warning("The next run will not know that nothing changed (%s).", error)


def last_run(project: Project) -> RunReport | None:
    """The report of the last run that was not merely `unchanged`; None if it is unreadable."""
    last = read_json(_last_run(project))
    try:
        return RunReport.model_validate(last["report"]) if isinstance(last, dict) else None
    except (KeyError, ValidationError):  # written by another version of this program
        return None


def _inputs(workspace: Workspace) -> dict[str, Any]:
    """What a run is made of and where its results go, without any secret."""
    settings, running = workspace.settings, find_running(workspace.project.local.resolve())
    # Runs of the worker of `up` do not know the database; both name the same one.
    database = settings.database_url and settings.database_url.get_secret_value()
    registry = settings.mlflow_tracking_uri or (running and running.database) or database
    keys = [*settings.public_keys, *filter(None, [settings.signing_key])]
    files = [workspace.project.lock, *keys]
    return {
        "files": [sha256(path) if path.is_file() else None for path in files],
        "storage": settings.s3_endpoint_url,
        "bucket": settings.bucket,
        "registry": redact_url(registry or ""),
        "model": settings.model_name,
        "dvc_remote": redact_url(settings.dvc_remote_url or ""),
        "branch": settings.git_push,
    }


def _store_mark(project: Project) -> Path:
    """Lies among the local storage's files, so that it is removed with them."""
    return project.local / "seaweedfs" / "handsigns.id"


def _last_run(project: Project) -> Path:
    return project.local / "last_run.json"


def _run_flow(run: Run) -> None:
    services = run.workspace.services
    api = services.prefect(wait=False)
    # Imported while the server starts, one after the other: modules that two threads
    # import at once can see each other half made.
    import tensorflow  # noqa: F401

    from tasks.services.mlflow import load_mlflow

    load_mlflow()

    def flow() -> None:
        from flows.retrain import retrain

        services.prefect()
        retrain(force=run.force, return_state=True)

    token = command.set(run)
    try:
        _in_prefect(run.workspace, api, flow)
    except HandsignsError:
        raise
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

    def flow() -> None:
        from flows.promotion import record_move

        record_move(workspace, move)

    try:
        if ask(f"{api}/health", seconds=3.0) is None:
            raise ConnectionError
        _in_prefect(workspace, api, flow)
    except Exception as error:  # of many kinds, all of Prefect's client
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        _log.warning(
            f"Prefect at {redact_url(api)} cannot be used ({status}); its UI lacks this move. "
            f"{advice(error)}."
        )


def _in_prefect(workspace: Workspace, api: str, flow: Callable[[], None]) -> None:
    """Call what runs a flow, once Prefect's client knows its server."""
    point_prefect_at(api, workspace.services.folder, workspace.settings)
    # The terminal shows progress; the UI has the log.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    from prefect import tags
    from prefect.logging.handlers import APILogWorker

    try:
        with tags(TAG):
            flow()
    finally:
        APILogWorker.drain_all(timeout=5)  # the last lines, before the server stops

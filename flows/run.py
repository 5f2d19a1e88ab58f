"""The retrain command: lock, checks before the start, and the flow if anything changed."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from flows.local.clients import (
    TAG,
    asking_prefect,
    check_reachable,
    point_prefect_at,
    prefect_failure,
)
from flows.local.servers import SQLITE
from flows.local.stack import find_running
from flows.report import ModelReport, RunReport, Status, log_run, quarantined, write_report
from flows.workspace import Workspace
from tasks.errors import BusyError, HandsignsError, ServiceError
from tasks.io import read_json, sha256, write_json
from tasks.params import load_params
from tasks.project import Project
from tasks.releases.champion import Move
from tasks.services.git import read_revision
from tasks.services.s3 import redact_url
from tasks.stage import Progress

LAST_RUN = "seaweedfs/last_run.json"  # with the local storage's files, to be removed with them

_log = logging.getLogger(__name__)


class Run:
    """One retrain, shared by the command, the flow in its process, and the flow's tasks."""

    def __init__(self, workspace: Workspace, force: bool, progress: Progress) -> None:
        self.workspace, self.force, self.progress = workspace, force, progress
        self.report = RunReport(model=ModelReport(name=workspace.settings.model_name))
        self.started = time.time()
        self.record: str | None = None  # the run in MLflow
        self.logged = False

    def end(self, status: Status, reason: str) -> None:
        """Set the outcome; the first one stands."""
        if not self.report.reason:
            self.report.status, self.report.reason = status, reason


command: ContextVar[Run | None] = ContextVar("command", default=None)
"""The command's run, for the flow in its process."""


def retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    """Run the retrain flow, unless nothing changed; what `run.json` says, whatever happened."""
    run = Run(workspace, force, progress)
    try:
        with retrain_lock(workspace.project), reported(run):
            try:
                preflight(workspace)
                if not force and (found := find_unchanged(workspace)):
                    run.report = found
                else:
                    _run_flow(run)
            except Exception as error:  # the flow catches its own; these are the Prefect client's
                _notify(run, error)
                raise
    except BusyError as error:  # run.json is the other one's
        run.end("failed", str(error))
    return run.report


@contextmanager
def reported(run: Run) -> Iterator[None]:
    """Make an error the outcome of the run, and leave `run.json`, whatever happens."""
    project = run.workspace.project
    project.run.unlink(missing_ok=True)  # it must not pass for this run's report
    try:
        yield
    except HandsignsError as error:
        run.end("failed", str(error))
    except OSError as error:
        place = f"'{error.filename or project.artifacts}' ({error.strerror or error})"
        room = "Make room or give permission, and run again."
        run.end("failed", f"The system refused an operation on {place}. {room}")
    except BaseException as error:
        name = type(error).__name__
        if name in ("KeyboardInterrupt", "TerminationSignal"):  # Ctrl-C, and Prefect's SIGTERM
            run.end("cancelled", "Interrupted. Nothing was lost; run again to continue.")
        elif type(error).__module__.startswith(("httpx", "prefect")):
            run.end("failed", f"Prefect {prefect_failure(error)}")
        else:
            run.end("failed", f"{name}: {error}")
            raise
    finally:
        run.report.seconds["total"] = time.time() - run.started
        write_report(run.report, project)
        if not run.logged:
            log_run(run.report, project)
        run.logged = True


def _notify(run: Run, error: Exception) -> None:
    """Notify people of what failed outside of the flow; an outcome of the flow stands."""
    from flows.ui import notify_people

    title, reason = "retrain failed before it began", str(error) or type(error).__name__
    if run.report.reason:
        title = "Prefect failed at the end of a retrain"
        _log.warning("%s: %s", title, reason)
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


def preflight(workspace: Workspace) -> None:
    """Refuse a retrain that cannot end well, before anything is started or changed."""
    load_params(workspace.project.params)
    workspace.trust.check_signer()
    check_reachable(workspace.settings)
    workspace.pipeline.stages()
    if problem := read_revision(workspace.project.root).problem:
        _log.warning("Releases of this run name no commit and cannot be rebuilt: %s.", problem)


def find_unchanged(workspace: Workspace) -> RunReport | None:
    """Return an `unchanged` report if a run would come to the same end as the last one."""
    project, pipeline = workspace.project, workspace.pipeline
    version, known = pipeline.data_version(), read_json(project.local / LAST_RUN)
    try:
        report = RunReport.model_validate(known["report"])
    except (TypeError, KeyError, ValidationError):  # none, or of another version of this program
        return None
    if known.get("inputs") != _inputs(workspace) or report.data.version != version:
        return None
    if not project.data.is_dir() or pipeline.changed():
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
    ours = not (settings.mlflow_tracking_uri or settings.database_url)
    if ours and not (registry.exists() and registry.read_bytes().startswith(b"SQLite format 3\0")):
        return False
    if settings.s3_endpoint_url is None and not workspace.alias_pending.exists():
        return True
    return workspace.champion() is not None and workspace.repair_alias()


def save_last_run(workspace: Workspace, report: RunReport) -> None:
    """Remember how a run ended, for `find_unchanged`; log, don't raise, if that fails."""
    content = {"inputs": _inputs(workspace), "report": report.model_dump(mode="json")}
    try:
        write_json(workspace.project.local / LAST_RUN, content)
    except OSError as error:
        _log.warning("The next run will not know that nothing changed (%s).", error)


def _inputs(workspace: Workspace) -> dict[str, Any]:
    """What a run is made of and where its results go, without any secret."""
    settings, running = workspace.settings, find_running(workspace.project.local.resolve())
    # Runs of the worker of `up` do not know the database; both name the same one.
    database = settings.database_url and settings.database_url.get_secret_value()
    registry = settings.mlflow_tracking_uri or running.get("database") or database
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


def _run_flow(run: Run) -> None:
    services = run.workspace.services
    api = services.prefect(wait=False)
    # Imported while the server starts, one after the other: modules that two threads
    # import at once can see each other half made.
    import tensorflow  # noqa: F401

    from tasks.services.mlflow import load_mlflow

    load_mlflow()

    token = command.set(run)
    try:
        with _prefect_client(run.workspace, api):
            from flows.retrain import retrain

            services.prefect()
            retrain(force=run.force, return_state=True)
    finally:
        command.reset(token)


def show_move(workspace: Workspace, move: Move) -> None:
    """Show a move that was made as a flow run, where a Prefect server is named."""
    api = workspace.services.prefect_named()
    if api is None:
        return
    try:
        with _prefect_client(workspace, api), asking_prefect(api):
            from flows.promotion import record_move

            record_move(workspace, move)
    except ServiceError as error:
        _log.warning("%s Its UI lacks this move.", error)


@contextmanager
def _prefect_client(workspace: Workspace, api: str) -> Iterator[None]:
    """Run a flow within the block, in which Prefect's client knows its server."""
    point_prefect_at(api, workspace.services.folder, workspace.settings)
    # The terminal shows progress; the UI has the log.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    from prefect import tags
    from prefect.logging.handlers import APILogWorker

    try:
        with tags(TAG):
            yield
    finally:
        APILogWorker.drain_all(timeout=5)  # the last lines, before the server stops

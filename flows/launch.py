"""Start a flow from the command line: with its own Prefect server if none is named."""

import logging
import os

from flows.local.servers import TAG, advice, point_prefect_at
from flows.local.stack import check_reachable, embedded
from flows.notify import notify_people
from flows.report import ModelReport, RunReport, unchanged_since
from flows.retrain import check_policy, holder, retrain_lock
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import HandsignsError, ServiceError
from tasks.io import read_json
from tasks.params import load_params
from tasks.stage import Progress

_log = logging.getLogger(__name__)


def launch_retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    """Run the retrain flow, unless there is nothing to do.

    Whether there is nothing to do is found out before any server or TensorFlow is
    loaded.

    Args:
        workspace: the checkout.
        force: run every stage.
        progress: told how far long stages are.

    Returns:
        What `run.json` says; also when the run failed.
    """
    with retrain_lock(workspace.project) as alone:
        if not alone:
            return _other_runs(workspace)
        return _retrain(workspace, force, progress)


def _retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    project, settings = workspace.project, workspace.settings
    # A report of an earlier run must not pass for one of this.
    project.run.unlink(missing_ok=True)
    try:
        load_params(project.params)
        if not force and (found := _unchanged(workspace)):
            found.write(project)
            return found
        workspace.trust.check_signer()
        with embedded(settings, project) as services:
            check_policy(services)
        check_reachable(settings)
        _run_flow(workspace, force, progress)
    except HandsignsError as error:
        left = read_json(project.run)
        if left and left["status"] != "failed":  # the flow was through when its server failed
            _log.warning(str(error))
            notify_people(settings, "handsigns: Prefect failed at the end of a retrain", str(error))
        else:
            _failed(settings, str(error)).write(project)
            when = "" if left else " before it began"
            notify_people(settings, f"handsigns: retrain failed{when}", str(error))
    return RunReport.model_validate_json(project.run.read_bytes())


def _failed(settings: Settings, reason: str) -> RunReport:
    return RunReport(status="failed", reason=reason, model=ModelReport(name=settings.model_name))


def _other_runs(workspace: Workspace) -> RunReport:
    """What is told and not written: `run.json` is the other one's."""
    return _failed(
        workspace.settings,
        f"Another retrain of this checkout runs. Received: {holder(workspace.project)}. "
        "Let it end, or cancel it, and run again.",
    )


def _unchanged(workspace: Workspace) -> RunReport | None:
    if workspace.settings.inbox and _has_news(workspace):
        return None
    return unchanged_since(workspace)


def _has_news(workspace: Workspace) -> bool:
    # Reading photos takes libraries that a run without an inbox need not wait for here.
    from flows.retrain import look

    with embedded(workspace.settings, workspace.project, share=True) as services:
        inbox = look(workspace, services)
    return bool(inbox and inbox.new)


def _run_flow(workspace: Workspace, force: bool, progress: Progress) -> None:
    project = workspace.project
    with embedded(workspace.settings, project) as services:
        point_prefect_at(services.start_prefect(), services.folder, workspace.settings)
        # The terminal shows progress; the UI has the whole log.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        # Imported while the server starts, one after the other: modules that two threads
        # import at once can see each other half made.
        import tensorflow  # noqa: F401
        from prefect import tags
        from prefect.logging.handlers import APILogWorker

        from flows.retrain import listener, retrain
        from tasks.services.mlflow import load_mlflow

        load_mlflow()
        api = services.prefect()
        token = listener.set(progress)
        try:
            # The flow keeps its own failures; what is raised here is the server's.
            with tags(TAG):
                retrain(force=force, return_state=True)
        except Exception as error:
            raise ServiceError(
                f"Prefect failed ({type(error).__name__}). Received: {api}. "
                f"{advice(error)}, then run again."
            ) from error
        finally:
            listener.reset(token)
            # The last lines must reach the server before it stops.
            APILogWorker.drain_all(timeout=5)

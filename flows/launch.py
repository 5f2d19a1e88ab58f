"""Start a flow from the command line: with its own Prefect server if none is named."""

import os
import threading

from flows.local import check_reachable, embedded
from flows.record import unchanged_since
from flows.report import RunReport
from flows.workspace import Workspace
from tasks.progress import Progress
from tasks.whole import read_json


def launch_retrain(workspace: Workspace, force: bool, progress: Progress) -> RunReport:
    """Run the retrain flow, unless there is nothing to do.

    Whether there is nothing to do is found out before any server or TensorFlow is
    loaded.

    Args:
        workspace: the checkout.
        force: run every stage.
        progress: told how far long stages are.

    Returns:
        What `run.json` says.

    Raises:
        ServiceError: a service does not answer.
    """
    layout, settings = workspace.layout, workspace.settings
    if not force and (found := unchanged_since(layout, settings, workspace.pipeline)):
        found.write(layout)
        return found
    check_reachable(settings)
    with embedded(settings, layout) as services:
        services.start_prefect()
        # While the server starts, so that training does not wait for it.
        threading.Thread(target=_import_tensorflow, daemon=True).start()
        _point_prefect_at(services.prefect(), layout.local.resolve() / "prefect")
        from prefect.logging.handlers import APILogWorker

        from flows.retrain import listener, retrain

        token = listener.set(progress)
        try:
            retrain(force=force, return_state=True)
        finally:
            listener.reset(token)
            # The last lines must reach the server before it stops.
            APILogWorker.drain_all(timeout=5)
    return RunReport.model_validate(read_json(layout.run))


def _point_prefect_at(api: str, home: "os.PathLike[str]") -> None:
    """Prefect reads its settings from the environment when it is first imported."""
    os.environ["PREFECT_API_URL"] = api
    os.environ.setdefault("PREFECT_HOME", str(home))
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    # The terminal shows progress; the UI has the whole log.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")


def _import_tensorflow() -> None:
    import tensorflow  # noqa: F401

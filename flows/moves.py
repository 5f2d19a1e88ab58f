"""Move the champion from the command line.

Where a Prefect server is there the move is a flow run, so that the UI shows who did
it. None is started for it, and one that does not answer, does not let us in, or fails, is
gone without: to take a bad champion back must wait for nothing but storage and registry.
"""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from flows.local.servers import TAG, advice, ask, point_prefect_at
from flows.workspace import Workspace
from tasks.errors import PromotionError
from tasks.releases.pointer import Move
from tasks.services.s3 import redact_url

if TYPE_CHECKING:
    from flows.promotion import Course

_log = logging.getLogger(__name__)


def promote(workspace: Workspace, version: int, reason: str, force: bool) -> Move:
    """Make a version the champion; see `tasks.releases.champion.promote`."""

    def through_prefect() -> None:
        from flows.promotion import promote as flow

        flow(version=version, reason=reason, force=force, return_state=True)

    return _move(workspace, through_prefect, lambda: workspace.promote(version, reason, force))


def rollback(workspace: Workspace, reason: str, expected: str | None = None) -> Move:
    """Return to the champion before; see `tasks.releases.champion.rollback`."""

    def through_prefect() -> None:
        from flows.promotion import rollback as flow

        flow(reason=reason, expected=expected or "", return_state=True)

    return _move(workspace, through_prefect, lambda: workspace.rollback(reason, expected=expected))


def _move(
    workspace: Workspace, through_prefect: Callable[[], None], directly: Callable[[], Move]
) -> Move:
    api = workspace.services.prefect_named()
    if api is None:
        return directly()
    if ask(f"{api}/health", seconds=3.0) is None:
        _log.warning("Prefect does not answer at %s; its UI will not show this.", redact_url(api))
        return directly()
    point_prefect_at(api, workspace.services.folder, workspace.settings)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    course = _watched(api, through_prefect)
    if course.refused:
        raise course.refused
    if course.begun and course.made is None:
        raise PromotionError(
            "Whether the champion moved is not known: the flow ended before it could say so. "
            f"Received: a run at {redact_url(api)}. "
            "Look at `handsigns status` before you run again."
        )
    return course.made or directly()


def _watched(api: str, flow: Callable[[], None]) -> "Course":
    """Run a flow that says itself how far it came, whatever becomes of Prefect meanwhile."""
    from prefect import tags
    from prefect.logging.handlers import APILogWorker

    from flows.promotion import Course, course

    watched = Course()
    token = course.set(watched)
    try:
        with tags(TAG):
            flow()
    except Exception as error:  # the client's, of many kinds; the flow keeps those of the move
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        said = "Prefect cannot be used at %s (%s), so that its UI does not show all of this. %s."
        _log.warning(said, redact_url(api), status, advice(error))
    finally:
        course.reset(token)
        APILogWorker.drain_all(timeout=5)
    return watched

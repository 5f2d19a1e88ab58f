"""Move the champion from the command line.

Where a Prefect server is there the move is a flow run, so that the UI shows who did
it. None is started for it, and one that does not answer, or does not let us in, is gone
without: to take a bad champion back must not wait for anything but storage and registry.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from flows.client import point_prefect_at
from flows.loopback.servers import ask
from flows.workspace import Workspace
from tasks.errors import PromotionError
from tasks.releases.pointer import Move
from tasks.services.addresses import shown

_log = logging.getLogger(__name__)


def promote(workspace: Workspace, version: int, reason: str, force: bool) -> Move:
    """Make a version the champion; see `tasks.releases.champion.promote`."""
    if not _through_prefect(workspace):
        return workspace.promote(version, reason, force)
    from flows.promotion import promote as flow

    return _run(lambda: flow(version=version, reason=reason, force=force, return_state=True))


def rollback(workspace: Workspace, reason: str) -> Move:
    """Return to the champion before; see `tasks.releases.champion.rollback`."""
    if not _through_prefect(workspace):
        return workspace.rollback(reason)
    from flows.promotion import rollback as flow

    return _run(lambda: flow(reason=reason, return_state=True))


def _through_prefect(workspace: Workspace) -> bool:
    api = workspace.services.prefect_named()
    if api is None:
        return False
    if ask(f"{api}/health", seconds=3.0) is None:
        _log.warning("Prefect does not answer at %s; its UI will not show this.", shown(api))
        return False
    point_prefect_at(api, workspace.services.folder, workspace.settings)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    return _lets_us_in(api)


def _lets_us_in(api: str) -> bool:
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except httpx.HTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        _log.warning(
            "Prefect refuses us at %s (%s); its UI will not show this. "
            "Its login is set by PREFECT_API_AUTH_STRING.",
            shown(api),
            status,
        )
        return False
    return True


def _run(flow: Callable[[], Any]) -> Move:
    from prefect.logging.handlers import APILogWorker

    try:
        state = flow()
    finally:
        APILogWorker.drain_all(timeout=5)
    if not state.is_completed():
        raise PromotionError(str(state.message))
    return Move.model_validate(state.result())

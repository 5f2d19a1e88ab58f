"""Notifications of runs that ended badly."""

import logging
import socket
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client

from flows.settings import Settings, load_settings
from tasks.errors import SettingsError
from tasks.services.notify import notify

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import Flow as KnownFlow
    from prefect.client.schemas.objects import FlowRun, State

UNHEARD = "Nothing was heard of this run"
"""Start of the message of a state that the crash automations set."""

_log = logging.getLogger(__name__)


def notify_people(settings: Settings, title: str, reason: str, link: str | None = None) -> bool:
    """Send a message to the addresses in `HANDSIGNS_NOTIFY_URLS`; whether all of them took it."""
    if settings.notify_urls is None:
        return False
    where = link or f"Look at artifacts/run.json on {socket.gethostname()}."
    return notify(settings.notify_urls.get_secret_value(), title, f"{reason}\n{where}")


def notify_bad_end(
    flow: "Flow[..., Any] | KnownFlow", flow_run: "FlowRun", state: "State[Any]"
) -> None:
    """Prefect's hook for a run that failed, was rejected, or crashed.

    The run's own process calls it, the worker if that process was killed, or
    `notify_crash` if the worker is gone too.
    """
    from prefect.utilities.urls import url_for

    try:
        settings = load_settings()
    except SettingsError as error:
        _log.warning("No notification was sent: %s", error)
        return
    ended = (state.name or state.type.value).lower()
    reason = state.message or "No reason was given."
    notify_people(settings, f"handsigns: {flow.name} {ended}", reason, url_for(flow_run))


@flow(name="notify-crash", flow_run_name="notify of {run}")
def notify_crash(run: str) -> None:
    """Send the notification for a run that is marked as crashed.

    Args:
        run: The run's resource, `prefect.flow-run.<id>`.
    """
    with get_client(sync_client=True) as client:
        crashed = client.read_flow_run(UUID(run.rpartition(".")[2]))
        silent = client.read_flow(crashed.flow_id)
    # A heartbeat that overtakes a run's last state sets the automations off as well; such a
    # run has said itself how it ended.
    state = crashed.state
    if state and state.is_crashed() and (state.message or "").startswith(UNHEARD):
        notify_bad_end(silent, crashed, state)

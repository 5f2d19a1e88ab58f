"""What a process needs to know before it first imports Prefect."""

import os
from collections.abc import MutableMapping
from pathlib import Path

from flows.loopback.credentials import prefect_login
from flows.loopback.proxy import spare_loopback
from flows.settings import Settings

TAG = "handsigns"
"""Our runs have it on a server that may have others; `prefect.yaml` gives it to deployments."""
HEARTBEAT_SECONDS = 30
"""The least that Prefect takes; see `flows.deployment.deploy` for what silence means."""


def point_prefect_at(
    api: str, folder: Path, settings: Settings, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Let a process, by default this one, talk to one Prefect server.

    Args:
        api: URL of its API.
        folder: the checkout's `.local/`; Prefect's folder is below, where the environment
            names none.
        settings: says whether the server is a person's own, whose credentials the
            environment then holds.
        environment: changed in place.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # Prefect makes its own folder only
    environment["PREFECT_API_URL"] = api
    environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environment.setdefault("PREFECT_HOME", str(folder / "prefect"))
    environment.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    environment.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "flows,tasks")
    # Two tries more for each question: a server that is gone is asked several before a
    # run can end, and with Prefect's own default each would wait for more than a minute.
    environment.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")
    if settings.prefect_api_url is None:
        environment["PREFECT_API_AUTH_STRING"] = prefect_login(settings, folder)
    spare_loopback(environment)


def advice(error: Exception) -> str:
    """What to do about a Prefect that failed, without a full stop.

    Args:
        error: what its client raised.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "It lets nobody in without a login: set PREFECT_API_AUTH_STRING to user:password"
    return "Look at its log"

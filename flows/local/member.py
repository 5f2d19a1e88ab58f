"""One line of the Procfile: `python -m flows.local.member NAME` keeps one part up.

It starts the part, starts it again whenever that ends by itself, and stops it, with all
that it started, on SIGTERM. `flows.local.up` has chosen ports and made databases before.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flows.local import servers
from flows.local.credentials import prefect_login
from flows.local.parent_bound import BUSY, kept
from flows.local.proxy import spare_loopback
from flows.local.servers import Server, known_ports, point_prefect_at
from flows.local.stack import configured_s3, find_running
from flows.settings import Settings, load_settings
from tasks.errors import BusyError, HandsignsError
from tasks.project import Project
from tasks.services.s3 import S3Address

POOL = "handsigns"
PORTS = {"seaweedfs": servers.SEAWEEDFS_PORTS, "mlflow": 1, "prefect": 1}
"""How many ports each part listens on; the worker listens on none."""
LONGEST_PAUSE = 30.0
"""Seconds between two starts of a part that ends again and again."""
LONG_SECONDS = 300.0
"""A part that lived for so long does not end again and again."""
PATIENCE = 30.0

_log = logging.getLogger(__name__)


def seaweedfs(settings: Settings, folder: Path) -> tuple[Server, S3Address]:
    """The local S3 server on the ports that were chosen for it."""
    ports = known_ports(folder, "seaweedfs")
    return servers.seaweedfs(folder, settings.bucket, PATIENCE, ports)


def mlflow(settings: Settings, folder: Path) -> tuple[Server, str]:
    """The local MLflow server; its files go to the S3 that is configured, or the local one."""
    configured = settings.s3_endpoint_url is not None
    store = configured_s3(settings) if configured else seaweedfs(settings, folder)[1]
    return servers.mlflow(
        folder,
        PATIENCE,
        store,
        configured=configured,
        ports=known_ports(folder, "mlflow"),
        database=_database(settings, "mlflow"),
    )


def prefect(settings: Settings, folder: Path) -> tuple[Server, str]:
    """The local Prefect server."""
    return servers.prefect(
        folder,
        PATIENCE,
        prefect_login(settings, folder),
        host=settings.host,
        ports=known_ports(folder, "prefect"),
        database=_database(settings, "prefect"),
    )


def worker(settings: Settings, folder: Path, api: str) -> Server:
    """The worker; flow runs inherit what it knows, so it knows no database.

    Args:
        settings: from the environment.
        folder: the checkout's `.local/`.
        api: URL of Prefect's API.
    """
    environment = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("PREFECT_SERVER_", "PREFECT_API_DATABASE_"))
        and name not in ("DATABASE_URL", "HANDSIGNS_HOST")
    }
    point_prefect_at(api, folder, settings, environment)
    return servers.worker(folder, PATIENCE, POOL, environment)


def keep_up(describe: Callable[[], Server], leave: threading.Event) -> None:
    """Keep a server up until `leave` is set.

    Args:
        describe: gives the server, not started yet; called for each start.
        leave: set by a signal handler.

    Raises:
        BusyError: another run of the checkout has the server.
    """
    pause, was_up = 1.0, False
    while not leave.is_set():
        server = describe()
        process = server.start()
        began = time.monotonic()
        try:
            while process.poll() is None and not leave.wait(0.2):
                pass
        finally:
            server.stop()
        if leave.is_set():
            return
        if process.returncode == BUSY:
            # One that had been up ended, and somebody was faster: it is kept up once they go.
            if not was_up:
                raise BusyError(f"The local {server.name} server belongs to another run.")
            continue
        was_up = True
        if time.monotonic() - began > LONG_SECONDS:
            pause = 1.0
        before = kept(server.log)
        _log.warning("%s ended; see %s. It starts again in %.0f s.", server.name, before, pause)
        leave.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def main(name: str) -> int:
    """Keep one part up; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave.set())
    folder = Project(Path.cwd()).local.resolve()
    spare_loopback()
    try:
        settings = load_settings()
        keep_up(lambda: _describe(name, settings, folder, leave), leave)
    except HandsignsError as error:
        _log.error(str(error))
        return 1
    return 0


def _describe(name: str, settings: Settings, folder: Path, leave: threading.Event) -> Server:
    if name == "seaweedfs":
        return seaweedfs(settings, folder)[0]
    if name == "mlflow":
        return mlflow(settings, folder)[0]
    if name == "prefect":
        return prefect(settings, folder)[0]
    # Its runs would start servers of their own as long as the others are not known.
    while (running := find_running(folder)) is None and not leave.wait(0.2):
        pass
    api = settings.prefect_api_url or (running and running.prefect)
    return worker(settings, folder, str(api))


def _database(settings: Settings, name: str) -> str | None:
    if settings.database_url is None:
        return None
    from flows.local.servers import database_url

    return database_url(settings.database_url.get_secret_value(), name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

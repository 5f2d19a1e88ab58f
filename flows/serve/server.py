"""Listen on an address and run the service until it is stopped."""

import ipaddress
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from flows.local.stack import SharedStorage
from flows.serve.follower import Follower, LoadedModel, ModelSource, StaticModel
from flows.workspace import Workspace
from tasks.errors import ServiceError, SettingsError

CONNECTIONS = 4096
"""Open connections, idle ones included; beyond it new ones get 503."""
SPARE_FILES = 256
"""Open files kept for everything but connections."""


@dataclass(frozen=True)
class Listening:
    """A bound socket, its URL, and the names of a loopback address that has no token."""

    socket: socket.socket
    url: str
    hosts: frozenset[str] | None


@contextmanager
def listen(host: str, port: int, token: bool) -> Iterator[Listening]:
    """Bind an address for as long as the block lasts.

    Args:
        host: name or address.
        port: 0 for any free one.
        token: whether clients must send a token.

    Raises:
        SettingsError: others could reach the address, and no token is set.
        ServiceError: the address cannot be bound.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if not token and not ipaddress.ip_address(address[0]).is_loopback:
            raise SettingsError(
                f"Others can reach {host}, so HANDSIGNS_SERVE_TOKEN must be set. "
                "Set it to 16 or more characters, or use --host 127.0.0.1."
            )
        bound = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise ServiceError(
            f"Cannot listen on {host}:{port}: {reason}. Choose another --host or --port."
        ) from None
    with bound:
        found, number = bound.getsockname()[:2]
        shown = f"[{found}]" if ":" in found else found
        hosts = None if token else frozenset({"127.0.0.1", "::1", "localhost", host.lower()})
        yield Listening(bound, f"http://{shown}:{number}", hosts)


def open_source(workspace: Workspace, model: str) -> ModelSource:
    """Load the model that a person named; the champion is followed."""
    if model != "champion":
        with workspace:
            return StaticModel(LoadedModel(*workspace.classifier(model)))
    project, settings = workspace.project, workspace.settings
    shared = SharedStorage(settings, project, workspace.trust)
    follower = Follower(shared.opened, project.releases, settings.serve_follow_seconds)
    follower.start()
    return follower


def run_service(service: ASGIApp, listening: Listening) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in progress get 10 s to finish.

    Uvicorn limits neither how long a client takes to send a request's head nor how many
    connections one client opens. A reverse proxy does, and anything wider than loopback
    belongs behind one.
    """
    config = uvicorn.Config(
        service,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Anyone can send X-Forwarded-For; only proxies that are named may.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        limit_concurrency=_connection_limit(),
        h11_max_incomplete_event_size=16 * 1024,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
    )
    # Uvicorn raises the signal again once it has stopped; that must not end the process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening.socket])


def _connection_limit() -> int:
    """Raise the limit of open files as far as needed and allowed; return the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = CONNECTIONS + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(files - SPARE_FILES, files // 4)

"""Listen, answer, and stop when told to."""

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from tasks.errors import ServiceError, SettingsError

CONNECTIONS = 256
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Listening:
    """A bound socket, and how to reach it."""

    socket: socket.socket
    url: str


@contextmanager
def listen(host: str, port: int, guarded: bool) -> Iterator[Listening]:
    """Bind an address for as long as the block lasts.

    Args:
        host: name or address.
        port: 0 for any free one.
        guarded: clients are asked for a token.

    Raises:
        SettingsError: others could reach it, and nothing is asked of them.
        ServiceError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if not guarded and not ipaddress.ip_address(address[0]).is_loopback:
            raise SettingsError(
                f"Others can reach this address, so HANDSIGNS_SERVE_TOKEN must be set. Received: "
                f"--host {host}. Set it to 16 or more characters, or listen on 127.0.0.1."
            )
        bound = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or "no host's name"
        raise ServiceError(
            f"The address cannot be listened on ({said}). Received: "
            f"{host}:{port}. Choose another one with --host and --port."
        ) from None
    with bound:
        found, number = bound.getsockname()[:2]
        shown = f"[{found}]" if ":" in found else found
        yield Listening(bound, f"http://{shown}:{number}")


def run_service(service: ASGIApp, listening: Listening) -> None:
    """Answer until SIGTERM or Ctrl-C; requests under way are finished within 10 s."""
    import os

    import uvicorn

    from flows.service.serve_patience import Impatient

    # Its own lines go where the rest of the log goes, and only when something is wrong.
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(sys.stderr))
    config = uvicorn.Config(
        service,
        http=Impatient,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        # Whoever sends X-Forwarded-For could take any address; only named proxies may.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
    )
    # Once it has stopped, uvicorn raises the signal again for whoever else waits for it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening.socket])

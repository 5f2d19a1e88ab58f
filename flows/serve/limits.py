"""Who may ask the service, how often, and how much."""

import asyncio
import ipaddress
import logging
import math
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tasks.errors import ServiceError, SettingsError
from tasks.model.inference import usable_cores

QUEUE = 32
"""Photos that may wait or be worked on; with 16 connections it is never full."""

Result = TypeVar("Result")


class Admission:
    """Check a client's token and rate.

    Args:
        rate: such as `600/minute`, for each client's address.
        token: what `Authorization: Bearer` must carry; None lets everybody in.
    """

    def __init__(self, rate: str, token: str | None) -> None:
        self._rate, self._token = parse(rate), token
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def check(self, request: Request) -> None:
        """Raise what the client is answered if it may not ask now.

        Raises:
            HTTPException: 429 with Retry-After, or 401.
        """
        client = _client(request)
        if not self._limiter.hit(self._rate, client):
            free_at = self._limiter.get_window_stats(self._rate, client).reset_time
            wait = max(1, math.ceil(free_at - time.time()))
            raise HTTPException(
                429,
                f"Too many requests: more than {self._rate}. Wait {wait} s.",
                {"Retry-After": str(wait)},
            )
        if not self.knows(request):
            raise HTTPException(
                401,
                "This service asks for a token. Send it as 'Authorization: Bearer TOKEN'.",
                {"WWW-Authenticate": "Bearer"},
            )

    def knows(self, request: Request) -> bool:
        """Tell whether the client has the token, or none is needed."""
        if self._token is None:
            return True
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        fits = secrets.compare_digest(given.strip().encode(), self._token.encode())
        return fits and kind.lower() == "bearer"


class Desk:
    """Threads that score photos, as many as there are cores, and a bounded queue."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(usable_cores(), "score")
        self.waiting = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do `work` in a thread.

        Raises:
            HTTPException: 503 with Retry-After when the queue is full.
        """
        if self.waiting >= QUEUE:
            raise HTTPException(
                503, "Too many photos are waiting. Try again in a second.", {"Retry-After": "1"}
            )
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Forget what waits; what is being worked on is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _client(request: Request) -> str:
    """The address, or for IPv6 the network that one subscriber has."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network(f"{address}/64", strict=False))


REQUEST_SECONDS = 10.0
"""How long a connection may take until the head of a request, the first or another, is there."""


class Impatient(H11Protocol):
    """Uvicorn's protocol, which by itself waits for a first request, or half a one, without end."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience:
            self._patience.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._patience:
            self._patience.cancel()
        self._patience = self.loop.call_later(REQUEST_SECONDS, self._leave)

    def _leave(self) -> None:
        # One that is under way has limits of its own, and comes back here.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


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

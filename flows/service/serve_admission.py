"""Who may ask for a prediction, how often, and how many at once."""

import asyncio
import ipaddress
import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tasks.network.engine import usable_cores

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

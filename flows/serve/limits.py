"""Who may use the service, how often, and with how much data."""

import asyncio
import ipaddress
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.model.inference import usable_cores

IN_FLIGHT = 128
"""Photos that may be uploaded, queued or scored at once; bounds the memory they take."""
LINGER_SECONDS = 2.0
"""How long an early answer waits for the rest of the body."""
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Observe = Callable[[str, str, int, float], None]
"""Called with method, path, status and seconds of each request."""
Credentials = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="HANDSIGNS_SERVE_TOKEN, where it is set.")),
]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """How the service treats its clients.

    Args:
        rate: such as `600/minute`, for each client address.
        max_bytes: of a request's body.
        token: expected of every client that wants a prediction; None for none.
        hosts: names under which the service may be addressed; None for any.
    """

    rate: str = "600/minute"
    max_bytes: int = 10 * 2**20
    token: str | None = None
    hosts: frozenset[str] | None = None


class Admission:
    """Check the token and the rate of a client."""

    def __init__(self, limits: Limits) -> None:
        self._rate, self._token = parse(limits.rate), limits.token
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def check(self, request: Request, credentials: Credentials) -> None:
        """Let a client in, or raise 401, or 429 with Retry-After."""
        # Wrong tokens are counted apart, so that they cannot use up the right client's rate.
        known = self.accepts(credentials)
        bucket = (_client_network(request), "known" if known else "unknown")
        if not self._limiter.hit(self._rate, *bucket):
            free_at = self._limiter.get_window_stats(self._rate, *bucket).reset_time
            wait = max(1, math.ceil(free_at - time.time()))
            raise HTTPException(
                429,
                f"Too many requests: more than {self._rate}. Wait {wait} s.",
                {"Retry-After": str(wait)},
            )
        if not known:
            raise HTTPException(
                401,
                "This service asks for a token. Send it as 'Authorization: Bearer TOKEN'.",
                {"WWW-Authenticate": "Bearer"},
            )

    def accepts(self, credentials: HTTPAuthorizationCredentials | None) -> bool:
        """Whether the client sent the right token, or none is expected."""
        if self._token is None:
            return True
        sent = credentials.credentials if credentials else ""
        return secrets.compare_digest(sent.encode(), self._token.encode())


def _client_network(request: Request) -> str:
    """The client's address; for IPv6 the /64 network that one subscriber has."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network(f"{host}/64", strict=False))


class ScoringPool:
    """Threads that score photos, one per core; large photos share one more thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(usable_cores(), "score")
        self._large = ThreadPoolExecutor(1, "large")
        self.in_flight = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the `IN_FLIGHT` places, or raise 503 with Retry-After."""
        if self.in_flight >= IN_FLIGHT:
            raise HTTPException(
                503, "Too many photos are waiting. Try again in a second.", {"Retry-After": "1"}
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def run(self, work: Callable[[], Result], large: bool = False) -> Result:
        """Call `work` in a thread; large ones run one after the other."""
        threads = self._large if large else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def close(self) -> None:
        """Drop queued work; work in progress finishes."""
        for threads in (self._threads, self._large):
            threads.shutdown(wait=False, cancel_futures=True)


class Boundary:
    """Outermost layer: hosts, body size, security headers, metrics.

    A body is refused by its declared length before a byte is read, otherwise at the first
    byte too many. An answer before the end of the body gives the sender a moment to finish:
    cut off, most clients would report a broken connection instead of the answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits, observe: Observe) -> None:
        self._app, self._limits, self._observe = app, limits, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        exchange = _Exchange(scope, receive, send, self._limits.max_bytes)
        refusal = foreign_origin(Headers(scope=scope), self._limits.hosts)
        app = JSONResponse({"error": refusal}, 403) if refusal else self._app
        try:
            await app(scope, exchange.receive, exchange.send)
        finally:
            seconds = time.perf_counter() - started
            self._observe(scope["method"], scope["path"], exchange.status, seconds)


def foreign_origin(headers: Headers, hosts: frozenset[str] | None) -> str | None:
    """Return why a request may come from another site's page, or None.

    A page elsewhere can let its name point to this machine (DNS rebinding), or post a
    form here; a service without a token would answer it.
    """
    if hosts is None:
        return None
    advice = f"Use {', '.join(sorted(hosts))}, or set HANDSIGNS_SERVE_TOKEN to allow any."
    host = headers.get("Host", "")
    if _hostname(f"//{host}") not in hosts:
        return f"This service does not answer to the host {host[:80]!r}. {advice}"
    origin = headers.get("Origin")
    if origin is not None and _hostname(origin) not in hosts:
        return f"This service does not answer pages of {origin[:80]!r}. {advice}"
    return None


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send, self._max = receive, send, max_bytes
        self._declared = int(headers.get("Content-Length", "0"))
        self._unread = self._declared > 0 or "Transfer-Encoding" in headers
        self._received = 0
        self.status = 500

    async def receive(self) -> Message:
        if self._declared <= self._max:
            message = await self._read()
            if self._received <= self._max:
                return message
        limit = self._max // 2**20
        raise HTTPException(413, f"The request is too large: more than {limit} MB. Send less.")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("Cache-Control", "no-store")
            if self._unread:
                headers["Connection"] = "close"
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _read(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._unread = bool(message.get("more_body", False))
        return message

    async def _linger(self) -> None:
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread and self._received <= 2 * self._max:
                    await self._read()
        except TimeoutError:
            pass

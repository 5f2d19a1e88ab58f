"""Where the service listens, who may use it, and how much at a time."""

import asyncio
import ipaddress
import math
import os
import resource
import secrets
import signal
import socket
import time
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from hypercorn.asyncio import serve
from hypercorn.config import Config
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from flows.settings import Settings
from tasks.errors import ServiceError, SettingsError

# A connection without a request, or with a part of its head only, is closed after so long.
IDLE_SECONDS = 5.0
# A body that nobody wants is read for so long.
READ_SECONDS = 2.0
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Credentials = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="HANDSIGNS_SERVE_TOKEN, where it is set.")),
]


class Limits:
    """Limits for each client: its rate, largest body, token, and the names it may use for us.

    Its checks are coroutines, as a thread for each would take longer than the check.
    """

    def __init__(self, settings: Settings, host: str) -> None:
        self.max_bytes, token = settings.serve_max_mb * 2**20, settings.serve_token
        self.token = token.get_secret_value() if token else None
        self._hosts = {"127.0.0.1", "::1", "localhost", host.lower()}
        self._rate = parse(settings.serve_rate)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def check(self, request: Request, credentials: Credentials) -> None:
        """Let a client in, or raise 401, or 429 with Retry-After."""
        # Wrong tokens are counted apart, so that they cannot use up the right client's rate.
        known = self.accepts(credentials)
        bucket = (request.client.host if request.client else "", "known" if known else "unknown")
        if not self._limiter.hit(self._rate, *bucket):
            free_at = self._limiter.get_window_stats(self._rate, *bucket).reset_time
            wait = max(1, math.ceil(free_at - time.time()))
            reason = f"Too many requests: more than {self._rate}. Wait {wait} s."
            raise HTTPException(429, reason, {"Retry-After": str(wait)})
        if not known:
            reason = "This service asks for a token. Send it as 'Authorization: Bearer TOKEN'."
            raise HTTPException(401, reason, {"WWW-Authenticate": "Bearer"})

    def accepts(self, credentials: HTTPAuthorizationCredentials | None) -> bool:
        """Whether the client sent the right token, or none is expected."""
        sent = credentials.credentials if credentials else ""
        return self.token is None or secrets.compare_digest(sent.encode(), self.token.encode())

    async def check_site(self, request: Request) -> None:
        """Refuse, with 403, what may come from another site's page, by DNS rebinding or a form."""
        for source in (f"//{request.headers.get('Host', '')}", *request.headers.getlist("Origin")):
            name = None
            with suppress(ValueError):
                name = urlsplit(source).hostname
            if self.token is None and name not in self._hosts:
                raise HTTPException(
                    403,
                    f"This service does not answer to {source.removeprefix('//')[:80]!r}. Use "
                    f"{', '.join(sorted(self._hosts))}, or set HANDSIGNS_SERVE_TOKEN to allow any.",
                )


def listen(host: str, port: int, anywhere: bool) -> tuple[socket.socket, str]:
    """Bind an address, which is one of loopback unless it may be `anywhere`; also its URL."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if not anywhere and not ipaddress.ip_address(address[0]).is_loopback:
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
    found, number = bound.getsockname()[:2]
    shown = f"[{found}]" if ":" in found else found
    return bound, f"http://{shown}:{number}"


def read_bodies(service: ASGIApp) -> ASGIApp:
    """Read the rest of a request's body, for a moment, before it is answered.

    Hypercorn closes a connection with unread bytes, and the client would never see the answer.
    """

    async def serve_one(scope: Scope, receive: Receive, send: Send) -> None:
        left = scope["type"] == "http"

        async def receive_part() -> Message:
            nonlocal left
            message = await receive()
            left = message.get("more_body", False)
            return message

        async def send_after(message: Message) -> None:
            if left:
                with suppress(TimeoutError):
                    async with asyncio.timeout(READ_SECONDS):
                        while left:
                            await receive_part()
            await send(message)

        await service(scope, receive_part, send_after)

    return serve_one


def run_service(service: Any, bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in progress get 10 s to finish."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    config = Config()
    config.bind = [f"fd://{os.dup(bound.fileno())}"]
    config.keep_alive_timeout = IDLE_SECONDS
    config.graceful_timeout = 10
    config.include_server_header = False
    config.loglevel = "WARNING"
    if trusted := os.environ.get("FORWARDED_ALLOW_IPS"):
        # Anyone can send X-Forwarded-For; only proxies that are named may.
        service = ProxyHeadersMiddleware(service, trusted)

    service = read_bodies(service)

    async def run() -> None:
        stopping = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await serve(service, config, shutdown_trigger=stopping.wait)

    asyncio.run(run())

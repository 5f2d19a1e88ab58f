"""What holds for every request: headers, sizes, and how an answer ends."""

import asyncio
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY = {
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
LINGER_SECONDS = 2.0
"""How long an answer that comes before the end of the body waits for that end."""

Observe = Callable[[str, str, int, float], None]
"""Told method, path, status and seconds of each request."""


class Guard:
    """Outermost layer of the service.

    Bodies are refused by their declared length before a byte is read, and otherwise at
    the byte that is too much. An answer that comes earlier than the body's end is sent
    whole and lets the sender finish for a moment: cut off, many would never read it.

    Args:
        app: what answers.
        max_bytes: of a body.
        observe: told of every request.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, observe: Observe) -> None:
        self._app, self._max, self._observe = app, max_bytes, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        exchange = _Exchange(scope, receive, send, self._max)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            spent = time.perf_counter() - began
            self._observe(scope["method"], scope["path"], exchange.status, spent)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        headers = dict(scope["headers"])
        self._receive, self._send, self._max = receive, send, max_bytes
        self._declared = int(headers.get(b"content-length", b"0"))
        self._unread = self._declared > 0 or b"transfer-encoding" in headers
        self._received = 0
        self.status = 500

    async def receive(self) -> Message:
        self._refuse_above(self._declared)
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._unread = bool(message.get("more_body", False))
        self._refuse_above(self._received)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
            if self._unread:
                headers["Connection"] = "close"
            await self._send(message)
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self._send(message)

    def _refuse_above(self, size: int) -> None:
        if size > self._max:
            raise HTTPException(
                413, f"The request is too large: more than {self._max // 2**20} MB. Send less."
            )

    async def _linger(self) -> None:
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread and self._received <= 2 * self._max:
                    message = await self._receive()
                    self._received += len(message.get("body", b""))
                    self._unread = bool(message.get("more_body", False))
        except TimeoutError:
            pass

"""Connections that ask nothing are let go, for they count among those that are served."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

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

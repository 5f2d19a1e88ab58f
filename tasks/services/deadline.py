"""One deadline for all that a question to a service takes, however slowly bytes trickle.

What HTTP clients call a timeout bounds each read, so a service that sends a byte a second
is waited for without end. Here a timer shuts the line once the time is over; who reads
from it then finds that it ended. It counts from the moment that the line is there: looking
up a name and a TLS handshake are left to the system's and the client's own timeouts.
"""

import contextlib
import socket
import threading
import time
from contextvars import ContextVar
from typing import Any, Self

SECONDS = 26.0
"""Three attempts that hang take 24 s and their pauses; these end them, and what trickles."""
BYTES_A_SECOND = 128 << 10
"""Each so many bytes that are moved give a second more: a slow line may take its time."""


class Deadline:
    """As a context, ends the connections that are used within it when time is over.

    Args:
        seconds: until then; `allow` adds to it.

    Attributes:
        passed: whether time was over before the block was.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
        self._lines: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        threading.Thread(target=self._expire, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        self._done.set()

    @property
    def told(self) -> str:
        """How long it was, in words."""
        return f"{self._seconds:.0f} s, and a second for each {BYTES_A_SECOND >> 10} KiB"

    def add(self, seconds: float) -> None:
        """Give more time."""
        self._ends += seconds

    def watch(self, line: socket.socket) -> None:
        """Shut this line too when time is over.

        Raises:
            TimeoutError: it is over already.
        """
        with self._lock:
            if self.passed:
                raise TimeoutError("no time is left")
            self._lines.add(line)

    def _expire(self) -> None:
        while not self._done.wait(max(0.0, self._ends - time.monotonic())):
            if time.monotonic() >= self._ends:
                break
        else:
            return
        with self._lock:
            self.passed = True
            for line in self._lines:
                with contextlib.suppress(OSError):  # it is closed already
                    line.shutdown(socket.SHUT_RDWR)


_current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def allow(size: int) -> None:
    """Give the deadline around the caller the time that these bytes may take."""
    if deadline := _current.get():
        deadline.add(size / BYTES_A_SECOND)


def heed_deadlines(pools: dict[str, type[Any]]) -> None:
    """Let connections end with the deadline around whoever uses them.

    Args:
        pools: urllib3's classes of pools by scheme; replaced by some that do.
    """
    for scheme, pool in pools.items():
        pools[scheme] = type(
            pool.__name__, (pool,), {"ConnectionCls": _heeding(pool.ConnectionCls)}
        )


def _heeding(connection: type[Any]) -> type[Any]:
    class Heeding(connection):  # type: ignore[misc]
        line: socket.socket | None = None

        def connect(self) -> None:
            super().connect()
            self.line = self.sock
            self._heed()

        def request(self, *words: Any, **options: Any) -> Any:
            self._heed()  # one that is used again does not connect
            return super().request(*words, **options)

        def _heed(self) -> None:
            deadline = _current.get()
            if deadline and self.line:
                deadline.watch(self.line)

    return Heeding

"""Tie one server's life to the run that started it.

`python -P parent_bound.py LOCK LOG SECONDS COMMAND…` waits at most SECONDS for LOCK,
runs COMMAND in a process group of its own with its output in LOG, and stops the
whole group once its own standard input closes. The kernel closes that pipe however
the run ends, SIGKILL included, so no server outlives its run; and because the lock
is held here, it is free exactly when the server is gone.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

BUSY = 75
"""Exit code when somebody else holds the lock; sysexits.h calls it EX_TEMPFAIL."""
POLL = 0.1
"""Seconds between two looks at the lock, the server and the wish to leave."""
GRACE = 4.0
"""Seconds that a server gets between SIGTERM and SIGKILL."""


def main(lock: str, log: str, seconds: str, *command: str) -> int:
    """Hold the lock and the server until one of the two ends.

    Args:
        lock: lock file of this server; beside it `<lock>.pid` names the run.
        log: file that takes the server's output.
        seconds: longest wait for the lock.
        command: the server and its arguments.

    Returns:
        `BUSY`, or 1 when the server ended by itself.
    """
    run = os.getppid()
    # Handlers only take note: one that raised could come between the start of the
    # server and the moment from which it is known, and leave it behind.
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())
    signal.signal(signal.SIGINT, lambda *_: leave.set())
    threading.Thread(target=_notice_abandonment, args=(leave,), daemon=True).start()
    held = FileLock(lock)
    deadline = time.monotonic() + float(seconds)
    while not leave.is_set():
        with contextlib.suppress(Timeout), held.acquire(timeout=POLL):
            Path(f"{lock}.pid").write_text(f"{run}\n", encoding="utf-8")
            _hold(command, Path(log), leave)
            return 1
        if time.monotonic() > deadline:
            return BUSY
    return 0


def kept(log: Path) -> Path:
    """Where a server's log is once it was started again: what it ended with is wanted then."""
    return log.with_name(f"{log.name}.1")


def _hold(command: tuple[str, ...], log: Path, leave: threading.Event) -> None:
    with contextlib.suppress(OSError):
        log.replace(kept(log))
    with log.open("wb") as output:
        try:
            server = subprocess.Popen(  # noqa: S603, the command comes from flows.local.servers
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError as error:
            output.write(str(error).encode())
            return
    try:
        while server.poll() is None and not leave.wait(POLL):
            pass
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE)
    # What the server left behind, or all of it if it did not listen.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _notice_abandonment(leave: threading.Event) -> None:
    while os.read(0, 1):
        pass
    leave.set()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Tie one server's life to the run that started it.

`python -P tether.py LOCK LOG SECONDS COMMAND…` waits at most SECONDS for LOCK,
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
from pathlib import Path

from filelock import FileLock, Timeout

BUSY = 75
"""Exit code when somebody else holds the lock; sysexits.h calls it EX_TEMPFAIL."""
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
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    threading.Thread(target=_leave_when_abandoned, daemon=True).start()
    try:
        with FileLock(lock, timeout=float(seconds)):
            Path(f"{lock}.pid").write_text(f"{run}\n", encoding="utf-8")
            _hold(command, Path(log))
    except Timeout:
        return BUSY
    return 1


def _hold(command: tuple[str, ...], log: Path) -> None:
    with log.open("wb") as output:
        try:
            server = subprocess.Popen(  # noqa: S603, the command comes from flows.servers
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
        server.wait()
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


def _leave(*_: object) -> None:
    # A second one must not cut the orderly stop short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(0)


def _leave_when_abandoned() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Run one local program for as long as somebody uses it.

`python -I -S supervisor.py` reads the program as JSON from standard input, so that no secret
shows in a list of processes. It starts the program, starts it again whenever it ends, and stops
it with all its children once no process holds `users.lock`; the kernel releases that lock
however its holder ends. Standard library only: it is up in 20 ms.
"""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

USERS = "users.lock"
"""Every process that uses local programs holds it, shared."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 4.0
"""Between SIGTERM and SIGKILL."""
LONGEST_PAUSE = 30.0
"""Seconds between two starts of a program that ends again and again."""
LONG_SECONDS = 300.0
"""A program that ran this long does not end again and again."""
LOG_BYTES = 20_000_000


def main() -> int:
    """Supervise the program that standard input describes; return the exit code."""
    program: dict[str, Any] = json.load(sys.stdin)
    folder, name = Path(program["folder"]), str(program["name"])
    lock = open_lock(folder / f"{name}.lock")
    if not _take(lock):
        return 1
    stop_group(folder, name)  # of a supervisor that was killed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
    with _open_log(folder / "logs" / f"{name}.log") as log:
        supervisor = Supervisor(program, folder, lock, log)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.told_to_stop.set())
        return supervisor.run()


class Supervisor:
    """Keeps one program up; others read its state in the lock, all but the environment."""

    def __init__(self, program: dict[str, Any], folder: Path, lock: int, log: BinaryIO) -> None:
        self.told_to_stop = threading.Event()
        self._environment = program.pop("environment")
        self._state = {**program, "pid": os.getpid(), "began": time.time(), "ends": 0}
        self._lock, self._log = lock, log
        self._users = open_lock(folder / USERS)
        if program["stays"]:
            fcntl.flock(self._users, fcntl.LOCK_SH)
        self._group = open_lock(folder / f"{program['name']}.group")
        fcntl.flock(self._group, fcntl.LOCK_EX)

    def run(self) -> int:
        """Start the program until it is unused; 1 where it cannot be started at all."""
        pause = 1.0
        while True:
            self._publish()
            began = time.monotonic()
            try:
                process = self._start()
            except OSError as error:
                self._log.write(f"{error}\n".encode())
                os.ftruncate(self._lock, 0)
                return 1
            try:
                while process.poll() is None:
                    if self._is_over():
                        return 0
                    time.sleep(POLL_SECONDS)
                    self._bound_log()
            finally:
                _stop(process)
            self._state["ends"] += 1
            self._publish()
            if time.monotonic() - began > LONG_SECONDS:
                pause = 1.0
            self._log.write(
                f"{self._state['name']} ended with status {process.returncode}; "
                f"it starts again in {pause:.0f} s.\n".encode()
            )
            due = time.monotonic() + pause
            while time.monotonic() < due:
                if self._is_over():
                    return 0
                time.sleep(POLL_SECONDS)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(  # noqa: S603, the command comes from flows.local
            self._state["command"],
            env=self._environment,
            cwd=self._state["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=(self._group,),  # which holds that lock for as long as it lives
        )
        _write(self._group, str(process.pid))
        return process

    def _publish(self) -> None:
        _write(self._lock, json.dumps(self._state))

    def _is_over(self) -> bool:
        """Whether to stop now; new users see it, and wait for the next supervisor."""
        if not self.told_to_stop.is_set():
            if self._state["stays"]:
                return False
            try:
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        os.ftruncate(self._lock, 0)
        fcntl.flock(self._users, fcntl.LOCK_UN)
        return True

    def _bound_log(self) -> None:
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:
            path = Path(self._log.name)
            shutil.copyfile(path, previous_log(path))
            os.ftruncate(self._log.fileno(), 0)


def open_lock(path: Path) -> int:
    """Open a lock file; programs that are started do not inherit it."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def previous_log(log: Path) -> Path:
    """Where the log of the start before is."""
    return log.with_name(f"{log.name}.1")


def stop_group(folder: Path, name: str) -> bool:
    """Stop a program whose supervisor is gone; tell whether there was one."""
    path = folder / f"{name}.group"
    if not path.exists():
        return False
    lock = open_lock(path)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _take(lock, 0):
                return number is signal.SIGKILL
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(os.pread(lock, 20, 0)), number)
            _take(lock, GRACE_SECONDS)
        return True
    finally:
        os.close(lock)


def _open_log(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        path.replace(previous_log(path))
    return path.open("ab", buffering=0)


def _take(lock: int, seconds: float = 2.0) -> bool:
    """Lock for this process alone; who only looks holds a lock for a moment, too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a program and whatever it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())

"""Local programs that several commands share: the first user starts one, the last one stops it."""

import fcntl
import hashlib
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from filelock import FileLock, Timeout

from flows.local import supervisor
from flows.local.supervisor import POLL_SECONDS, USERS, open_lock
from tasks.errors import BusyError, ServiceError, SettingsError
from tasks.io import read_json

GRPC = 10_000
"""SeaweedFS's gRPC port lies this far above each of its ports."""
RANGE = range(12_000, 22_000)
"""With `GRPC` added still below Linux's ephemeral ports, which outgoing connections take."""
OPEN_FILES = 256
"""SeaweedFS panics with half as many."""
START_SECONDS = 120.0
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Program:
    """A program that runs for as long as somebody uses it.

    Args:
        name: names its lock and its log.
        command: program and arguments; no secrets, since process lists show them.
        environment: all of its environment.
        ready: whether it does its work; must not raise.
        ports: what it listens on.
        url: where its clients reach it.
        variant: users share it only if this is equal.
        cwd: its working directory; the present one by default.
        stays: it counts as a user, so that it runs until it is stopped.
        about: what others can read in its state while it runs.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool]
    ports: tuple[int, ...] = ()
    url: str = ""
    variant: str = ""
    cwd: Path | None = None
    stays: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


class LocalStack:
    """One user of a checkout's local programs; `patience` bounds the wait for a silent one."""

    def __init__(self, folder: Path, patience: float = 30.0) -> None:
        self.folder, self._patience = folder, patience
        self._users: int | None = None
        self._started: dict[str, subprocess.Popen[bytes] | None] = {}

    def start(
        self, name: str, ports: int, describe: Callable[[tuple[int, ...]], Program]
    ) -> Program:
        """Use a program, and start it unless it runs; returns before it is ready.

        Raises:
            BusyError: it does not stop, or runs in another variant.
            SettingsError: the folder belongs to another user.
        """
        try:
            if self._users is None:
                self._users = open_lock(self.folder / USERS)
                fcntl.flock(self._users, fcntl.LOCK_SH)
            with FileLock(self.folder / "start.lock", timeout=2 * self._patience + 1):
                if state := self._running(name):
                    program = describe(tuple(state["ports"]))
                    if _digest(program.variant) != state["variant"]:
                        raise BusyError(
                            f"The local {name} server runs for another command with other "
                            "settings. Let that command end, or `handsigns down`, and run again."
                        )
                    self._started.setdefault(name, None)
                else:
                    program = describe(choose_ports(self.folder, name, ports))
                    self._started[name] = self._spawn(program)
        except PermissionError as error:
            raise SettingsError(
                f"'{error.filename}' belongs to another user. Run as that user, or give the "
                f"folder '{self.folder}' to this one."
            ) from None
        except Timeout:
            raise BusyError(self._busy("start", name)) from None
        return program

    def wait(self, program: Program) -> None:
        """Block until a program is ready; `ServiceError` if it ends or is too slow."""
        name, mine = program.name, self._started[program.name] is not None
        patient = time.monotonic() + self._patience
        while not program.ready():
            state = read_state(self.folder, name)
            if state is None or (mine and state["ends"]):
                raise ServiceError(f"The local {name} server did not start. {self._explain(name)}")
            if time.monotonic() > patient and time.time() > state["began"] + START_SECONDS:
                raise ServiceError(
                    f"The local {name} server does not answer at {program.url}. "
                    f"{self._explain(name)}"
                )
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Use nothing any more; wait until what only this user used has stopped."""
        if self._users is None:
            return
        users, self._users = self._users, None
        fcntl.flock(users, fcntl.LOCK_UN)
        deadline = time.monotonic() + STOP_SECONDS
        if not is_used(users):
            while (
                any(is_alive(self.folder, name) for name in self._started)
                and time.monotonic() < deadline
            ):
                time.sleep(POLL_SECONDS / 2)
        os.close(users)
        for process in filter(None, self._started.values()):
            process.poll()
        self._started.clear()

    def _explain(self, name: str) -> str:
        log = self.folder / "logs" / f"{name}.log"
        return f"{first_error(log)} See {log}."

    def _running(self, name: str) -> dict[str, Any] | None:
        """State of a program that runs; waits for one that is stopping."""
        deadline = time.monotonic() + self._patience
        while is_alive(self.folder, name):
            if state := read_state(self.folder, name):
                return state
            if time.monotonic() > deadline:
                raise BusyError(self._busy("stop", name))
            time.sleep(POLL_SECONDS / 2)
        return None

    def _spawn(self, program: Program) -> "subprocess.Popen[bytes]":
        _require_open_files()
        process = subprocess.Popen(  # noqa: S603, the command is ours
            [sys.executable, "-I", "-S", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        described = {
            "folder": str(self.folder),
            "name": program.name,
            "command": list(program.command),
            "environment": dict(program.environment),
            "ports": program.ports,
            "variant": _digest(program.variant),
            "cwd": program.cwd and str(program.cwd),
            "stays": program.stays,
            "about": dict(program.about),
        }
        with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as pipe:
            pipe.write(json.dumps(described).encode())
        while read_state(self.folder, program.name) is None and process.poll() is None:
            time.sleep(0.01)
        return process

    def _busy(self, verb: str, name: str) -> str:
        return (
            f"The local {name} server of this checkout did not {verb} within "
            f"{self._patience:.0f} s. See {self.folder / 'logs' / name}.log, and run again."
        )


def _digest(variant: str) -> str:
    """It may hold a password."""
    return hashlib.sha256(variant.encode()).hexdigest()


def is_alive(folder: Path, name: str) -> bool:
    """Whether a program of a checkout has a supervisor."""
    try:
        lock = os.open(folder / f"{name}.lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look at once do not take each other for the supervisor.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def is_used(users: int) -> bool:
    """Whether anybody uses the programs; supervisors look too, each for less than 1 ms."""
    for _ in range(5):
        with suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(users, fcntl.LOCK_UN)
            return False
        time.sleep(0.02)
    return True


def read_state(folder: Path, name: str) -> dict[str, Any] | None:
    """State of a program that runs; None where none does, or it is stopping."""
    state = read_json(folder / f"{name}.lock") if is_alive(folder, name) else None
    return state if isinstance(state, dict) else None


ERROR = re.compile(
    r"^[FE]\d{4} |^panic: |^[\w.]*(Error|Exception)\b|\b(error|fatal|denied|cannot|failed)\b",
    re.IGNORECASE,
)


def first_error(log: Path) -> str:
    """The first line of a log that reports an error, or its last line; a whole sentence."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "It left no log."
    # A traceback's own line of the error is not indented, unlike its frames.
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    found = (line for line in lines if not line[0].isspace() and ERROR.search(line))
    line = next(found, lines[-1] if lines else "")
    if not line:
        return "Its log is empty."
    return f"First error: {textwrap.shorten(line, 300, placeholder=' …').rstrip('.')}."


def choose_ports(folder: Path, name: str, count: int) -> tuple[int, ...]:
    """Return ports free on loopback, as is the one `GRPC` above each; the same while they are."""
    chosen: list[int] = []
    candidates = random.Random(f"{folder}/{name} {os.getuid()}")
    while len(chosen) < count:
        port = candidates.choice(RANGE)
        if port not in chosen and _is_free(port):
            chosen.append(port)
    return tuple(chosen)


def _is_free(port: int) -> bool:
    for candidate in (port, port + GRPC):
        with socket.socket() as probe:
            # As servers do: a closed connection's remains do not count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                return False
    return True


def _require_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        raise SettingsError(
            f"The local servers need {OPEN_FILES} open files, and only {hard} are allowed here. "
            f"Allow more with `ulimit -n {OPEN_FILES}`, then run again."
        )
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))

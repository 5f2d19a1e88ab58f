"""Local programs that several commands share: the first user starts one, the last one stops it.

A program holds the lock of its own state file, and every user the shared lock of all users. The
kernel releases both however their holder ends, so that the next user takes over what still runs
after a SIGKILL, and nothing is taken for running that is not.
"""

import fcntl
import hashlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from tasks.errors import BusyError, ServiceError, SettingsError
from tasks.io import read_json

GRPC = 10_000  # SeaweedFS's gRPC port lies this far above each of its ports
RANGE = range(12_000, 22_000)  # with `GRPC` added below those that outgoing connections take
OPEN_FILES = 256  # SeaweedFS panics with half as many
SECONDS = 120.0  # a program's time to answer, while it starts or the machine has no time for it
GRACE_SECONDS = 4.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.05
ERROR = re.compile(
    r"^[FE]\d{4} |^panic: |^[\w.]*(Error|Exception)\b|\b(error|fatal|denied|cannot|failed)\b",
    re.IGNORECASE,
)
NEWER = re.compile("Can't locate revision|No such revision")  # Alembic's, of a newer database


@dataclass(frozen=True)
class Program:
    """A program that users with an equal `variant` share; its command holds no secrets."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], Any] = lambda: True
    ports: tuple[int, ...] = ()
    url: str = ""
    variant: str = ""
    cwd: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the variant, which may hold a password."""
        return hashlib.sha256(self.variant.encode()).hexdigest()


class LocalStack:
    """One user of a checkout's local programs, whose state is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._users: int | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, ports: int, describe: Callable[[tuple[int, ...]], Program]
    ) -> Program:
        """Use a program, and start it unless it runs; returns before it is ready."""
        self.join()
        with self._changing():
            if state := read_state(self.folder, name):
                program = describe(tuple(state["ports"]))
                if program.digest == state["variant"]:
                    return program
                raise BusyError(
                    f"The local {name} server runs with other settings. Let the command that "
                    "uses it end, or run `handsigns down`, and run again."
                )
            stop_programs(self.folder, [name])  # whatever is left of it
            last = read_json(_state_file(self.folder, name)) or {"ports": ()}
            program = describe(choose_ports(ports, last["ports"]))
            self._started.append(_spawn(program, self.folder))
        return program

    def wait(self, program: Program) -> None:
        """Block until a program is ready; `ServiceError` if it ends or is too slow."""
        log, deadline = self.folder / "logs" / f"{program.name}.log", time.monotonic() + SECONDS
        while not program.ready():
            if not read_state(self.folder, program.name):
                raise ServiceError(
                    f"The local {program.name} server did not start. {first_error(log)} See {log}."
                )
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"The local {program.name} server does not answer at {program.url}. "
                    f"{first_error(log)} See {log}, or stop it with `handsigns down`."
                )
            time.sleep(POLL_SECONDS)

    def join(self) -> None:
        """Count as a user from here on."""
        if self._users is None:
            with self._changing():
                self._users = _open(self.folder / "users.lock")
                fcntl.flock(self._users, fcntl.LOCK_SH)

    def close(self) -> None:
        """Use nothing any more; the last user stops everything."""
        if self._users is None:
            return
        with self._changing():
            users, self._users = self._users, None
            if _try_lock(users, fcntl.LOCK_EX):
                states = (self.folder / "programs").glob("*.json")
                stop_programs(self.folder, [path.stem for path in states])
            os.close(users)
        for process in self._started:
            process.poll()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Users join, start and stop programs one after the other."""
        try:
            with FileLock(self.folder / "start.lock", timeout=SECONDS):
                yield
        except Timeout:
            raise BusyError(
                f"Another command has been starting or stopping local servers for "
                f"{SECONDS:.0f} s. See {self.folder / 'logs'}, and run again."
            ) from None


def _spawn(program: Program, folder: Path) -> "subprocess.Popen[bytes]":
    """Start a program, which inherits the lock of its state and so holds it while it lives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < OPEN_FILES:
        raise SettingsError(
            f"The local servers need {OPEN_FILES} open files, and only {hard} are allowed here. "
            f"Allow more with `ulimit -n {OPEN_FILES}`, then run again."
        )
    if 0 <= soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    log = folder / "logs" / f"{program.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(f"{log}.1")
    path = _state_file(folder, program.name)
    path.parent.mkdir(exist_ok=True, mode=0o700)
    lock = _open(path)
    try:
        while not _try_lock(lock, fcntl.LOCK_EX):  # somebody looks, for a moment
            time.sleep(0.001)
        os.ftruncate(lock, 0)
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603, the command is ours
                program.command,
                env=program.environment,
                cwd=program.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(lock,),
            )
        state = {"pid": process.pid, "ports": program.ports}
        state |= {"variant": program.digest, "about": dict(program.about)}
        os.pwrite(lock, json.dumps(state).encode(), 0)
    finally:
        os.close(lock)
    return process


def stop_programs(folder: Path, names: Sequence[str]) -> None:
    """Stop programs and all that they started."""
    states = {name: read_json(_state_file(folder, name)) for name in names}
    pids = {name: int(state["pid"]) for name, state in states.items() if isinstance(state, dict)}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for name, pid in pids.items():
            # The number of a program that is gone may be another's by now.
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                left = not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
                if left or read_state(folder, name):
                    os.killpg(pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(read_state(folder, name) for name in pids) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
    for name in pids:
        if read_state(folder, name):
            raise BusyError(f"The local {name} server, process {pids[name]}, does not stop.")


def read_state(folder: Path, name: str) -> dict[str, Any] | None:
    """State of a program that runs; None where none does."""
    try:
        lock = os.open(_state_file(folder, name), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that two who look at once do not take each other for the program.
        if _try_lock(lock, fcntl.LOCK_SH):
            return None
        state = read_json(_state_file(folder, name))
        return state if isinstance(state, dict) else None
    finally:
        os.close(lock)


def _state_file(folder: Path, name: str) -> Path:
    return folder / "programs" / f"{name}.json"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _try_lock(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def first_error(log: Path) -> str:
    """The first line of a log that reports an error, or its last line; a whole sentence."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "It left no log."
    # A traceback's own line of the error is not indented, unlike its frames.
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if "Traceback (most recent call last)" not in line]
    found = (line for line in lines if not line[0].isspace() and ERROR.search(line))
    line = next(found, lines[-1] if lines else "its log is empty")
    error = f"First error: {textwrap.shorten(line, 300, placeholder=' …').rstrip('.')}."
    if NEWER.search(line):
        error += " Its database is of a newer version: install that version, or restore a backup."
    return error


def choose_ports(count: int, last: Sequence[int] = ()) -> tuple[int, ...]:
    """Return ports free on loopback, as is the one `GRPC` above each; the last ones if they are."""
    if len(last) == count and all(map(_is_free, last)):
        return tuple(last)
    return tuple(islice(filter(_is_free, random.sample(RANGE, len(RANGE))), count))


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

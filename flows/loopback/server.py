"""One real server on loopback, started early, awaited late, stopped with the run."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.loopback.ports import remember_ports
from flows.loopback.tether import BUSY
from tasks.errors import BusyError, ServiceError

POLL_SECONDS = 0.1
STOP_SECONDS = 15.0
TETHER = Path(__file__).with_name("tether.py")


@dataclass
class Server:
    """A server tied to this process by `flows.loopback.tether`.

    Args:
        name: names its lock and log.
        folder: takes `<name>.lock` and `logs/<name>.log`.
        command: program and arguments.
        environment: all of its environment; never part of its arguments.
        ready: tells whether it does its work; called every 0.1 s, must not raise.
        ports: what it listens on, remembered once it is ready.
        patience: longest wait in seconds for another run that holds its lock.
        start_seconds: longest wait in seconds for `ready`, from the start.
    """

    name: str
    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool]
    ports: tuple[int, ...]
    patience: float = 30.0
    start_seconds: float = 120.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _awaited: bool = field(default=False, init=False)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def _lock(self) -> Path:
        return self.folder / f"{self.name}.lock"

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, if that was not done, and return its tether at once."""
        if self._process:
            return self._process
        self.log.parent.mkdir(parents=True, exist_ok=True)
        tether = [sys.executable, "-P", str(TETHER), str(self._lock), str(self.log)]
        self._process = subprocess.Popen(  # noqa: S603, the command is ours
            [*tether, str(self.patience), *self.command],
            env=dict(self.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def wait(self) -> None:
        """Start it if need be and block until it does its work.

        Raises:
            BusyError: another run of this checkout kept it for all of `patience`.
            ServiceError: it ended, or was not ready in time.
        """
        if self._awaited:
            return
        process = self.start()
        deadline = time.monotonic() + self.patience + self.start_seconds
        while not self.ready():
            code = process.poll()
            if code == BUSY:
                raise BusyError(self._busy())
            if code is not None:
                raise ServiceError(f"The local {self.name} server did not start. {self.advice()}")
            if time.monotonic() > deadline:
                seconds = self.patience + self.start_seconds
                raise ServiceError(
                    f"The local {self.name} server was not ready in {seconds:.0f} s. "
                    f"{self.advice()}"
                )
            time.sleep(POLL_SECONDS)
        remember_ports(self.folder, self.name, self.ports)
        self._awaited = True

    def stop(self) -> None:
        """Stop it and everything that it started; return when all of it is gone."""
        if not self._process:
            return
        try:
            self._process.communicate(timeout=STOP_SECONDS)  # closes its standard input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._awaited = False

    def _busy(self) -> str:
        try:
            holder = Path(f"{self._lock}.pid").read_text(encoding="utf-8").strip()
        except OSError:
            holder = "unknown"
        return (
            f"The local {self.name} server belongs to another run of this checkout. "
            f"Received: process {holder} after a wait of {self.patience:.0f} s. "
            "Let it end, or stop it, and run again."
        )

    def advice(self) -> str:
        """Point to the log, with its last line."""
        lines = (
            self.log.read_bytes()[-4096:].decode(errors="replace").split("\n")
            if self.log.exists()
            else []
        )
        last = next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")
        return f"Last line of {self.log}: {last[:300]}"

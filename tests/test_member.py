"""A part of the service is kept up, whatever comes between."""

import os
import signal
import time
from pathlib import Path
from threading import Event, Thread

import pytest
from filelock import FileLock

from flows.local.member import keep_up
from flows.local.servers import Server
from tasks.errors import BusyError


def _part(folder: Path) -> Server:
    script = f"echo $$ >> {folder / 'pids'}; exec sleep 600"
    command = ["sh", "-c", script]
    return Server("part", folder, command, dict(os.environ), lambda: True, (), patience=0.3)


def _pids(folder: Path, count: int) -> list[int]:
    ends = time.monotonic() + 20.0
    found: list[str] = []
    while len(found) < count:
        assert time.monotonic() < ends, "it was not started"
        time.sleep(0.02)
        if (folder / "pids").is_file():
            found = (folder / "pids").read_text().split()
    return [int(pid) for pid in found]


def test_a_part_that_another_run_has_is_refused_at_the_start(tmp_path: Path) -> None:
    with FileLock(tmp_path / "part.lock"), pytest.raises(BusyError, match="another run"):
        keep_up(lambda: _part(tmp_path), Event())


def test_a_part_that_ended_is_started_again_also_after_who_was_faster(tmp_path: Path) -> None:
    leave = Event()
    keeper = Thread(target=keep_up, args=(lambda: _part(tmp_path), leave), daemon=True)
    keeper.start()
    try:
        (first,) = _pids(tmp_path, 1)
        os.kill(first, signal.SIGKILL)
        with FileLock(tmp_path / "part.lock", poll_interval=0.01):
            time.sleep(2.5)  # a second of pause, and several waits for the lock
            assert _pids(tmp_path, 1) == [first]
            assert keeper.is_alive()
        assert len(_pids(tmp_path, 2)) == 2
    finally:
        leave.set()
        keeper.join(20)
    assert not keeper.is_alive()

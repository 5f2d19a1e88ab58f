"""What was refused is tried again, ever more seldom, and nothing is opened in between."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.serve.follower import Follower
from tasks.releases.pointer import KEY
from tasks.services.s3 import Storage
from tests.fixtures.service import point, publish_graph


class Door:
    """The storage as a checkout's own: closed while nothing was written."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.written = True
        self.opened = 0

    @contextmanager
    def __call__(self, again: bool) -> Iterator[Storage | None]:
        if not self.written and not again:
            yield None
            return
        self.written = False
        self.opened += 1
        yield self._storage


def _until(follower: Follower, door: Door, opened: int) -> None:
    ends = time.monotonic() + 10.0
    while door.opened < opened:
        assert time.monotonic() < ends, "it was never tried again"
        follower.poll()
        time.sleep(0.01)


def test_a_damaged_release_that_is_mended_is_taken(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    release = publish_graph(storage, tmp_path / "made", graphs[0])
    place = f"releases/{release.id}/model.pb"
    whole = storage.get(place)
    storage.put(place, whole[:-1] + bytes([whole[-1] ^ 1]))
    point(storage, release.id, 1)
    door = Door(storage)
    follower = Follower(door, tmp_path / "cache", seconds=0.4)
    follower.poll()
    follower.poll()
    assert door.opened == follower.failures["release"] == 1
    assert "differs from its digest" in str(follower.problem)
    _until(follower, door, opened=3)
    assert follower.failures["release"] == 3
    storage.put(place, whole)  # where it lies, of the same size
    _until(follower, door, opened=4)
    assert follower.model is not None
    assert (follower.model.release, follower.problem) == (release.id, None)


def test_a_pointer_that_is_refused_is_not_read_at_every_look(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    release = publish_graph(storage, tmp_path / "made", graphs[0])
    point(storage, release.id, 1)
    door = Door(storage)
    follower = Follower(door, tmp_path / "cache", seconds=0.05)
    follower.poll()
    pointer = storage.get(KEY)
    storage.put(KEY, b"no pointer")
    door.written = True
    began = time.monotonic()
    _until(follower, door, opened=5)
    assert time.monotonic() - began > 0.05 + 0.1 + 0.2
    assert "cannot be understood" in str(follower.problem)
    storage.put(KEY, pointer)
    door.written = True
    follower.poll()
    assert follower.problem is None
    opened = door.opened
    time.sleep(0.5)
    follower.poll()
    assert door.opened == opened

"""A release that was rejected is tried again, less and less often; nothing is read in between."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.serve.follower import Follower
from tasks.releases.pointer import KEY
from tasks.services.s3 import Storage
from tests.fixtures.service import point, publish_graph


class Opener:
    """Opens the storage as a checkout does: only if something was written, or if asked again."""

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

    def wait(self, follower: Follower, opened: int) -> None:
        """Poll until the storage was opened this often."""
        deadline = time.monotonic() + 10.0
        while self.opened < opened:
            assert time.monotonic() < deadline, "it was never tried again"
            follower.poll()
            time.sleep(0.01)


def test_a_damaged_release_answers_once_it_is_repaired(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    release = publish_graph(storage, tmp_path / "made", graphs[0])
    place = f"releases/{release.id}/model.pb"
    content = storage.get(place)
    storage.put(place, content[:-1] + bytes([content[-1] ^ 1]))
    point(storage, release.id, 1)
    opener = Opener(storage)
    follower = Follower(opener, tmp_path / "cache", seconds=0.4)
    follower.poll()
    follower.poll()
    assert opener.opened == 1
    assert "differs from its digest" in str(follower.problem)
    opener.wait(follower, opened=3)
    assert follower.model is None
    storage.put(place, content)
    opener.wait(follower, opened=4)
    assert follower.model is not None
    assert (follower.model.release, follower.problem) == (release.id, None)


def test_a_rejected_pointer_is_not_read_at_every_check(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    point(storage, publish_graph(storage, tmp_path / "made", graphs[0]).id, 1)
    opener = Opener(storage)
    follower = Follower(opener, tmp_path / "cache", seconds=0.05)
    follower.poll()
    pointer = storage.get(KEY)
    storage.put(KEY, b"no pointer")
    opener.written = True
    began = time.monotonic()
    opener.wait(follower, opened=5)
    assert time.monotonic() - began > 0.05 + 0.1 + 0.2
    assert "cannot be understood" in str(follower.problem)
    storage.put(KEY, pointer)
    opener.written = True
    follower.poll()
    assert follower.problem is None
    opened = opener.opened
    time.sleep(0.5)
    follower.poll()
    assert opener.opened == opened

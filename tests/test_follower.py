"""A release that was refused is tried again, ever more seldom, until it is repaired."""

import time
from pathlib import Path

from flows.serve.follower import Follower
from tasks.releases.champion import KEY
from tasks.services.s3 import Storage
from tests.fixtures.service import point, publish_graph


def failures(follower: Follower) -> float:
    """How often the champion's release was refused."""
    samples = [one for metric in follower.failures.collect() for one in metric.samples]
    found = [one.value for one in samples if one.labels["kind"] == "release"]
    return found[0] if found else 0


def test_a_damaged_release_that_is_repaired_is_taken(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    release = publish_graph(storage, tmp_path / "made", graphs[0])
    place = f"releases/{release.id}/model.pb"
    intact = storage.get(place)
    storage.put(place, intact[:-1] + bytes([intact[-1] ^ 1]))
    point(storage, release.id, 1)
    follower = Follower(storage, tmp_path / "cache", seconds=0.4)
    began = time.monotonic()
    follower.poll()
    follower.poll()
    assert failures(follower) == 1
    assert "differs from its digest" in str(follower.problem)
    while failures(follower) < 3:
        assert time.monotonic() - began < 10, "it was never tried again"
        follower.poll()
        time.sleep(0.01)
    assert time.monotonic() - began > 0.4 + 0.8
    storage.put(place, intact)  # of the same size
    while follower.model is None:
        assert time.monotonic() - began < 20, "it was never tried again"
        follower.poll()
        time.sleep(0.01)
    assert (follower.model.release, follower.problem) == (release.id, None)


def test_a_damaged_pointer_is_named_until_it_is_repaired(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    release = publish_graph(storage, tmp_path / "made", graphs[0])
    point(storage, release.id, 1)
    follower = Follower(storage, tmp_path / "cache", seconds=0.05)
    follower.poll()
    pointer = storage.get(KEY)
    storage.put(KEY, b"no pointer")
    follower.poll()
    assert "cannot be understood" in str(follower.problem)
    assert follower.model is not None
    storage.put(KEY, pointer)
    follower.poll()
    assert follower.problem is None

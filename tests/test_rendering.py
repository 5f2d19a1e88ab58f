"""Rendered hands: the sign that a pose shows, what rays meet, the photo, and the sample's files."""

import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.rendering.hand import BONES, INDEX, MIDDLE, RAISED, THUMB, pose
from tasks.rendering.scene import Turn, draw, is_legible
from tasks.synthetic import encode, render_sample
from tests.fixtures.photos import LABELS


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_a_pose_shows_its_sign_with_human_bones(label: int, seed: int) -> None:
    hand = pose(label, np.random.default_rng(seed))
    bones = np.diff(hand.joints, axis=1)
    lengths = np.linalg.norm(bones, axis=2)
    assert (np.abs(lengths / BONES - 1.0) < 0.15).all()
    np.testing.assert_allclose((bones * hand.dorsal).sum(axis=2), 0.0, atol=1e-6)
    tips = hand.joints[:, 3]
    if label == 0:  # a ring, open inside
        assert np.linalg.norm(tips[THUMB] - tips[INDEX]) < 3.0
        assert np.linalg.norm(tips[THUMB] - tips[MIDDLE]) < 4.5
        assert np.linalg.norm(hand.joints[INDEX, 1] - hand.joints[THUMB, 1]) > 5.0
        return
    assume(is_legible(label, hand, Turn(0.0, 0.0, 0.0)))  # no photo shows another one
    spans = np.linalg.norm(tips - hand.joints[:, 0], axis=1)
    straight = {int(finger) for finger in np.flatnonzero(spans > 0.8 * lengths.sum(axis=1))}
    if tips[THUMB, 0] < hand.joints[INDEX, 0, 0] + 0.5:  # it does not stand off the palm
        straight.discard(THUMB)
    assert straight == set(RAISED[label])


def test_the_bytes_of_a_photo_are_the_same_on_every_machine() -> None:
    photos = [draw((20, label, number)) for label in range(6) for number in range(2)]
    assert hashlib.sha256(np.stack(photos).tobytes()).hexdigest()[:16] == "ba290de966d110f7"
    assert hashlib.sha256(encode(photos[0])).hexdigest()[:16] == "d657f5aed629027f"


def test_a_sample_is_named_by_its_bytes_and_completed_where_it_is_damaged(tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    folder, progress = tmp_path / "data", list[tuple[int, int, bool]]()
    render_sample(folder, lambda _, *done: progress.append((*done, folder.exists())), per_class=7)
    assert progress == [(done, 42, False) for done in range(1, 43)]
    expected = {}  # rendered in one process, where the sample took several
    for label, number in product(range(len(LABELS)), range(7)):
        content = encode(draw((20, label, number)))
        expected[f"train/{label}/{hashlib.sha256(content).hexdigest()[:32]}.png"] = content
    assert contents() == expected
    first, second = sorted(folder.rglob("*.png"))[:2]
    first.unlink()
    second.write_bytes(b"half")
    render_sample(folder, per_class=7)
    assert contents() == expected
    (folder / "train/0/mine.jpg").write_bytes(b"a photo")
    with pytest.raises(DataError, match=r"1 of 43 files in .*Move the folder away"):
        render_sample(folder, per_class=7)
    assert contents() == expected | {"train/0/mine.jpg": b"a photo"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

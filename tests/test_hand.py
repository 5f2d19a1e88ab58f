"""The sign a pose shows, read back from its joints."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.rendering.hand import BONES, INDEX, MIDDLE, RAISED, THUMB, Hand, capsules, pose
from tasks.rendering.scene import Turn, is_legible

labels = st.integers(0, 5)
seeds = st.integers(0, 2**32 - 1)
BUSY = settings(deadline=None)  # a busy machine is no fault


def drawn(label: int, seed: int) -> Hand:
    return pose(label, np.random.default_rng(seed))


def raised(hand: Hand) -> set[int]:
    """Fingers that are nearly straight; of thumbs, those that stand off the palm."""
    bones = np.linalg.norm(np.diff(hand.joints, axis=1), axis=2).sum(axis=1)
    spans = np.linalg.norm(hand.joints[:, 3] - hand.joints[:, 0], axis=1)
    straight = {int(finger) for finger in np.flatnonzero(spans > 0.8 * bones)}
    if hand.joints[THUMB, 3, 0] < hand.joints[INDEX, 0, 0] + 0.5:
        straight.discard(THUMB)
    return straight


@BUSY
@given(st.integers(1, 5), seeds)
def test_a_pose_raises_exactly_the_fingers_of_its_sign(label: int, seed: int) -> None:
    hand = drawn(label, seed)
    assume(is_legible(label, hand, Turn(0.0, 0.0, 0.0)))  # no photo shows another one
    assert raised(hand) == set(RAISED[label])


@BUSY
@given(seeds)
def test_the_ring_closes_at_the_tips_of_thumb_index_and_middle(seed: int) -> None:
    tips = drawn(0, seed).joints[:, 3]
    assert np.linalg.norm(tips[THUMB] - tips[INDEX]) < 3.0
    assert np.linalg.norm(tips[THUMB] - tips[MIDDLE]) < 4.5


@BUSY
@given(seeds)
def test_the_ring_is_open_inside(seed: int) -> None:
    joints = drawn(0, seed).joints
    opposite = joints[INDEX, 1] - joints[THUMB, 1]
    assert np.linalg.norm(opposite) > 5.0


@BUSY
@given(seeds)
def test_four_fingers_keep_the_thumb_over_the_palm(seed: int) -> None:
    x, y, z = drawn(4, seed).joints[THUMB, 3]
    assert -2.7 < x < 3.1
    assert 2.0 < y < 10.5
    assert z > 1.5


def test_four_fingers_fold_the_thumb_at_all_depths() -> None:
    tips = np.stack([drawn(4, seed).joints[THUMB, 3] for seed in range(200)])
    x, y, z = tips.T
    assert (x < -1.0).mean() > 0.1, "across, to the ring finger"
    assert ((x > 1.0) & (y > 8.0)).mean() > 0.1, "upright, beside the index finger"
    assert (z > 3.5).mean() > 0.03, "towards the camera"


@pytest.mark.parametrize("label", [2, 3, 4, 5])
def test_fingers_are_closed_as_well_as_spread(label: int) -> None:
    tips = np.stack([drawn(label, seed).joints[[INDEX, MIDDLE], 3] for seed in range(200)])
    apart = np.linalg.norm(tips[:, 0] - tips[:, 1], axis=1)
    assert (apart < 2.4).mean() > 0.1
    assert (apart > 3.2).mean() > 0.1


@BUSY
@given(labels, seeds)
def test_bones_have_human_lengths(label: int, seed: int) -> None:
    hand = drawn(label, seed)
    bones = np.linalg.norm(np.diff(hand.joints, axis=1), axis=2)
    assert (np.abs(bones / BONES - 1.0) < 0.15).all()


@BUSY
@given(labels, seeds)
def test_backs_of_bones_are_square_to_them(label: int, seed: int) -> None:
    hand = drawn(label, seed)
    bones = np.diff(hand.joints, axis=1)
    np.testing.assert_allclose((bones * hand.dorsal).sum(axis=2), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(hand.dorsal, axis=2), 1.0, rtol=1e-9)


@BUSY
@given(labels, seeds)
def test_no_capsule_is_swallowed_by_one_of_its_own_ends(label: int, seed: int) -> None:
    shapes = capsules(drawn(label, seed))
    lengths = np.linalg.norm(shapes.ends - shapes.starts, axis=1)
    assert (lengths > np.abs(shapes.radii[:, 0] - shapes.radii[:, 1])).all()


@pytest.mark.parametrize("label", range(6))
def test_the_same_seed_gives_the_same_pose(label: int) -> None:
    assert np.array_equal(drawn(label, 4).joints, drawn(label, 4).joints)
    assert not np.array_equal(drawn(label, 4).joints, drawn(label, 5).joints)

"""Turning, framing, lighting and developing a rendered photo."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter

from tasks.rendering.hand import Part, capsules, pose, unit
from tasks.rendering.light import Light, light_on_wall
from tasks.rendering.pixels import FRAME, SIDE, blur, clouds, develop, shift
from tasks.rendering.raycast import Camera, cast
from tasks.rendering.scene import Turn, frame_hand, is_legible, photograph, turned

angles = st.floats(-180, 180)
labels = st.integers(0, 5)
seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(angles, angles, angles)
def test_turning_back_gives_the_points_again(yaw: float, pitch: float, roll: float) -> None:
    points = np.random.default_rng(0).normal(size=(3, 20))
    there = Turn(yaw, pitch, roll).apply(points)
    np.testing.assert_allclose(Turn(yaw, pitch, roll).undo(there), points, atol=1e-9)
    np.testing.assert_allclose((there**2).sum(axis=0), (points**2).sum(axis=0), rtol=1e-9)


def test_a_view_that_hides_a_finger_or_shows_a_folded_thumb_is_not_legible() -> None:
    front, side, top = Turn(0.0, 0.0, 30.0), Turn(88.0, 0.0, 30.0), Turn(0.0, 85.0, 0.0)
    for label in range(1, 6):
        hands = [pose(label, np.random.default_rng(seed)) for seed in range(40)]
        shares = [
            np.mean([is_legible(label, hand, turn) for hand in hands])
            for turn in (front, side, top)
        ]
        assert shares[0] > 0.7
        assert shares[1] < (1.1 if label == 1 else 0.4), "fingers are behind each other"
        assert shares[2] < 0.2, "fingers point at the camera"


def test_thumbs_stand_off_the_hand_in_photos_of_five_and_not_of_four() -> None:
    palm = pose(4, np.random.default_rng(0))
    assert is_legible(4, palm, Turn(0.0, 0.0, 0.0))
    assert not is_legible(5, palm, Turn(0.0, 0.0, 0.0))


@settings(deadline=None, max_examples=25)
@given(labels, seeds)
def test_hardly_any_of_the_hand_is_cut_off(label: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes = turned(capsules(pose(label, random)), Turn(0.0, 10.0, random.uniform(-40, 40)))
    camera = frame_hand(shapes, random)
    ends = np.concatenate([shapes.starts, shapes.ends])[np.tile(shapes.parts != Part.ARM, 2)]
    scale = camera.focal / (camera.distance - ends[:, 2:])
    across = (ends[:, :2] - camera.centre) * scale
    inside = (np.abs(across) <= FRAME / 2).all(axis=1)
    assert inside.mean() > 0.75
    assert 0.02 < cast(shapes, camera).seen.mean() < 0.85


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_shadow_falls_on_the_side_away_from_the_lamp(side: float) -> None:
    random = np.random.default_rng(3)
    camera = Camera(60.0, 60.0 * FRAME / 40.0, (0.0, 5.0), FRAME)
    hits = cast(capsules(pose(5, random)), camera)
    lamp = Light(unit(np.array([side, 0.0, 1.0])), np.ones(3), np.zeros(3))
    dark = Light(unit(np.array([0.0, 0.0, 1.0])), np.ones(3), np.zeros(3))
    given_lamp = light_on_wall(hits, lamp, camera, 8.0, np.random.default_rng(1))[0]
    from_front = light_on_wall(hits, dark, camera, 8.0, np.random.default_rng(1))[0]
    lost = np.maximum(from_front - given_lamp, 0.0).sum(axis=0)
    middle = (lost * np.arange(SIDE)).sum() / lost.sum() - SIDE / 2
    assert middle * side < -2.5


@pytest.mark.parametrize("radius", [1, 2, 7])
def test_blur_is_the_mean_over_a_square(radius: int) -> None:
    values = np.random.default_rng(0).uniform(size=(FRAME, FRAME))
    expected = uniform_filter(values, 2 * radius + 1, mode="nearest")
    np.testing.assert_allclose(blur(values, radius), expected, atol=1e-12)


def test_shift_moves_down_and_right() -> None:
    values = np.zeros((FRAME, FRAME))
    values[10, 20] = 1.0
    assert np.argwhere(shift(values, 3, -4) == 1.0).tolist() == [[13, 16]]


def test_clouds_stay_between_nought_and_one() -> None:
    values = clouds(np.random.default_rng(0), 9, 80)
    assert values.shape == (80, 80)
    assert 0.0 <= values.min() < 0.2 < 0.8 < values.max() <= 1.0


def test_developing_keeps_grey_grey_and_dark_below_light() -> None:
    for seed in range(5):
        dark = develop(np.full((3, FRAME, FRAME), 0.1), np.random.default_rng(seed))
        light = develop(np.full((3, FRAME, FRAME), 0.4), np.random.default_rng(seed))
        assert light.dtype == np.uint8
        assert light.mean() > dark.mean() + 40
        assert 0.1 < light[:, :, 0].std() < 5.0
        channels = light.mean(axis=(0, 1))
        assert channels.max() - channels.min() < 0.15 * channels.mean()


@pytest.mark.parametrize("label", range(6))
def test_photos_are_neither_black_nor_burnt_out(label: int) -> None:
    for seed in range(3):
        random = np.random.default_rng([label, seed])
        picture = photograph(label, random)
        assert picture.shape == (64, 64, 3)
        assert picture.std() > 5
        assert (picture == 255).mean() < 0.7
        assert (picture == 0).mean() < 0.7

"""Augmented copies: what they depend on, and how far they go."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.model.augment import INPUT_SIZE, augment, enlarge, single_threaded_opencv
from tasks.params import AugmentationParams
from tests.fixtures.photos import STILL, photo

MEDIUM = AugmentationParams(
    horizontal_flip=True,
    rotation=29,
    zoom=0.2,
    zoom_out_prob=0.15,
    zoom_out_min=0.5,
    shift=0.12,
    brightness=0.15,
    contrast=0.25,
    color_jitter=0.08,
)


def _bilinear(image: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """The textbook formula: half-pixel centres, border pixels repeated."""
    detail = len(image)
    where = (np.arange(size) + 0.5) * detail / size - 0.5
    below = np.floor(where).astype(int)
    share = (where - below)[:, None]
    low, high = np.clip(below, 0, detail - 1), np.clip(below + 1, 0, detail - 1)
    rows = image[low] * (1 - share[:, None]) + image[high] * share[:, None]
    columns: NDArray[np.float64] = rows[:, low] * (1 - share) + rows[:, high] * share
    return columns


def _only(**strengths: float) -> AugmentationParams:
    return AugmentationParams.model_validate({**STILL.model_dump(), **strengths})


def _block(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    """A white block on black; uint8, (64, 64, 3)."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[top:bottom, left:right] = 255
    return picture


def _copies(image: NDArray[np.uint8], params: AugmentationParams) -> list[NDArray[np.uint8]]:
    return [augment(image, "a.png", number, 5, params) for number in range(1, 301)]


def _lit(picture: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Centre of the bright pixels from the middle, and their side; shares of the side."""
    rows, columns = np.nonzero(picture[..., 0] > 127)
    side = len(picture)
    return columns.mean() / side - 0.5, rows.mean() / side - 0.5, np.sqrt(len(rows)) / side


@pytest.mark.parametrize("detail", [16, 64, 100, 224])
def test_copy_0_is_the_photo_enlarged_bilinearly_whatever_the_strength(detail: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, detail, detail, 3), np.uint8)
    large = enlarge(images)
    assert (large.shape, large.dtype) == ((2, INPUT_SIZE, INPUT_SIZE, 3), np.uint8)
    assert np.abs(large[1] - _bilinear(images[1], INPUT_SIZE)).max() <= 0.51
    assert np.array_equal(augment(images[1], "a.png", 0, 1, MEDIUM), large[1])
    assert enlarge(images[:0], 96).shape == (0, 96, 96, 3)


@given(seed=st.integers(0, 2**31 - 1), order=st.permutations(range(1, 7)))
@settings(max_examples=10, deadline=None)
def test_a_copy_depends_on_its_key_alone(seed: int, order: list[int]) -> None:
    image = photo(3, 1)
    first = {n: augment(image, "a.png", n, seed, MEDIUM, 64) for n in range(1, 7)}
    again = {n: augment(image, "a.png", n, seed, MEDIUM, 64) for n in order}
    assert all(np.array_equal(first[n], again[n]) for n in first)
    keys = [(name, n, s) for name in ("a.png", "b.png") for n in (1, 2) for s in (seed, seed + 1)]
    assert len({augment(image, *key, MEDIUM, 64).tobytes() for key in keys}) == 8


def test_hands_are_mirrored_but_never_turned_over() -> None:
    corner, straight = _block(8, 20, 8, 20), MEDIUM.model_copy(update={"horizontal_flip": False})
    places = [_lit(copy) for copy in _copies(corner, _only(horizontal_flip=True))]
    assert 100 < sum(x < 0 for x, _, _ in places) < 200
    assert all(y < 0 for _, y, _ in places)
    # Without mirroring the other random numbers stay as they are.
    pairs = zip(_copies(corner, MEDIUM), _copies(corner, straight), strict=True)
    assert 100 < sum(np.array_equal(*pair) for pair in pairs) < 200


def test_each_variation_reaches_its_limits_and_not_beyond() -> None:
    moved = np.array([_lit(copy) for copy in _copies(_block(28, 36, 28, 36), _only(shift=0.2))])
    assert 0.18 < np.abs(moved[:, :2]).max() < 0.21
    sides = [_lit(copy)[2] * 4 for copy in _copies(_block(24, 40, 24, 40), _only(zoom=0.2))]
    assert 0.77 < min(sides) < 0.83
    assert 1.17 < max(sides) < 1.23
    turned = [_lit(copy) for copy in _copies(_block(10, 16, 29, 35), _only(rotation=29))]
    angles = [np.rad2deg(np.arctan2(x, -y)) for x, y, _ in turned]
    assert -30 < min(angles) < -26 < 26 < max(angles) < 30
    grey = np.full((32, 32, 3), 120, np.uint8)
    lit = [copy.astype(int) for copy in _copies(grey, _only(brightness=0.1, contrast=0.5))]
    assert 23 < max(np.abs(copy - 120).max() for copy in lit) <= 26
    assert max(np.ptp(copy) for copy in lit) <= 1
    tinted = [copy[0, 0].astype(int) for copy in _copies(grey, _only(color_jitter=0.1))]
    assert 10 < max(np.abs(color - 120).max() for color in tinted) <= 12
    assert max(np.ptp(color) for color in tinted) > 10


def test_a_share_of_the_copies_is_from_further_away() -> None:
    apart = _only(zoom_out_prob=0.3, zoom_out_min=0.4, zoom=0.2)
    growth = np.array([_lit(copy)[2] * 64 / 24 for copy in _copies(_block(20, 44, 20, 44), apart)])
    assert 0.38 <= growth.min() < 0.45
    assert 1.15 < growth.max() <= 1.22
    assert 0.22 <= (growth < 0.8).mean() <= 0.38


def test_borders_go_on_so_no_other_colour_and_no_second_hand_appears() -> None:
    grey = np.full((32, 32, 3), 120, np.uint8)
    wild = _only(horizontal_flip=True, rotation=180, zoom=0.9, shift=0.5)
    assert np.unique(_copies(grey, wild)).tolist() == [120]
    far = _only(zoom_out_prob=1, zoom_out_min=0.3, zoom=0.6)
    for copy in _copies(_block(0, 64, 8, 14), far):
        assert (np.diff((copy[112, :, 0] > 127).astype(int)) == 1).sum() <= 1


def test_opencv_has_its_threads_back_afterwards() -> None:
    before = cv2.getNumThreads()
    with single_threaded_opencv():
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == before

"""Augmented copies: what they depend on, and how far they go."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.model.augment import augment, enlarge
from tasks.params import INPUT_SIZE, AugmentationParams
from tests.fixtures.photos import STILL, photo

GREY = np.full((32, 32, 3), 120, np.uint8)


def only(**strengths: float) -> AugmentationParams:
    return AugmentationParams.model_validate({**STILL.model_dump(), **strengths})


MEDIUM = only(horizontal_flip=True, rotation=29, zoom=0.2, shift=0.12, brightness=0.15)


def block(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    """A white block on black; uint8, (64, 64, 3)."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[top:bottom, left:right] = 255
    return picture


def copies(image: NDArray[np.uint8], params: AugmentationParams) -> list[NDArray[np.uint8]]:
    return [augment(image, "a.png", number, 5, params) for number in range(1, 301)]


def blocks(image: NDArray[np.uint8], params: AugmentationParams) -> NDArray[np.float64]:
    """Centre of the bright pixels from the middle, and their side; shares of a copy's side."""
    places = []
    for picture in copies(image, params):
        rows, columns = np.nonzero(picture[..., 0] > 127)
        places.append([columns.mean() / 224 - 0.5, rows.mean() / 224 - 0.5, len(rows) ** 0.5 / 224])
    return np.array(places)


@pytest.mark.parametrize("detail", [16, 64, 224])
def test_copy_0_is_the_photo_enlarged_bilinearly_whatever_the_strength(detail: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (detail, detail, 3), np.uint8)
    (large,) = enlarge(image[np.newaxis])
    where = (np.arange(INPUT_SIZE) + 0.5) * detail / INPUT_SIZE - 0.5  # half-pixel centres
    below = np.floor(where).astype(int)
    share = (where - below)[:, None]
    low, high = np.clip(below, 0, detail - 1), np.clip(below + 1, 0, detail - 1)
    rows = image[low] * (1 - share[:, None]) + image[high] * share[:, None]
    expected = rows[:, low] * (1 - share) + rows[:, high] * share
    assert np.abs(large - expected).max() <= 0.51
    assert np.array_equal(augment(image, "a.png", 0, 1, MEDIUM), large)


def test_a_copy_depends_on_its_key_alone() -> None:
    image = photo(3, 1)
    keys = [(name, n, seed) for name in ("a.png", "b.png") for n in (1, 2) for seed in (5, 6)]
    first = [augment(image, *key, MEDIUM, 64).tobytes() for key in keys]
    assert [augment(image, *key, MEDIUM, 64).tobytes() for key in reversed(keys)] == first[::-1]
    assert len(set(first)) == 8


def test_hands_are_mirrored_but_never_turned_over() -> None:
    corner, straight = block(8, 20, 8, 20), MEDIUM.model_copy(update={"horizontal_flip": False})
    x, y, _ = blocks(corner, only(horizontal_flip=True)).T
    assert 100 < (x < 0).sum() < 200
    assert (y < 0).all()
    # Without mirroring the other random numbers stay as they are.
    pairs = zip(copies(corner, MEDIUM), copies(corner, straight), strict=True)
    assert 100 < sum(np.array_equal(*pair) for pair in pairs) < 200


def test_each_variation_reaches_its_limits_and_not_beyond() -> None:
    moved = blocks(block(28, 36, 28, 36), only(shift=0.2))
    assert 0.18 < np.abs(moved[:, :2]).max() < 0.21
    sides = blocks(block(24, 40, 24, 40), only(zoom=0.2))[:, 2] * 4
    assert 0.77 < sides.min() < 0.83 < 1.17 < sides.max() < 1.23
    x, y, _ = blocks(block(10, 16, 29, 35), only(rotation=29)).T
    angles = np.rad2deg(np.arctan2(x, -y))
    assert -30 < angles.min() < -26 < 26 < angles.max() < 30
    lit = [copy.astype(int) for copy in copies(GREY, only(brightness=0.1, contrast=0.5))]
    assert 23 < max(np.abs(copy - 120).max() for copy in lit) <= 26
    assert max(np.ptp(copy) for copy in lit) <= 1
    tinted = [copy[0, 0].astype(int) for copy in copies(GREY, only(color_jitter=0.1))]
    assert 10 < max(np.abs(color - 120).max() for color in tinted) <= 12
    assert max(np.ptp(color) for color in tinted) > 10
    apart = only(zoom_out_prob=0.3, zoom_out_min=0.4, zoom=0.2)
    growth = blocks(block(20, 44, 20, 44), apart)[:, 2] * 64 / 24
    assert 0.38 <= growth.min() < 0.45 < 1.15 < growth.max() <= 1.22
    assert 0.22 <= (growth < 0.8).mean() <= 0.38


def test_borders_go_on_so_no_other_colour_and_no_second_hand_appears() -> None:
    wild = only(horizontal_flip=True, rotation=180, zoom=0.9, shift=0.5)
    assert np.unique(copies(GREY, wild)).tolist() == [120]
    for copy in copies(block(0, 64, 8, 14), only(zoom_out_prob=1, zoom_out_min=0.3, zoom=0.6)):
        assert (np.diff((copy[112, :, 0] > 127).astype(int)) == 1).sum() <= 1

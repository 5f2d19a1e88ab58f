import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.model.augment import exchange_backdrop, find_hand
from tasks.rendering.sample import draw

SIDE = 64
SKIN = st.tuples(st.integers(90, 230), st.integers(50, 160), st.integers(30, 120)).filter(
    lambda colour: colour[0] - colour[2] > 40
)


def _shape() -> NDArray[np.uint8]:
    """A palm with two fingers, coming from below."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(shape, (32, 40), (12, 14), 0, 0, 360, 1, -1)
    cv2.rectangle(shape, (27, 50), (37, SIDE), 1, -1)
    for finger in (24, 36):
        cv2.rectangle(shape, (finger, 12), (finger + 5, 36), 1, -1)
    return shape


def _before_a_wall(skin: tuple[int, ...], level: float = 190, fall: float = 0) -> NDArray[np.uint8]:
    light = np.linspace(level + fall, level - fall, SIDE)[np.newaxis, :, np.newaxis]
    wall = np.broadcast_to(light, (SIDE, SIDE, 3))
    noise = np.random.default_rng(1).normal(0, 2, wall.shape)
    hand = _shape()[..., np.newaxis]
    return np.clip(np.where(hand, skin, wall) + noise, 0, 255).astype(np.uint8)


def _overlap(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    return float(np.logical_and(one, other).sum() / np.logical_or(one, other).sum())


@given(skin=SKIN, level=st.integers(120, 220), fall=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_a_hand_before_a_plain_wall_is_found(
    skin: tuple[int, int, int], level: int, fall: int
) -> None:
    hand = find_hand(_before_a_wall(skin, level, fall))
    assert hand is not None
    assert _overlap(hand, _shape()) > 0.85


def test_a_shadow_belongs_to_the_wall() -> None:
    photo = _before_a_wall((200, 130, 90))
    shadow = np.roll(_shape(), 8, axis=1).astype(bool) & ~_shape().astype(bool)
    photo[shadow] = (photo[shadow] * 0.8).astype(np.uint8)
    hand = find_hand(photo)
    assert hand is not None
    assert hand[shadow].mean() < 0.1


@pytest.mark.parametrize(
    "photo",
    [
        np.full((SIDE, SIDE, 3), 180, np.uint8),
        np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        cv2.circle(np.full((SIDE, SIDE, 3), 180, np.uint8), (32, 32), 4, (200, 120, 80), -1),
        cv2.circle(np.full((SIDE, SIDE, 3), 180, np.uint8), (32, 32), 31, (200, 120, 80), -1),
        np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((16, 16), int))[..., np.newaxis]
        .repeat(3, axis=2)
        .astype(np.uint8)
        * 255,
    ],
    ids=["no hand", "noise", "a speck", "nearly all hand", "no plain wall"],
)
def test_a_photo_in_which_no_hand_stands_out_stays_as_it_is(photo: NDArray[np.uint8]) -> None:
    assert find_hand(photo) is None
    assert exchange_backdrop(photo, np.random.default_rng(0)) is photo


@pytest.mark.parametrize("label", range(6))
def test_the_hand_stays_and_the_rest_changes(label: int) -> None:
    photo = draw((20, label, 1))
    hand = find_hand(photo)
    assert hand is not None
    inside = cv2.erode(hand, np.ones((5, 5))) > 0
    outside = cv2.dilate(hand, np.ones((5, 5))) == 0
    before, after = photo.astype(int), exchange_backdrop(photo, np.random.default_rng(3))
    assert np.array_equal(after[inside], photo[inside])
    assert np.abs(after - before)[outside].mean() > 10


def test_the_wall_does_not_shine_through_at_the_edge() -> None:
    skin = (80, 60, 40)
    photo = cv2.GaussianBlur(_before_a_wall(skin, level=250), (3, 3), 0)  # as cameras see edges
    hand = find_hand(photo)
    assert hand is not None
    edge = (hand > 0) & (cv2.erode(hand, np.ones((3, 3))) == 0)
    changed = exchange_backdrop(photo, np.random.default_rng(31))  # a dark one
    assert (np.median(changed[hand == 0], axis=0) < skin).all()
    assert (changed[edge].mean(axis=0) < np.array(skin) + 5).all()
    assert (photo[edge].mean(axis=0) > np.array(skin) + 25).all()


def test_the_same_draw_gives_the_same_bytes_and_another_does_not() -> None:
    photo = draw((20, 2, 1))
    one, same, other = (
        exchange_backdrop(photo, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2)
    )
    assert one == same != other


@given(side=st.sampled_from([16, 24, 64, 224]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_photo_of_any_size_gives_a_photo_of_that_size(side: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    photo = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    changed = exchange_backdrop(photo, random)
    assert (changed.shape, changed.dtype) == (photo.shape, photo.dtype)

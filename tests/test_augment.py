import cv2
import numpy as np
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
SEEDS = st.integers(0, 2**31 - 1)


def _bilinear(image: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """The textbook formula: half-pixel centres, border pixels repeated."""
    detail = len(image)
    where = (np.arange(size) + 0.5) * detail / size - 0.5
    below = np.floor(where).astype(int)
    share = where - below
    low, high = np.clip(below, 0, detail - 1), np.clip(below + 1, 0, detail - 1)
    rows = image[low] * (1 - share)[:, None, None] + image[high] * share[:, None, None]
    columns: NDArray[np.float64] = (
        rows[:, low] * (1 - share)[:, None] + rows[:, high] * share[:, None]
    )
    return columns


def _noise(seed: int, detail: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (detail, detail, 3), dtype=np.uint8)


def _only(**strengths: float) -> AugmentationParams:
    return AugmentationParams.model_validate({**STILL.model_dump(), **strengths})


def _lit(picture: NDArray[np.uint8]) -> tuple[float, float]:
    """Centre of the bright pixels, (x, y) as shares of the side."""
    rows, columns = np.nonzero(picture[..., 0] > 127)
    return float(columns.mean() / len(picture)), float(rows.mean() / len(picture))


@given(seed=SEEDS, detail=st.sampled_from([16, 32, 64, 100, 224]))
@settings(max_examples=20, deadline=None)
def test_plain_copy_is_bilinear_with_half_pixel_centres(seed: int, detail: int) -> None:
    image = _noise(seed, detail)
    assert np.abs(enlarge(image[None])[0] - _bilinear(image, INPUT_SIZE)).max() <= 0.51


def test_plain_copy_keeps_shape_order_and_type() -> None:
    images = np.stack([_noise(seed, 32) for seed in range(3)])
    large = enlarge(images, size=96)
    assert large.shape == (3, 96, 96, 3)
    assert large.dtype == np.uint8
    assert np.array_equal(large[2], enlarge(images[2:], size=96)[0])
    assert enlarge(images[:0]).shape == (0, 224, 224, 3)


def test_copy_0_is_plain_whatever_the_strength() -> None:
    image = photo(2, 1)
    assert np.array_equal(augment(image, "a.png", 0, 1, MEDIUM), enlarge(image[None])[0])


@given(seed=SEEDS, order=st.permutations(range(1, 7)))
@settings(max_examples=10, deadline=None)
def test_a_copy_depends_on_its_key_alone(seed: int, order: list[int]) -> None:
    image = photo(3, 1)
    first = {n: augment(image, "a.png", n, seed, MEDIUM, 64) for n in range(1, 7)}
    again = {n: augment(image, "a.png", n, seed, MEDIUM, 64) for n in order}
    assert all(np.array_equal(first[n], again[n]) for n in first)


def test_name_number_and_seed_each_change_the_copy() -> None:
    image = photo(3, 1)
    views = [
        augment(image, name, number, seed, MEDIUM).tobytes()
        for name in ("a.png", "b.png")
        for number in (1, 2)
        for seed in (0, 1)
    ]
    assert len(set(views)) == 8


def test_hands_are_mirrored_but_never_turned_over() -> None:
    corner = np.zeros((64, 64, 3), np.uint8)
    corner[8:20, 8:20] = 255
    flips = _only(horizontal_flip=True)
    places = [_lit(augment(corner, f"{n}.png", 1, 0, flips)) for n in range(200)]
    left = sum(x < 0.5 for x, _ in places)
    assert 60 < left < 140
    assert all(y < 0.5 for _, y in places)


def test_switched_off_mirror_leaves_other_draws_as_they_are() -> None:
    image = photo(3, 1)
    straight = MEDIUM.model_copy(update={"horizontal_flip": False})
    same = [
        np.array_equal(
            augment(image, "a.png", n, 0, MEDIUM), augment(image, "a.png", n, 0, straight)
        )
        for n in range(1, 60)
    ]
    assert 10 < sum(same) < 50


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_shift_stays_within_its_share_of_the_side(seed: int) -> None:
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[28:36, 28:36] = 255
    x, y = _lit(augment(dot, "a.png", 1, seed, _only(shift=0.2)))
    assert abs(x - 0.5) < 0.21
    assert abs(y - 0.5) < 0.21


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_zoom_stays_within_its_share(seed: int) -> None:
    square = np.zeros((64, 64, 3), np.uint8)
    square[24:40, 24:40] = 255
    lit = (augment(square, "a.png", 1, seed, _only(zoom=0.2))[..., 0] > 127).sum()
    side = np.sqrt(lit) / (16 * INPUT_SIZE / 64)
    assert 0.77 < side < 1.23


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_turn_stays_within_its_angle(seed: int) -> None:
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[10:16, 29:35] = 255
    x, y = _lit(augment(dot, "a.png", 1, seed, _only(rotation=29)))
    assert abs(np.rad2deg(np.arctan2(x - 0.5, 0.5 - y))) < 30


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_light_stays_within_its_share(seed: int) -> None:
    grey = np.full((32, 32, 3), 120, np.uint8)
    made = augment(grey, "a.png", 1, seed, _only(brightness=0.1, contrast=0.5)).astype(int)
    assert np.abs(made - 120).max() <= 26
    assert np.ptp(made) <= 1


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_borders_go_on_so_no_new_colour_appears(seed: int) -> None:
    grey = np.full((32, 32, 3), 120, np.uint8)
    wild = _only(horizontal_flip=True, rotation=180, zoom=0.9, shift=0.5)
    assert np.unique(augment(grey, "a.png", 1, seed, wild)).tolist() == [120]


def test_beyond_the_border_no_second_hand_appears() -> None:
    bar = np.zeros((64, 64, 3), np.uint8)
    bar[:, 8:14] = 255
    far = augment(bar, "a.png", 1, 3, _only(zoom_out_prob=1, zoom_out_min=0.3, zoom=0.6))
    lit = (far[112, :, 0] > 127).astype(int)
    assert (np.diff(lit) == 1).sum() == 1


def test_a_share_of_the_copies_is_from_further_away() -> None:
    square = np.zeros((64, 64, 3), np.uint8)
    square[20:44, 20:44] = 255
    apart = _only(zoom_out_prob=0.3, zoom_out_min=0.4, zoom=0.2)
    made = [augment(square, "a.png", number, 5, apart, 192) for number in range(1, 401)]
    growth = np.array([np.sqrt((picture[..., 0] > 127).sum()) / 72 for picture in made])
    assert 0.38 <= growth.min() < 0.45
    assert 1.15 < growth.max() <= 1.22
    assert 0.23 <= (growth < 0.8).mean() <= 0.37


def test_opencv_has_its_threads_back_afterwards() -> None:
    before = cv2.getNumThreads()
    with single_threaded_opencv():
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == before

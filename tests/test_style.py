"""Photos of a batch trade what says how they were taken."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.regularizers import mix_styles


def features(seed: int, count: int = 8) -> np.ndarray:
    random = np.random.default_rng(seed)
    levels = random.uniform(-3, 3, (count, 1, 1, 6)), random.uniform(0.5, 2, (count, 1, 1, 6))
    return (levels[0] + levels[1] * random.normal(size=(count, 7, 7, 6))).astype(np.float32)


def style(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return maps.mean(axis=(1, 2)), maps.std(axis=(1, 2))


@given(seed=st.integers(0, 500), count=st.integers(1, 12))
def test_shapes_stay_and_styles_lie_between_two_of_the_batch(seed: int, count: int) -> None:
    before = features(seed, count)
    after = mix_styles(before, np.random.default_rng(seed), 1.0)
    (mean, deviation), (was_mean, was_deviation) = style(after), style(before)
    for now, was in ((mean, was_mean), (deviation, was_deviation)):
        assert (now >= was.min(axis=0) - 1e-3).all()
        assert (now <= was.max(axis=0) + 1e-3).all()
    shapes = [
        (maps - maps.mean(axis=(1, 2), keepdims=True)) / maps.std(axis=(1, 2), keepdims=True)
        for maps in (before, after)
    ]
    np.testing.assert_allclose(*shapes, atol=1e-3)


def test_some_photos_take_on_the_style_of_another() -> None:
    before = features(1, 32)
    after = mix_styles(before, np.random.default_rng(1), 1.0)
    moved = np.abs(style(after)[0] - style(before)[0]).max(axis=1) > 0.5
    assert 5 < moved.sum() < 28


def test_same_random_numbers_give_the_same_bits() -> None:
    first, again, other = (
        mix_styles(features(2), np.random.default_rng(seed), 1.0) for seed in (4, 4, 5)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (0.3, 300), (1.0, 1000)])
def test_probability_is_the_share_of_batches_mixed(probability: float, expected: int) -> None:
    batch = features(3, 2)
    random = np.random.default_rng(0)
    mixed = sum(mix_styles(batch, random, probability) is not batch for _ in range(1000))
    assert mixed == pytest.approx(expected, abs=50)


def test_a_map_of_one_place_stays_finite() -> None:
    mixed = mix_styles(features(0)[:, :1, :1], np.random.default_rng(0), 1.0)
    assert mixed.dtype == np.float32
    assert np.isfinite(mixed).all()

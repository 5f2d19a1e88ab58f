"""MixStyle, random erasing, weight averaging, and the fused Adam."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.training.cached import Adam
from tasks.training.regularizers import WeightAverage, mixstyle, random_erasing

Regularize = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]


def features(seed: int, count: int = 8) -> np.ndarray:
    random = np.random.default_rng(seed)
    levels = random.uniform(-3, 3, (count, 1, 1, 6)), random.uniform(0.5, 2, (count, 1, 1, 6))
    return (levels[0] + levels[1] * random.normal(size=(count, 7, 7, 6))).astype(np.float32)


def style(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return maps.mean(axis=(1, 2)), maps.std(axis=(1, 2))


@given(seed=st.integers(0, 500), count=st.integers(1, 12))
def test_mixstyle_keeps_shapes_and_mixes_statistics_within_the_batch(seed: int, count: int) -> None:
    before = features(seed, count)
    after = mixstyle(before, np.random.default_rng(seed), 1.0)
    (mean, deviation), (was_mean, was_deviation) = style(after), style(before)
    for now, was in ((mean, was_mean), (deviation, was_deviation)):
        assert (now >= was.min(axis=0) - 1e-3).all()
        assert (now <= was.max(axis=0) + 1e-3).all()
    shapes = [
        (maps - maps.mean(axis=(1, 2), keepdims=True)) / maps.std(axis=(1, 2), keepdims=True)
        for maps in (before, after)
    ]
    np.testing.assert_allclose(*shapes, atol=1e-3)


def test_mixstyle_moves_some_photos_to_another_style() -> None:
    before = features(1, 32)
    after = mixstyle(before, np.random.default_rng(1), 1.0)
    moved = np.abs(style(after)[0] - style(before)[0]).max(axis=1) > 0.5
    assert 5 < moved.sum() < 28


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (0.3, 300), (1.0, 1000)])
def test_mixstyle_probability_is_the_share_of_batches(probability: float, expected: int) -> None:
    batch = features(3, 2)
    random = np.random.default_rng(0)
    mixed = sum(mixstyle(batch, random, probability) is not batch for _ in range(1000))
    assert mixed == pytest.approx(expected, abs=50)


def test_mixstyle_of_a_map_of_one_place_is_finite() -> None:
    mixed = mixstyle(features(0)[:, :1, :1], np.random.default_rng(0), 1.0)
    assert mixed.dtype == np.float32
    assert np.isfinite(mixed).all()


@given(seed=st.integers(0, 500), count=st.integers(1, 9), side=st.integers(2, 9))
def test_erasing_removes_one_small_rectangle_in_every_channel(
    seed: int, count: int, side: int
) -> None:
    after = random_erasing(
        np.ones((count, side, side, 3), np.float32), np.random.default_rng(seed), 1.0
    )
    for photo in after:
        gone = photo == 0
        assert (gone == gone[..., :1]).all()
        rows, columns = np.nonzero(gone[..., 0])
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width
        assert max(height, width) <= max(side * 3 // 7, 1)


def test_erasing_reaches_every_place_and_leaves_the_rest_untouched() -> None:
    before = np.random.default_rng(1).uniform(1, 2, (400, 7, 7, 2)).astype(np.float32)
    after = random_erasing(before, np.random.default_rng(2), 1.0)
    assert (after == 0).any(axis=0).all()
    kept = after != 0
    assert np.array_equal(after[kept], before[kept])


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (0.5, 500), (1.0, 1000)])
def test_erasing_probability_is_the_share_of_photos(probability: float, expected: int) -> None:
    batch = np.ones((1000, 7, 7, 1), np.float32)
    after = random_erasing(batch, np.random.default_rng(0), probability)
    assert (after == 0).any(axis=(1, 2, 3)).sum() == pytest.approx(expected, abs=50)


def test_erasing_leaves_a_map_of_one_place_alone() -> None:
    batch = np.ones((4, 1, 1, 2), np.float32)
    assert random_erasing(batch, np.random.default_rng(0), 1.0) is batch


@pytest.mark.parametrize("regularize", [mixstyle, random_erasing])
def test_the_same_random_numbers_give_the_same_bits(regularize: Regularize) -> None:
    batch = features(2)
    first, again, other = (regularize(batch, np.random.default_rng(s), 1.0) for s in (4, 4, 5))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def averaged(values: list[float], share: float) -> tuple[WeightAverage, tf.Variable]:
    variable = tf.Variable(np.zeros(2, np.float32))
    average = WeightAverage([variable], len(values), share)
    for value in values:
        variable.assign(np.full(2, value, np.float32))
        average.update()
    return average, variable


@settings(deadline=None)
@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_last_updates_count_alike_and_the_first_not_at_all(
    values: list[float], share: float
) -> None:
    average, variable = averaged(values, share)
    average.keep()
    last = values[len(values) - max(round(share * len(values)), 1) :]
    np.testing.assert_allclose(variable.numpy(), np.mean(last), rtol=1e-4, atol=1e-4)


def test_before_that_the_present_values_are_scored() -> None:
    variable = tf.Variable(np.zeros(2, np.float32))
    average = WeightAverage([variable], updates=10, fraction=0.5)
    for value in (1.0, 5.0):
        variable.assign(np.full(2, value, np.float32))
        average.update()
    with average.applied():
        assert variable.numpy()[0] == 5


def test_average_in_place_gives_the_last_values_back() -> None:
    average, variable = averaged([1.0, 5.0], 1.0)
    with average.applied():
        assert variable.numpy()[0] == pytest.approx(3)
    assert variable.numpy()[0] == 5


def test_share_zero_keeps_the_last_values() -> None:
    average, variable = averaged([1.0, 5.0], 0.0)
    average.keep()
    assert variable.numpy()[0] == 5


def test_updates_are_those_of_keras_adam() -> None:
    start = [np.random.default_rng(0).normal(size=size).astype("f4") for size in ((5, 4), (4,))]

    def trained(update: Callable[..., None], variables: list[Any]) -> list[np.ndarray]:
        random = np.random.default_rng(1)
        for scale in np.logspace(-6, 3, 12):
            update([tf.constant(scale * random.normal(size=v.shape), tf.float32) for v in start])
        return [variable.numpy() for variable in variables]

    ours = [tf.Variable(value) for value in start]
    theirs = [keras.Variable(value) for value in start]
    reference = keras.optimizers.Adam(0.05)
    reference.build(theirs)
    pairs = zip(
        trained(Adam(ours, 0.05).apply, ours),
        trained(lambda gradients: reference.apply(gradients, theirs), theirs),
        strict=True,
    )
    for left, right in pairs:
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours[0], start[0], atol=1e-2)

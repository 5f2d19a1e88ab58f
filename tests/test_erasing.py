"""Patches of a feature map that a tail does not get to see."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.regularizers import erase_patches


@given(seed=st.integers(0, 500), count=st.integers(1, 9), side=st.integers(2, 9))
def test_what_is_gone_is_one_small_rectangle_in_every_channel(
    seed: int, count: int, side: int
) -> None:
    after = erase_patches(
        np.ones((count, side, side, 3), np.float32), np.random.default_rng(seed), 1.0
    )
    for photo in after:
        gone = photo == 0
        assert (gone == gone[..., :1]).all()
        rows, columns = np.nonzero(gone[..., 0])
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width
        assert max(height, width) <= max(side * 3 // 7, 1)


def test_every_place_is_erased_sometimes_and_what_stays_is_untouched() -> None:
    before = np.random.default_rng(1).uniform(1, 2, (400, 7, 7, 2)).astype(np.float32)
    after = erase_patches(before, np.random.default_rng(2), 1.0)
    assert (after == 0).any(axis=0).all()
    kept = after != 0
    assert np.array_equal(after[kept], before[kept])


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (0.5, 500), (1.0, 1000)])
def test_probability_is_the_share_of_photos_that_lose_a_patch(
    probability: float, expected: int
) -> None:
    batch = np.ones((1000, 7, 7, 1), np.float32)
    after = erase_patches(batch, np.random.default_rng(0), probability)
    assert (after == 0).any(axis=(1, 2, 3)).sum() == pytest.approx(expected, abs=50)


def test_same_random_numbers_give_the_same_bits() -> None:
    batch = np.ones((8, 7, 7, 2), np.float32)
    first, again, other = (
        erase_patches(batch, np.random.default_rng(seed), 0.5) for seed in (4, 4, 5)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_map_of_one_place_stays_whole() -> None:
    batch = np.ones((4, 1, 1, 2), np.float32)
    assert erase_patches(batch, np.random.default_rng(0), 1.0) is batch

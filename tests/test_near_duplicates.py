"""Near-duplicate search: exact in small groups, bounded in large ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.near_duplicates import (
    REPRESENTATIVES,
    NearDuplicates,
    find_near_duplicates,
    perceptual_hash,
    rms_difference,
)
from tests.fixtures.photos import photo


def _hashes(pictures: np.ndarray) -> np.ndarray:
    return np.array([perceptual_hash(np.ascontiguousarray(one)) for one in pictures], np.uint64)


def _find(
    pictures: np.ndarray, hash_distance: int = 10, rms: float = 6.0, kinds: object = None
) -> NearDuplicates:
    kinds = np.zeros(len(pictures), np.int64) if kinds is None else np.array(kinds)
    mirrored = _hashes(pictures[:, :, ::-1])
    return find_near_duplicates(pictures, _hashes(pictures), mirrored, kinds, hash_distance, rms)


def _pictures(count: int) -> np.ndarray:
    return np.stack([photo(seed % 6, seed) for seed in range(count)])


def _noisy(picture: np.ndarray, seed: int, noise: int = 3) -> np.ndarray:
    random = np.random.default_rng(seed)
    changed = picture.astype(int) + random.integers(-noise, noise + 1, picture.shape)
    return np.clip(changed, 0, 255).astype(np.uint8)


def test_difference_spans_the_whole_scale() -> None:
    black, white, grey = (np.full((4, 4, 3), value, np.uint8) for value in (0, 255, 3))
    assert [rms_difference(black, other) for other in (white, grey, black)] == [255.0, 3.0, 0.0]


@pytest.mark.parametrize("turn", [1, -1])
def test_a_noisy_copy_or_mirror_image_is_found_with_its_difference(turn: int) -> None:
    pictures = _pictures(12)
    copy = _noisy(pictures[5, :, ::turn], 0)
    found = _find(np.concatenate([pictures, copy[None]]))
    assert found.pairs.tolist() == [[5, 12]]
    assert 1.0 < found.rms[0] < 3.0
    assert len(set(found.groups.tolist())) == 12


def test_a_symmetric_picture_is_found_once_with_the_smaller_difference() -> None:
    half = _pictures(1)[:, :, :32]
    pictures = np.repeat(np.concatenate([half, half[:, :, ::-1]], axis=2), 3, axis=0)
    pictures[2, 5, 5] += 9
    found = _find(pictures, hash_distance=64)
    assert found.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert found.rms.tolist() == [
        rms_difference(pictures[one], pictures[other]) for one, other in found.pairs
    ]


@pytest.mark.parametrize(
    ("distance", "rms", "found"), [(64, 6.0, 0), (0, 255.0, 0), (64, 255.0, 1)]
)
def test_both_hashes_and_pixels_must_be_close(distance: int, rms: float, found: int) -> None:
    assert len(_find(_pictures(2), distance, rms).pairs) == found


@pytest.mark.parametrize("grey", [6, 7])
def test_limits_are_inclusive(grey: int) -> None:
    pictures = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, grey)])
    hashes, mirrored = np.array([0, 0b111], np.uint64), np.array([2**64 - 1] * 2, np.uint64)
    kinds = np.zeros(2, np.int64)
    for distance in (2, 3):
        found = find_near_duplicates(pictures, hashes, mirrored, kinds, distance, 6.0)
        assert len(found.pairs) == (grey <= 6 and distance >= 3)


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(4, 40))
@settings(max_examples=30, deadline=None)
def test_search_agrees_with_comparing_every_pair(seed: int, distance: int, rms: int) -> None:
    random = np.random.default_rng(seed)
    base = _pictures(3)
    turns = [base[random.integers(3), :, :: random.choice([1, -1])] for _ in range(14)]
    pictures = np.stack([_noisy(one, n, random.integers(1, 60)) for n, one in enumerate(turns)])
    hashes, mirrored = _hashes(pictures), _hashes(pictures[:, :, ::-1])
    expected = {}
    for left in range(14):
        for right in range(left + 1, 14):
            turned = (hashes[left] ^ mirrored[right], mirrored[left] ^ hashes[right])
            for turn, bits in ((1, [hashes[left] ^ hashes[right]]), (-1, turned)):
                gap = pictures[left].astype(float) - pictures[right][:, ::turn]
                difference = np.sqrt((gap**2).mean())
                if min(int(one).bit_count() for one in bits) <= distance and difference <= rms:
                    known = expected.get((left, right), 255.0)
                    expected[left, right] = min(known, difference)
    found = _find(pictures, distance, rms)
    assert list(map(tuple, found.pairs.tolist())) == list(expected)
    assert found.rms.tolist() == pytest.approx(list(expected.values()))


def test_pairs_are_found_across_blocks_of_a_large_set() -> None:
    random = np.random.default_rng(3)
    pictures = random.integers(0, 256, (3000, 4, 4, 3)).astype(np.uint8)
    pictures[2999] = pictures[17]
    pictures[1500] = pictures[5, :, ::-1]
    hashes = np.zeros(3000, np.uint64)
    found = find_near_duplicates(pictures, hashes, hashes, np.zeros(3000, np.int64), 0, 2.0)
    assert found.pairs.tolist() == [[5, 1500], [17, 2999]]


def test_near_duplicates_of_near_duplicates_are_one_group() -> None:
    pictures = np.stack([photo(1, 1) // 2 + shade for shade in (0, 50, 5, 10)]).astype(np.uint8)
    groups = _find(pictures).groups
    assert groups[0] == groups[2] == groups[3] != groups[1]


@pytest.mark.parametrize("size", [REPRESENTATIVES, 20 * REPRESENTATIVES])
def test_a_burst_is_one_group_and_its_work_is_bounded(size: int) -> None:
    base = photo(2, 0)
    pictures = np.stack([_noisy(base, seed) for seed in range(size)])
    hashes = np.full(size, perceptual_hash(base), np.uint64)
    found = find_near_duplicates(pictures, hashes, ~hashes, np.zeros(size, np.int64), 10, 6.0)
    assert len(set(found.groups.tolist())) == 1
    assert len(found.pairs) <= size * REPRESENTATIVES
    assert len(set(found.representatives.tolist())) == min(size, REPRESENTATIVES)
    rms = {tuple(pair): rms for pair, rms in zip(found.pairs.tolist(), found.rms, strict=True)}
    for row, other in enumerate(found.representatives.tolist()):
        if row != other:  # the closest of those that were compared
            pairs = [pair for pair in rms if row in pair]
            assert rms[min(row, other), max(row, other)] == min(rms[pair] for pair in pairs)


def test_a_photo_of_another_kind_is_compared_with_a_burst_directly() -> None:
    base = photo(2, 0)
    size = 3 * REPRESENTATIVES
    pictures = np.stack([_noisy(base, seed) for seed in range(size)])
    found = _find(pictures, kinds=[int(row == 7) for row in range(size)])
    assert found.representatives[7] == 7
    # Every other photo is known to be close to it, by itself or by its representative.
    close = {row for pair in found.pairs.tolist() if 7 in pair for row in pair}
    assert all(int(one) in close for one in found.representatives)


def test_the_darkest_photo_of_a_block_is_compared_with_those_before_it() -> None:
    greys = [10] * 256 + [12, 200]
    pictures = np.array(greys, np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    hashes = np.random.default_rng(1).integers(0, 2**63, 258).astype(np.uint64)
    hashes[256] = hashes[7]
    found = find_near_duplicates(pictures, hashes, ~hashes, np.zeros(258, np.int64), 0, 6.0)
    assert found.pairs.tolist() == [[7, 256]]

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


@pytest.mark.parametrize("turn", [1, -1])
def test_a_noisy_copy_or_mirror_image_is_found_with_its_difference(turn: int) -> None:
    pictures = _pictures(12)
    copy = _noisy(pictures[5, :, ::turn], 0)
    found = _find(np.concatenate([pictures, copy[None]]))
    assert found.pairs.tolist() == [[5, 12]]
    assert 1.0 < found.rms[0] < 3.0


def test_different_photos_are_not_near_duplicates() -> None:
    assert len(_find(_pictures(30), hash_distance=64).pairs) == 0


def test_symmetric_pictures_are_one_pair() -> None:
    half = _pictures(1)[:, :, :32]
    pictures = np.repeat(np.concatenate([half, half[:, :, ::-1]], axis=2), 3, axis=0)
    assert _find(pictures).pairs.tolist() == [[0, 1], [0, 2], [1, 2]]


@pytest.mark.parametrize(
    ("distance", "rms", "found"), [(64, 6.0, 0), (0, 255.0, 0), (64, 255.0, 1)]
)
def test_both_hashes_and_pixels_must_be_close(distance: int, rms: float, found: int) -> None:
    assert len(_find(_pictures(2), distance, rms).pairs) == found


def test_difference_spans_the_whole_scale() -> None:
    black, white, grey = (np.full((4, 4, 3), value, np.uint8) for value in (0, 255, 3))
    assert [rms_difference(black, other) for other in (white, grey, black)] == [255.0, 3.0, 0.0]


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(4, 40))
@settings(max_examples=40, deadline=None)
def test_search_agrees_with_comparing_every_pair(seed: int, distance: int, rms: int) -> None:
    random = np.random.default_rng(seed)
    base = _pictures(3)
    pictures = np.stack(
        [
            _noisy(
                base[random.integers(3), :, :: random.choice([1, -1])], n, random.integers(1, 60)
            )
            for n in range(14)
        ]
    )
    hashes, mirrored = _hashes(pictures), _hashes(pictures[:, :, ::-1])
    expected = []
    for left in range(14):
        for right in range(left + 1, 14):
            bits = [
                min(int(one).bit_count() for one in ones)
                for ones in (
                    [hashes[left] ^ hashes[right]],
                    [hashes[left] ^ mirrored[right], mirrored[left] ^ hashes[right]],
                )
            ]
            gaps = [
                np.sqrt(((pictures[left].astype(float) - pictures[right][:, ::turn]) ** 2).mean())
                for turn in (1, -1)
            ]
            if any(b <= distance and gap <= rms for b, gap in zip(bits, gaps, strict=True)):
                expected.append([left, right])
    assert _find(pictures, distance, rms).pairs.tolist() == expected


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


@pytest.mark.parametrize("size", [REPRESENTATIVES, 40 * REPRESENTATIVES])
def test_a_burst_is_one_group_and_its_work_is_bounded(size: int) -> None:
    base = photo(2, 0)
    pictures = np.stack([_noisy(base, seed) for seed in range(size)])
    hashes = np.full(size, perceptual_hash(base), np.uint64)
    found = find_near_duplicates(pictures, hashes, ~hashes, np.zeros(size, np.int64), 10, 6.0)
    assert len(set(found.groups.tolist())) == 1
    assert len(found.pairs) <= size * REPRESENTATIVES
    assert len(set(found.representatives.tolist())) == min(size, REPRESENTATIVES)


def test_a_photo_of_another_kind_is_compared_with_a_burst_directly() -> None:
    base = photo(2, 0)
    size = 3 * REPRESENTATIVES
    pictures = np.stack([_noisy(base, seed) for seed in range(size)])
    found = _find(pictures, kinds=[int(row == 7) for row in range(size)])
    assert found.representatives[7] == 7
    # Every other photo is known to be close to it, by itself or by its representative.
    close = {row for pair in found.pairs.tolist() if 7 in pair for row in pair}
    assert all(int(one) in close for one in found.representatives)

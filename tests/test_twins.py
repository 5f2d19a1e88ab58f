"""Near-duplicate search: complete, exact on pixels, and fast enough for ten times the set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.near_duplicates import difference, find_twins, group, perceptual_hash
from tests.fixtures.photos import photo


def _hashes(pictures: np.ndarray) -> np.ndarray:
    return np.array([perceptual_hash(picture) for picture in pictures], dtype=np.uint64)


def _turned(pictures: np.ndarray) -> np.ndarray:
    return _hashes(np.ascontiguousarray(pictures[:, :, ::-1]))


def _pictures(count: int) -> np.ndarray:
    return np.stack([photo(seed % 6, seed) for seed in range(count)])


@pytest.mark.parametrize("turn", [1, -1])
def test_a_noisy_copy_or_mirror_image_is_found_with_its_difference(turn: int) -> None:
    pictures = _pictures(12)
    noise = np.random.default_rng(0).integers(-3, 4, pictures[5].shape)
    copy = np.clip(pictures[5, :, ::turn].astype(int) + noise, 0, 255).astype(np.uint8)
    pictures = np.concatenate([pictures, copy[None]])
    twins = find_twins(pictures, _hashes(pictures), _turned(pictures), 10, 6.0)
    assert twins.pairs.tolist() == [[5, 12]]
    assert 1.0 < twins.rms[0] < 3.0
    assert twins.distances[0] <= 10


def test_different_photos_are_not_twins() -> None:
    pictures = _pictures(30)
    assert len(find_twins(pictures, _hashes(pictures), _turned(pictures), 64, 6.0).pairs) == 0


def test_pictures_that_are_their_own_mirror_images_are_one_pair() -> None:
    half = _pictures(1)[:, :, :32]
    pictures = np.repeat(np.concatenate([half, half[:, :, ::-1]], axis=2), 3, axis=0)
    twins = find_twins(pictures, _hashes(pictures), _turned(pictures), 10, 6.0)
    assert twins.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]


def test_close_hashes_alone_do_not_make_twins() -> None:
    pictures = _pictures(2)
    hashes = np.zeros(2, np.uint64)
    assert len(find_twins(pictures, hashes, hashes, 0, 6.0).pairs) == 0
    assert find_twins(pictures, hashes, hashes, 0, 255.0).pairs.tolist() == [[0, 1]]


def test_close_pixels_alone_do_not_make_twins() -> None:
    pictures = np.repeat(_pictures(1), 2, axis=0)
    hashes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert len(find_twins(pictures, hashes, hashes, 63, 6.0).pairs) == 0
    assert find_twins(pictures, hashes, hashes, 64, 6.0).distances.tolist() == [64]


@given(st.integers(0, 2**32 - 1), st.integers(0, 64))
@settings(max_examples=40, deadline=None)
def test_search_agrees_with_comparing_every_pair(seed: int, distance: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, 14, dtype=np.uint64)
    hashes[7:] = hashes[:7] ^ (np.uint64(1) << random.integers(0, 64, 7, dtype=np.uint64))
    mirrored = random.permutation(hashes)
    pictures = random.integers(0, 256, (14, 2, 2, 3)).astype(np.uint8)
    found = find_twins(pictures, hashes, mirrored, distance, 90.0)
    expected = []
    for left in range(14):
        for right in range(left + 1, 14):
            near = False
            for others, turn in ((hashes, 1), (mirrored, -1)):
                bits = (int(hashes[left]) ^ int(others[right])).bit_count()
                gap = pictures[left].astype(float) - pictures[right][:, ::turn]
                near |= bits <= distance and np.sqrt((gap**2).mean()) <= 90.0
            if near:
                expected.append([left, right])
    assert found.pairs.tolist() == expected


def test_pairs_are_found_across_blocks_of_a_large_set() -> None:
    count = 12_000
    random = np.random.default_rng(3)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    hashes[11_999] = hashes[17] ^ np.uint64(0b1011)
    hashes[7_001] = hashes[5_000]
    pictures = np.zeros((count, 1, 1, 3), np.uint8)
    elsewhere = random.integers(0, 2**64, count, dtype=np.uint64)
    elsewhere[9_000] = hashes[8_000]
    twins = find_twins(pictures, hashes, elsewhere, 3, 0.0)
    assert twins.pairs.tolist() == [[17, 11_999], [5_000, 7_001], [8_000, 9_000]]
    assert twins.distances.tolist() == [3, 0, 0]


def test_difference_spans_the_whole_scale() -> None:
    pictures = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 255, 3)])
    pairs = np.array([[0, 1], [0, 2], [1, 1]])
    assert difference(pictures, pairs).tolist() == [255.0, 3.0, 0.0]


def test_twins_of_twins_are_one_group() -> None:
    groups = group(6, [(0, 3), (3, 5), (1, 2)])
    assert groups[0] == groups[3] == groups[5]
    assert groups[1] == groups[2]
    assert len(set(groups.tolist())) == 3


@pytest.mark.parametrize("count", [0, 4])
def test_photos_without_twins_are_groups_of_their_own(count: int) -> None:
    assert len(set(group(count, []).tolist())) == count

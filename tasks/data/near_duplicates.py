"""Photos that are nearly the same picture, or its mirror image: bursts, copies, new encodings."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Pairs = NDArray[np.int64]

_COMPARED = 1 << 22
"""Pairs of hashes compared at a time, so that memory does not grow with the photos."""
_CHUNK = 128


@dataclass(frozen=True)
class Twins:
    """Pairs of near-identical pictures, sorted by their rows.

    Args:
        pairs: int64, (m, 2); two rows each, the smaller first.
        distances: int64, (m,); bits in which the perceptual hashes differ.
        rms: float64, (m,); root-mean-square difference, 0 to 255.
    """

    pairs: Pairs
    distances: NDArray[np.int64]
    rms: NDArray[np.float64]


def perceptual_hash(picture: NDArray[np.uint8]) -> int:
    """Hash a picture so that pictures that look alike differ in few bits.

    Args:
        picture: uint8, (height, width, 3), RGB.

    Returns:
        64 bits: signs of the lowest 8x8 cosine frequencies of the grey picture about
        their median (`imagehash.phash`).
    """
    return int(str(imagehash.phash(Image.fromarray(picture))), 16)


def find_twins(
    pictures: NDArray[np.uint8],
    hashes: NDArray[np.uint64],
    mirrored: NDArray[np.uint64],
    hash_distance: int,
    twin_rms: float,
) -> Twins:
    """Find all pairs that are close by hash and confirmed on pixels, as they are or mirrored.

    Hashes are compared with each other in whole blocks, 64 bits at a time; pixels
    only where the hashes are close.

    Args:
        pictures: uint8, (n, side, side, 3); all at one small size.
        hashes: uint64, (n,); `perceptual_hash` of each.
        mirrored: uint64, (n,); that of each one's mirror image.
        hash_distance: most bits in which a pair's hashes may differ.
        twin_rms: largest root-mean-square difference of a pair, 0 to 255.

    Returns:
        The pairs found.
    """
    kept: list[tuple[Pairs, NDArray[np.int64], NDArray[np.float64]]] = [
        (np.empty((0, 2), np.int64), np.empty(0, np.int64), np.empty(0, np.float64))
    ]
    for others, turned in ((hashes, False), (mirrored, True)):
        for pairs, distances in _near_by_hash(hashes, others, hash_distance):
            rms = difference(pictures, pairs, turned)
            near = rms <= twin_rms
            kept.append((pairs[near], distances[near], rms[near]))
    pairs, distances, rms = (np.concatenate(part) for part in zip(*kept, strict=True))
    # A picture that is its own mirror image is found both ways; the nearer one stands first.
    order = np.lexsort((rms, pairs[:, 1], pairs[:, 0]))
    again = np.append(False, ~np.diff(pairs[order], axis=0).any(axis=1))[: len(order)]
    once = order[~again]
    return Twins(pairs[once], distances[once], rms[once])


def difference(
    pictures: NDArray[np.uint8], pairs: Pairs, mirrored: bool = False
) -> NDArray[np.float64]:
    """Root-mean-square difference of each pair, over all pixels and channels.

    Args:
        pictures: uint8, (n, side, side, 3).
        pairs: int64, (m, 2); rows of `pictures`.
        mirrored: compare each pair's first with the mirror image of its second.

    Returns:
        float64, (m,); 0 for the same picture, 255 for black against white.
    """
    others = pictures[:, :, ::-1] if mirrored else pictures
    squares = np.empty(len(pairs), np.int64)
    for start in range(0, len(pairs), _CHUNK):
        left, right = pairs[start : start + _CHUNK].T
        gap = pictures[left].astype(np.int64) - others[right]
        squares[start : start + _CHUNK] = np.einsum("ijkl,ijkl->i", gap, gap)
    root: NDArray[np.float64] = np.sqrt(squares / pictures[0].size)
    return root


def group(count: int, pairs: Iterable[tuple[int, int]] | Pairs) -> NDArray[np.int64]:
    """Join rows that are twins, or twins of twins.

    Args:
        count: number of rows.
        pairs: pairs of rows.

    Returns:
        int64, (count,); the group of each row, the same number for the same group.
    """
    edges = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), (count, count))
    members: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return members


def _near_by_hash(
    hashes: NDArray[np.uint64], others: NDArray[np.uint64], distance: int
) -> Iterator[tuple[Pairs, NDArray[np.int64]]]:
    block = max(1, _COMPARED // max(1, len(hashes)))
    for start in range(0, len(hashes), block):
        bits = np.bitwise_count(hashes[start : start + block, None] ^ others[None, start:])
        left, right = np.nonzero(np.triu(bits <= distance, k=1))
        yield np.stack([left, right], axis=1) + start, bits[left, right].astype(np.int64)

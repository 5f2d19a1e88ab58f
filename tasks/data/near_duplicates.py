"""Find near-duplicate photos: bursts, copies, other encodings, and mirror images of these."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

REPRESENTATIVES = 64
"""A photo with this many near-duplicates of its own kind is not compared with later ones."""

_BLOCK = 256
_CHUNK = 4096
_GRID = 4
_ROUNDING = 0.05
"""Of float32 sums of squares, as a root-mean-square difference."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of near-duplicates, sorted by row.

    Args:
        pairs: int64, (m, 2); two rows each, the smaller first. All pairs, if no photo has
            more than `REPRESENTATIVES` near-duplicates; else enough to join the groups.
        rms: float64, (m,); root-mean-square difference of the pixels, 0 to 255.
        representatives: int64, (n,); the row itself, or the near-duplicate of the same
            kind that was compared with the other photos instead.
    """

    pairs: Rows
    rms: NDArray[np.float64]
    representatives: Rows

    @property
    def groups(self) -> Rows:
        """int64, (n,); the group of each row: near-duplicates, and their near-duplicates."""
        count = len(self.representatives)
        edges = (np.ones(len(self.pairs), bool), self.pairs.T)
        graph = coo_array(edges, (count, count))
        members: Rows = connected_components(graph, directed=False)[1].astype(np.int64)
        return members


def perceptual_hash(picture: NDArray[np.uint8]) -> int:
    """64-bit `imagehash.phash` of uint8 (height, width, 3) RGB."""
    return int.from_bytes(np.packbits(imagehash.phash(Image.fromarray(picture)).hash).tobytes())


def find_near_duplicates(
    pictures: NDArray[np.uint8],
    hashes: NDArray[np.uint64],
    mirrored: NDArray[np.uint64],
    kinds: Rows,
    max_hash_distance: int,
    max_rms: float,
) -> NearDuplicates:
    """Find pairs whose hashes and pixels are close, as they are or mirrored.

    Photos are compared in the order of their brightness, each with representatives that
    are about as bright, because the root-mean-square difference of two pictures is at
    least the difference of their brightness.

    Args:
        pictures: uint8, (n, side, side, 3).
        hashes: uint64, (n,); `perceptual_hash` of each picture.
        mirrored: uint64, (n,); that of each mirror image.
        kinds: int64, (n,); a photo is only represented by one of its kind.
        max_hash_distance: bits in which the hashes of a pair may differ.
        max_rms: largest root-mean-square difference of a pair, 0 to 255.
    """
    coarse = _coarse(pictures)
    brightness = coarse.mean(axis=1, dtype=np.float64)
    order = np.argsort(brightness, kind="stable")
    near: list[tuple[int, int, float]] = []
    represented_by = np.arange(len(pictures))
    active = np.empty(0, np.int64)
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        active = active[brightness[active] >= brightness[block[0]] - max_rms - _ROUNDING]
        found = defaultdict(list)
        for left, right in _close_colors(coarse, block, active, max_rms):
            for turned in (False, True):
                one, other = (hashes, mirrored) if turned else (hashes, hashes)
                bits = np.bitwise_count(one[left] ^ other[right])
                if turned:
                    bits = np.minimum(bits, np.bitwise_count(other[left] ^ one[right]))
                close = bits <= max_hash_distance
                for row, earlier in zip(left[close].tolist(), right[close].tolist(), strict=True):
                    rms = rms_difference(pictures[row], pictures[earlier], turned)
                    if rms <= max_rms:
                        found[row].append((rms, earlier))
        for row in block.tolist():
            others = [(rms, other) for rms, other in found[row] if represented_by[other] == other]
            near += [(min(row, other), max(row, other), rms) for rms, other in others]
            same = {other: rms for rms, other in others if kinds[other] == kinds[row]}
            if len(same) >= REPRESENTATIVES:
                represented_by[row] = min(same, key=lambda other: (same[other], other))
        active = np.concatenate([active, block[represented_by[block] == block]])
    # A picture that is its own mirror image is found twice.
    closest = {(left, right): rms for left, right, rms in sorted(near, reverse=True)}
    pairs = np.array(sorted(closest), np.int64).reshape(-1, 2)
    return NearDuplicates(
        pairs, np.array([closest[pair] for pair in sorted(closest)]), represented_by
    )


def rms_difference(
    one: NDArray[np.uint8], other: NDArray[np.uint8], mirrored: bool = False
) -> float:
    """Root-mean-square difference of two uint8 pictures, 0 to 255."""
    turned = np.ascontiguousarray(other[:, ::-1]) if mirrored else other
    return float(np.sqrt(cv2.norm(one, turned, cv2.NORM_L2SQR) / one.size))


def _coarse(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colors of a grid's cells and their mirror images, float32 (n, d).

    Two pictures differ by at least the root-mean-square difference of these.
    """
    count, side = pictures.shape[:2]
    grid = _GRID if side % _GRID == 0 else 1
    cells = pictures.reshape(count, grid, side // grid, grid, side // grid, 3)
    means = cells.mean(axis=(2, 4), dtype=np.float32)
    both: NDArray[np.float32] = (means + means[:, :, ::-1])[:, :, : (grid + 1) // 2] / 2
    return both.reshape(count, -1)


def _close_colors(
    coarse: NDArray[np.float32], block: Rows, active: Rows, max_rms: float
) -> Iterator[tuple[Rows, Rows]]:
    """Rows of `block`, each with an active row or an earlier one of `block`."""
    limit = coarse.shape[1] * (max_rms + _ROUNDING) ** 2

    def within(others: Rows) -> NDArray[np.bool_]:
        # |a - b|^2 <= limit, as one matrix product.
        ours, theirs = coarse[block], coarse[others]
        reach = np.square(ours).sum(axis=1) - limit
        near: NDArray[np.bool_] = (
            2 * (ours @ theirs.T) - np.square(theirs).sum(axis=1) >= reach[:, None]
        )
        return near

    for start in range(0, len(active), _CHUNK):
        others = active[start : start + _CHUNK]
        left, right = np.nonzero(within(others))
        yield block[left], others[right]
    left, right = np.nonzero(np.tril(within(block), k=-1))
    yield block[left], block[right]

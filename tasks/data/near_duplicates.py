"""Find near-duplicate photos: bursts, copies, other encodings, and mirror images of these."""

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
_GRID = 4
_ROUNDING = 0.1
"""Of float32 sums, as a root-mean-square difference."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of near-duplicates, sorted by row.

    Args:
        pairs: (m, 2); the smaller row first. All pairs, if no photo has more than
            `REPRESENTATIVES` near-duplicates; else enough to join the groups.
        rms: (m,); root-mean-square difference of the pixels, 0 to 255.
        representatives: (n,); the row itself, or the near-duplicate of the same kind that
            was compared with the other photos instead.
    """

    pairs: Rows
    rms: NDArray[np.float64]
    representatives: Rows

    @property
    def groups(self) -> Rows:
        """The group of each row: near-duplicates, and their near-duplicates."""
        count = len(self.representatives)
        graph = coo_array((np.ones(len(self.pairs), bool), self.pairs.T), (count, count))
        members: Rows = connected_components(graph)[1].astype(np.int64)
        return members


def perceptual_hash(picture: NDArray[np.uint8]) -> int:
    """64-bit `imagehash.phash` of uint8 (height, width, 3) RGB."""
    return int.from_bytes(np.packbits(imagehash.phash(Image.fromarray(picture)).hash).tobytes())


def rms_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Root-mean-square difference of two uint8 pictures, 0 to 255."""
    return float(np.sqrt(cv2.norm(one, np.ascontiguousarray(other), cv2.NORM_L2SQR) / one.size))


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
    least the difference of their brightness, and that of their coarse colors.

    Args:
        pictures: (n, side, side, 3); the side is a multiple of 4.
        hashes: (n,); `perceptual_hash` of each picture.
        mirrored: (n,); that of each mirror image.
        kinds: (n,); a photo is only represented by one of its kind.
    """
    colors = _coarse_colors(pictures)
    brightness = colors.mean(axis=1, dtype=np.float64)
    order = np.argsort(brightness, kind="stable")
    squares, reach = np.square(colors).sum(axis=1), max_rms + _ROUNDING
    closest: dict[tuple[int, int], float] = {}
    represented_by = np.arange(len(pictures))
    active = np.empty(0, np.int64)
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        active = active[brightness[active] >= brightness[block[0]] - reach]
        others = np.concatenate([active, block])
        # |a - b|^2, as one matrix product; only with those before a row.
        apart = squares[block, None] + squares[others] - 2 * colors[block] @ colors[others].T
        near = apart <= colors.shape[1] * reach**2
        rows, columns = np.nonzero(np.tril(near, k=len(active) - 1))
        left, right = block[rows], others[columns]
        plain = np.bitwise_count(hashes[left] ^ hashes[right])
        turned = np.minimum(
            np.bitwise_count(hashes[left] ^ mirrored[right]),
            np.bitwise_count(mirrored[left] ^ hashes[right]),
        )
        found: dict[int, dict[int, float]] = {row: {} for row in block.tolist()}
        for step, bits in ((1, plain), (-1, turned)):
            close = bits <= max_hash_distance
            for row, other in zip(left[close].tolist(), right[close].tolist(), strict=True):
                rms = rms_difference(pictures[row], pictures[other][:, ::step])
                if rms <= max_rms:  # a picture that is its own mirror image is found twice
                    found[row][other] = min(rms, found[row].get(other, rms))
        for row, pairs in found.items():
            kept = {other: rms for other, rms in pairs.items() if represented_by[other] == other}
            closest |= {(min(row, other), max(row, other)): rms for other, rms in kept.items()}
            same = [(rms, other) for other, rms in kept.items() if kinds[other] == kinds[row]]
            if len(same) >= REPRESENTATIVES:
                represented_by[row] = min(same)[1]
        active = np.concatenate([active, block[represented_by[block] == block]])
    ordered = sorted(closest)
    return NearDuplicates(
        pairs=np.array(ordered, np.int64).reshape(len(ordered), 2),
        rms=np.array([closest[pair] for pair in ordered]),
        representatives=represented_by,
    )


def _coarse_colors(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colors, less 128, of a 4x4 grid's cells and their mirror images, float32 (n, 24)."""
    count, side = pictures.shape[:2]
    cells = pictures.reshape(count, _GRID, side // _GRID, _GRID, side // _GRID, 3)
    means = cells.mean(axis=(2, 4), dtype=np.float32) - 128
    both: NDArray[np.float32] = (means + means[:, :, ::-1])[:, :, : _GRID // 2] / 2
    return both.reshape(count, both[0].size)

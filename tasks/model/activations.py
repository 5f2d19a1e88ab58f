"""Activations of the frozen trunk: computed in shards, here or on a cluster, and stored.

`features.npy` is float16 (rows, h, w, 192); `index.json` names rows and what they depend on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tasks.errors import DataError, ModelError
from tasks.io import atomic_directory, read_json, sha256, write_json
from tasks.model.augment import augment
from tasks.model.inference import Engine
from tasks.params import AugmentationParams

ROWS = "features.npy"
INDEX = "index.json"
DTYPE = np.dtype("<f2")
SHARD_ROWS = 512
"""Two seconds of work on two cores, 10 MB of results."""

Row = NDArray[np.float16]
CacheKey = dict[str, Any]
"""Everything besides photo and copy that a row depends on; JSON."""


class Key(NamedTuple):
    """What a row was computed from: a photo's name, the copy's number, and the pixels' digest."""

    name: str
    copy: int
    pixels: str


@dataclass(frozen=True, eq=False)
class Features:
    """Rows of a store, which are read from disk as they are used."""

    keys: list[Key]
    rows: NDArray[Any]
    cache_key: CacheKey

    @cached_property
    def _numbers(self) -> dict[tuple[str, int], int]:
        return {(key.name, key.copy): number for number, key in enumerate(self.keys)}

    def row(self, name: str, copy: int) -> int:
        """Number of a row, for `batch`; copy 0 is the photo itself."""
        number = self._numbers.get((name, copy))
        if number is None:
            raise DataError(
                f"The features have no copy {copy} of '{name}'. Run the features stage again."
            )
        return number

    def batch(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(self.rows[rows], np.float32)


def open_features(folder: Path) -> Features:
    """Open a store; DataError if it is missing or damaged."""
    try:
        index = read_json(folder / INDEX)
        keys = [Key(*key) for key in index["keys"]]
        if sha256(folder / ROWS) != index["sha256"]:
            raise ValueError(f"{ROWS} and {INDEX} do not match")
        rows = np.load(folder / ROWS, mmap_mode="r" if keys else None)
        return Features(keys, rows, index["cache_key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The features in '{folder}' cannot be opened ({error}). Run the features stage again."
        ) from error


def write_features(
    folder: Path, cache_key: CacheKey, shape: tuple[int, ...], rows: Sequence[tuple[Key, Row]]
) -> None:
    """Write a store atomically; `shape` is that of a row."""
    with atomic_directory(folder) as new:
        # Not a memory map: a full disk would end the process instead of raising OSError.
        with (new / ROWS).open("wb") as file:
            header = {"descr": DTYPE.str, "fortran_order": False, "shape": (len(rows), *shape)}
            npy.write_array_header_1_0(file, header)
            file.writelines(row.tobytes() for _, row in rows)
        index = {"cache_key": cache_key, "keys": [key for key, _ in rows]}
        write_json(new / INDEX, index | {"sha256": sha256(new / ROWS)})


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows to compute, and the photo of each; uint8, (n, d, d, 3), RGB."""

    keys: tuple[Key, ...]
    pictures: NDArray[np.uint8]
    seed: int
    augmentation: AugmentationParams


Runner = Callable[[Iterable[Shard], Path], Iterator[tuple[Key, Row]]]
"""Computes shards with the trunk in a file; yields the rows in order."""


def cut(
    pictures: Iterable[tuple[Key, NDArray[np.uint8]]],
    seed: int,
    augmentation: AugmentationParams,
    rows: int = SHARD_ROWS,
) -> Iterator[Shard]:
    """Yield shards of at most `rows`, each made when it is needed."""
    remaining = iter(pictures)
    while chosen := list(islice(remaining, rows)):
        keys, images = zip(*chosen, strict=True)
        yield Shard(keys, np.stack(images), seed, augmentation)


def compute(shard: Shard, trunk: Engine) -> Iterator[Row]:
    """Yield the activations of a shard's rows, float16 (h, w, 192), in order."""
    copies = (
        augment(picture, key.name, key.copy, shard.seed, shard.augmentation, trunk.size)
        for key, picture in zip(shard.keys, shard.pictures, strict=True)
    )
    cv2.setNumThreads(1)  # the cores are busy with the trunk
    for activations in trunk.stream(copies):
        with np.errstate(over="ignore"):
            row: Row = activations.astype(DTYPE)
        if not np.isfinite(row).all():
            raise ModelError(
                f"The trunk's activations, up to {np.abs(activations).max()}, do not fit "
                "float16. Remove artifacts/weights/backbone and run its stage again."
            )
        yield row


def compute_anywhere(shard: Shard, graph: bytes) -> NDArray[np.float16]:
    """Compute a shard without a checkout, with the trunk's file content; float16."""
    return np.stack(list(compute(shard, _cached_trunk(graph))))


@lru_cache(maxsize=1)
def _cached_trunk(graph: bytes) -> Engine:
    with NamedTemporaryFile(suffix=".pb") as file:
        file.write(graph)
        file.flush()
        return Engine(Path(file.name))


def run_here(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
    trunk = Engine(graph)
    for shard in shards:
        yield from zip(shard.keys, compute(shard, trunk), strict=True)


runner: ContextVar[Runner] = ContextVar("runner", default=run_here)
"""What computes the shards of the features stage; the flow sets it."""

"""Compute trunk activations in shards, locally or on a cluster."""

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ModelError
from tasks.model.augment import augment, single_threaded_opencv
from tasks.model.feature_store import DTYPE, Key, Row
from tasks.model.inference import Engine
from tasks.params import AugmentationParams

SHARD_ROWS = 512
"""Two seconds of work on two cores, 10 MB of results."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows to compute, and the photo of each; uint8, (n, d, d, 3), RGB."""

    keys: tuple[Key, ...]
    pictures: NDArray[np.uint8]
    seed: int
    augmentation: AugmentationParams
    size: int


Runner = Callable[[Iterable[Shard], Path], Iterator[tuple[Key, Row]]]
"""Computes shards with the trunk in a file; yields the rows in order."""


def cut(
    pictures: Iterable[tuple[Key, NDArray[np.uint8]]],
    seed: int,
    augmentation: AugmentationParams,
    size: int,
    rows: int = SHARD_ROWS,
) -> Iterator[Shard]:
    """Yield shards of at most `rows`, each made when it is needed."""
    remaining = iter(pictures)
    while chosen := list(islice(remaining, rows)):
        keys, images = zip(*chosen, strict=True)
        yield Shard(keys, np.stack(images), seed, augmentation, size)


def load_trunk(graph: Path, size: int, cores: int | None = None) -> Engine:
    """Load `trunk.pb` of the backbone stage."""
    trunk = Engine(graph, cores)
    if trunk.size != size:
        raise ModelError(
            f"The trunk '{graph}' takes pictures of {trunk.size} pixels, not of {size}. "
            "Run the backbone stage again."
        )
    _to_float16(trunk(np.zeros((size, size, 3), np.uint8)))  # fails before thousands of pictures
    return trunk


def compute(shard: Shard, trunk: Engine) -> Iterator[Row]:
    """Yield the activations of a shard's rows, float16 (h, w, 192), in order."""
    copies = (
        augment(picture, key.name, key.copy, shard.seed, shard.augmentation, shard.size)
        for key, picture in zip(shard.keys, shard.pictures, strict=True)
    )
    with single_threaded_opencv():
        yield from map(_to_float16, trunk.stream(copies))


def compute_anywhere(shard: Shard, graph: bytes) -> NDArray[np.float16]:
    """Compute a shard without a checkout, with the trunk's file content; float16."""
    return np.stack(list(compute(shard, _cached_trunk(graph, shard.size))))


def run_here(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
    """Compute shards one after the other in this process."""
    trunk = None
    for shard in shards:
        trunk = trunk or load_trunk(graph, shard.size)
        yield from zip(shard.keys, compute(shard, trunk), strict=True)


runner: ContextVar[Runner] = ContextVar("runner", default=run_here)
"""What computes the shards of the features stage; the flow turns them into tasks."""


def _to_float16(activations: NDArray[np.float32]) -> Row:
    with np.errstate(over="ignore"):
        row: Row = activations.astype(DTYPE)
    if not np.isfinite(row).all():
        raise ModelError(
            f"The trunk's activations, up to {np.abs(activations).max()}, do not fit float16. The "
            "backbone's weights are damaged: remove artifacts/weights/backbone and run the "
            "backbone stage again."
        )
    return row


@lru_cache(maxsize=1)
def _cached_trunk(graph: bytes, size: int) -> Engine:
    """A worker's trunk, compiled once for all shards."""
    with NamedTemporaryFile(suffix=".pb") as file:
        file.write(graph)
        file.flush()
        return load_trunk(Path(file.name), size)

"""Compute the trunk's activations in shards, here or on a cluster."""

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
    with single_threaded_opencv():
        for activations in trunk.stream(copies):
            with np.errstate(over="ignore"):
                row: Row = activations.astype(DTYPE)
            if not np.isfinite(row).all():
                raise ModelError(
                    f"The trunk's activations, up to {np.abs(activations).max()}, do not fit "
                    "float16. The backbone's weights are damaged: remove "
                    "artifacts/weights/backbone and run the backbone stage again."
                )
            yield row


def compute_anywhere(shard: Shard, graph: bytes) -> NDArray[np.float16]:
    """Compute a shard without a checkout, with the trunk's file content; float16."""
    return np.stack(list(compute(shard, _cached_trunk(graph))))


def run_here(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
    """Compute shards one after the other in this process."""
    trunk = Engine(graph)
    for shard in shards:
        yield from zip(shard.keys, compute(shard, trunk), strict=True)


runner: ContextVar[Runner] = ContextVar("runner", default=run_here)
"""What computes the shards of the features stage; the flow sets it."""


@lru_cache(maxsize=1)
def _cached_trunk(graph: bytes) -> Engine:
    """A worker's trunk, compiled once for all shards."""
    with NamedTemporaryFile(suffix=".pb") as file:
        file.write(graph)
        file.flush()
        return Engine(Path(file.name))

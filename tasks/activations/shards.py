"""Rows of features to compute, cut into shards that any process can work on.

A shard carries all that its rows are made from but the trunk, and a row depends on
nothing else: whichever process computes it, the bytes are the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

from tasks.activations.feature_store import Key, Row
from tasks.activations.trunk_engine import TrunkEngine
from tasks.params import AugmentationParams
from tasks.pictures.augment import one_thread_each, view

ROWS = 512
"""Rows of a shard: two seconds' work on two cores, 10 MB of results."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Views to compute, and what they are made from.

    Args:
        keys: the rows.
        pictures: uint8, (n, detail, detail, 3), RGB; one for each key.
        seed: of the views.
        augmentation: strength of the views.
        size: side of the trunk's input in pixels.
    """

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
    rows: int = ROWS,
) -> Iterator[Shard]:
    """Yield `pictures` in shards of at most `rows`, each made when it is asked for."""
    waiting = iter(pictures)
    while chosen := list(islice(waiting, rows)):
        keys, images = zip(*chosen, strict=True)
        yield Shard(keys, np.stack(images), seed, augmentation, size)


def compute(shard: Shard, trunk: TrunkEngine) -> Iterator[Row]:
    """Yield a shard's rows in the order of its keys; views are drawn on the way."""
    views = (
        view(picture, key.name, key.view, shard.seed, shard.augmentation, shard.size)
        for key, picture in zip(shard.keys, shard.pictures, strict=True)
    )
    with one_thread_each():
        yield from trunk.stream(views)


def compute_anywhere(shard: Shard, graph: bytes) -> NDArray[np.float16]:
    """Compute a shard in a process that has no checkout.

    Args:
        shard: the rows.
        graph: content of the trunk's file.

    Returns:
        float16, (rows, h, w, channels).
    """
    return np.stack(list(compute(shard, _trunk(graph, shard.size))))


def run_here(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
    """Compute shards one after the other in this process, on all its cores."""
    trunk = None
    for shard in shards:
        trunk = trunk or TrunkEngine(graph, shard.size)
        yield from zip(shard.keys, compute(shard, trunk), strict=True)


runner: ContextVar[Runner] = ContextVar("runner", default=run_here)
"""Who computes the shards of the features stage; the flow makes tasks of them."""


@lru_cache(maxsize=1)
def _trunk(graph: bytes, size: int) -> TrunkEngine:
    """A worker's trunk; compiled once, not for each shard."""
    with NamedTemporaryFile(suffix=".pb") as file:
        file.write(graph)
        file.flush()
        return TrunkEngine(Path(file.name), size)

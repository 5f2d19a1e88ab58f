"""Trunk activations in shards, locally or on a cluster."""

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
from tasks.model.augment import one_thread_each, view
from tasks.model.feature_store import Key, Row
from tasks.model.inference import Engine
from tasks.params import AugmentationParams


class TrunkEngine:
    """Run the trunk on single pictures, from as many threads as wanted.

    Args:
        graph: `trunk.pb` of the backbone stage.
        size: side of the pictures in pixels.
        cores: pictures worked on at a time; None for one per usable core.

    Raises:
        ModelError: the graph cannot be read, is of another size, or broken.
    """

    def __init__(self, graph: Path, size: int, cores: int | None = None) -> None:
        self._engine = Engine(graph, cores)
        if self._engine.size != size:
            raise ModelError(
                f"The trunk must take pictures of {size} pixels. Received: {self._engine.size} "
                f"('{graph}'). Run the backbone stage again."
            )
        # A broken backbone is found now, not in the middle of thousands of pictures.
        self(np.zeros((size, size, 3), np.uint8))

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Compute one picture's activations.

        Args:
            picture: uint8, (size, size, 3), RGB in [0, 255].

        Returns:
            float16, (h, w, channels); (7, 7, 192) for a size of 224.

        Raises:
            ModelError: an activation is not finite in float16.
        """
        return _stored(self._engine(picture))

    def stream(self, pictures: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float16]]:
        """Compute many pictures' activations in their order, as `Engine.stream` does.

        Raises:
            ModelError: an activation is not finite in float16.
        """
        return map(_stored, self._engine.stream(pictures))


def _stored(activations: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round to what the features stage keeps."""
    with np.errstate(over="ignore"):
        features: NDArray[np.float16] = activations.astype("<f2")
    if not np.isfinite(features).all():
        raise ModelError(
            "The trunk's activations do not fit float16. "
            f"Received: a largest value of {np.abs(activations).max()}. "
            "The backbone's weights are broken: remove artifacts/weights/backbone "
            "and run the backbone stage again."
        )
    return features


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

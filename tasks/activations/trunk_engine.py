"""The frozen trunk as a fast function of one picture, see `tasks.network.engine`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ModelError
from tasks.network.engine import Engine


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

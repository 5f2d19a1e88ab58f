"""The frozen trunk as a fast function of one picture, see `tasks.engine`."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.engine import Engine
from tasks.errors import ModelError
from tasks.frozen import frozen_graph


class TrunkEngine:
    """Run a Keras trunk on single pictures, from as many threads as wanted.

    Args:
        trunk: keras.Model, float32 (batch, size, size, 3) ->
            float32 (batch, h, w, channels), as of `tasks.model.build_trunk`.
        cores: pictures worked on at a time; None for one per usable core.
    """

    def __init__(self, trunk: Any, cores: int | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "trunk.pb"
            graph.write_bytes(frozen_graph(trunk))
            self._engine = Engine(graph, cores)
        self.cores = self._engine.cores
        # A broken backbone is found now, not in the middle of thousands of pictures.
        self(np.zeros((self._engine.size, self._engine.size, 3), np.uint8))

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Compute one picture's activations.

        Args:
            picture: uint8, (size, size, 3), RGB in [0, 255].

        Returns:
            float16, (h, w, channels); (7, 7, 192) for a size of 224.

        Raises:
            ModelError: an activation is not finite in float16.
        """
        activations = self._engine(picture)
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


def load_engine(backbone: Path, size: int) -> TrunkEngine:
    """Build the engine of our trunk.

    Args:
        backbone: `backbone.safetensors`.
        size: side of the input in pixels.

    Returns:
        The engine, one picture to a core.

    Raises:
        ModelError: the weights cannot be read or do not fit.
    """
    from tasks.model import build_trunk

    return TrunkEngine(build_trunk(backbone, size))

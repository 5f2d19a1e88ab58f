"""The frozen trunk as a fast function of one picture.

OpenVINO runs it: 240 images a second on two cores, beside 127 of a frozen TensorFlow
graph with oneDNN (best of seven interleaved runs; medians 205 and 86). One request
holds one picture and one core works on one request, so cores never wait for each
other, and a photo's activations cannot depend on which photos are scored beside it.
"""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ModelError


class TrunkEngine:
    """Run a Keras trunk on single pictures, from as many threads as wanted.

    Args:
        trunk: keras.Model, float32 (1, size, size, 3) -> float32 (1, h, w, channels),
            as of `tasks.model.build_trunk`.
        cores: pictures worked on at a time; None for one per usable core.
    """

    def __init__(self, trunk: Any, cores: int | None = None) -> None:
        import openvino as ov
        from openvino.preprocess import PrePostProcessor

        self.cores = cores or usable_cores()
        core = ov.Core()
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "trunk.pb"
            graph.write_bytes(_frozen_graph(trunk))
            # The reader inside the runtime; `openvino.convert_model` reports to
            # its maker over the network unless told otherwise on each machine.
            model = core.read_model(graph)
        levels = PrePostProcessor(model)
        levels.input().tensor().set_element_type(ov.Type.u8)
        self._compiled = core.compile_model(
            levels.build(),
            "CPU",
            {
                # Left alone, bfloat16 is taken where the processor has it: other numbers.
                "INFERENCE_PRECISION_HINT": "f32",
                "NUM_STREAMS": str(self.cores),
                "INFERENCE_NUM_THREADS": self.cores,
            },
        )
        self._of_this_thread = threading.local()
        # OpenVINO's binding sets itself up in the first call of a process and lets
        # go of Python's lock in between: two first calls at once wait for each
        # other for ever. So the first one is made here, alone.
        self(np.zeros((*trunk.input_shape[1:3], 3), np.uint8))

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Compute one picture's activations.

        Args:
            picture: uint8, (size, size, 3), RGB in [0, 255].

        Returns:
            float16, (h, w, channels); (7, 7, 192) for a size of 224.

        Raises:
            ModelError: an activation is not finite in float16.
        """
        request = getattr(self._of_this_thread, "request", None)
        if request is None:
            request = self._of_this_thread.request = self._compiled.create_infer_request()
        outputs = request.infer({0: picture[np.newaxis]}, share_inputs=True, share_outputs=True)
        with np.errstate(over="ignore"):
            features: NDArray[np.float16] = outputs[0][0].astype("<f2")
        if not np.isfinite(features).all():
            raise ModelError(
                "The trunk's activations do not fit float16. "
                f"Received: a largest value of {np.abs(outputs[0]).max()}. "
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


def engine_version() -> str:
    """Name what computes the activations; another version may round differently."""
    import openvino as ov

    return f"OpenVINO {ov.__version__}"


def usable_cores() -> int:
    """Count the cores this process may use, which a container can have narrowed."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _frozen_graph(trunk: Any) -> bytes:
    """Serialise `trunk` for one picture as a TensorFlow graph with constant weights."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    shape = (1, *trunk.input_shape[1:])
    function = tf.function(lambda photo: trunk(photo, training=False))
    concrete = function.get_concrete_function(tf.TensorSpec(shape, tf.float32))
    frozen = convert_variables_to_constants_v2(concrete)
    content: bytes = frozen.graph.as_graph_def().SerializeToString()
    return content

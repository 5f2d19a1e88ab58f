"""Model files: the same content gives the same bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tasks.errors import ModelError
from tasks.io import atomic_write
from tasks.params import BACKBONE
from tasks.project import Project

Weights = dict[str, np.ndarray]  # arrays by `<Keras layer>/<variable>`

BACKBONE_FILE = "backbone.safetensors"
TRUNK_FILE = "trunk.pb"
WEIGHTS_FILE = "weights.safetensors"


def read_weights(path: Path) -> Weights:
    try:
        return dict(load_file(path))
    # A number type that numpy lacks raises none of safetensors' own errors.
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"Weights '{path}' cannot be read ({error}). Run the stage that writes them."
        ) from error


def read_phase(project: Project, name: str) -> Weights:
    file = BACKBONE_FILE if name == BACKBONE else WEIGHTS_FILE
    return read_weights(project.weights(name) / file)


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    arrays = {name: np.asarray(weights[name], order="C") for name in sorted(weights)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(arrays))


def get_weights(layers: Iterable[Any]) -> Weights:
    return {
        f"{layer.name}/{variable.name}": variable.numpy()
        for layer in layers
        for variable in layer.weights
    }


def set_weights(layers: Iterable[Any], weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into Keras layers; each must be there and fit."""
    for layer in layers:
        for variable in layer.weights:
            name, shape = f"{layer.name}/{variable.name}", tuple(variable.shape)
            value = weights.get(name)
            if value is None or value.shape != shape:
                raise ModelError(
                    f"The weights '{name}' of shape {shape} are missing. "
                    "Run the backbone and training stages again."
                )
            variable.assign(value)
        if hasattr(layer, "finalize_state"):
            # Normalization copies its variables into constants only on request.
            layer.finalize_state()


def export_graph(model: Any) -> bytes:
    """Serialize a Keras model as a `GraphDef` for uint8 (n, size, size, 3), RGB."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    function = tf.function(lambda photos: model(tf.cast(photos, tf.float32), training=False))
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="photos")
    frozen = convert_variables_to_constants_v2(function.get_concrete_function(signature))
    graph = frozen.graph.as_graph_def()
    for node in graph.node:
        # TensorFlow's own attributes depend on what the process traced before.
        for name in [name for name in node.attr if name.startswith("_")]:
            del node.attr[name]
    return bytes(graph.SerializeToString(deterministic=True))

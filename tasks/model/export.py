"""Model files: the same weights give the same bytes."""

import json
import zipfile
from pathlib import Path
from typing import Any

from tasks.io import atomic_write

INPUT = "photos"

_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest date of a zip entry."""


def export_graph(model: Any) -> bytes:
    """Serialize a Keras model as a TensorFlow graph with constant weights, for inference.

    It runs without TensorFlow, whose import alone takes longer than running the graph.

    Returns:
        A `GraphDef`: uint8 (n, size, size, 3), RGB, called `INPUT` -> the model's output.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    function = tf.function(lambda photos: model(tf.cast(photos, tf.float32), training=False))
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name=INPUT)
    frozen = convert_variables_to_constants_v2(function.get_concrete_function(signature))
    graph = frozen.graph.as_graph_def()
    for node in graph.node:
        # TensorFlow's own attributes depend on what the process traced before.
        for name in [name for name in node.attr if name.startswith("_")]:
            del node.attr[name]
    content: bytes = graph.SerializeToString(deterministic=True)
    return content


def save_model(model: Any, path: Path) -> None:
    """Save a `.keras` file without the time, memory addresses and zip dates."""
    with atomic_write(path) as temporary:
        raw = temporary.with_name("raw.keras")
        model.save(raw)
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(temporary, "w") as target:
            for name in sorted(source.namelist()):
                target.writestr(zipfile.ZipInfo(name, _DATE), _stable(name, source.read(name)))


def load_model(path: Path) -> Any:
    """Load a `.keras` file of `save_model`; keras.Model, for inference."""
    import keras

    return keras.saving.load_model(path, compile=False)


def _stable(name: str, content: bytes) -> bytes:
    if not name.endswith(".json"):
        return content
    fields = json.loads(content)
    if name == "metadata.json":
        del fields["date_saved"]
    return json.dumps(_renumbered(fields, {}), sort_keys=True).encode()


def _renumbered(value: Any, numbers: dict[int, int]) -> Any:
    """Replace memory addresses, which identify shared objects, by 0, 1, 2…"""
    if isinstance(value, list):
        return [_renumbered(entry, numbers) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: numbers.setdefault(entry, len(numbers))
        if key == "shared_object_id"
        else _renumbered(entry, numbers)
        for key, entry in value.items()
    }

"""Weights of the model as files and arrays."""

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

Weights = dict[str, np.ndarray]


def read_weights(path: Path) -> Weights:
    """Read a safetensors file.

    Raises:
        ModelError: the file is missing, or is not safetensors that numpy can hold.
    """
    try:
        return dict(load_file(path))
    # A type of number that numpy does not have is none of its own errors.
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"Weights cannot be read ({error}). Received: '{path}'. Run the stage that writes them."
        ) from error


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file whole; the same arrays give the same bytes."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(
            save({name: np.asarray(weights[name], order="C") for name in sorted(weights)})
        )


def take(layers: Iterable[Any]) -> Weights:
    """Copy the weights out of Keras layers."""
    return {
        f"{layer.name}/{variable.name}": variable.numpy()
        for layer in layers
        for variable in layer.weights
    }


def put(layers: Iterable[Any], weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into Keras layers; every variable of every layer must be given.

    Raises:
        ModelError: a variable is missing or has another shape.
    """
    for layer in layers:
        for variable in layer.weights:
            name = f"{layer.name}/{variable.name}"
            value = weights.get(name)
            if value is None or value.shape != tuple(variable.shape):
                received = "nothing" if value is None else f"shape {value.shape}"
                raise ModelError(
                    f"Weights must hold '{name}' of shape {tuple(variable.shape)}. "
                    f"Received: {received}. Rebuild them with the backbone and training stages."
                )
            variable.assign(value)
        if hasattr(layer, "finalize_state"):
            # Normalization copies its variables into constants, and only on request.
            layer.finalize_state()


BACKBONE_FILE = "backbone.safetensors"
TRUNK_FILE = "trunk.pb"
WEIGHTS_FILE = "weights.safetensors"


def read_phase(project: Project, name: str) -> Weights:
    """Read the weights that a phase, or the backbone stage, wrote; by layer name.

    Raises:
        ModelError: the file is missing or is not safetensors.
    """
    file = BACKBONE_FILE if name == BACKBONE else WEIGHTS_FILE
    return read_weights(project.weights(name) / file)

"""Weights as safetensors files, arrays and Keras variables."""

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
"""Arrays by `<Keras layer>/<variable>`."""

BACKBONE_FILE = "backbone.safetensors"
TRUNK_FILE = "trunk.pb"
WEIGHTS_FILE = "weights.safetensors"


def read_weights(path: Path) -> Weights:
    """Read a safetensors file."""
    try:
        return dict(load_file(path))
    # A number type that numpy lacks raises none of safetensors' own errors.
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"Weights '{path}' cannot be read ({error}). Run the stage that writes them."
        ) from error


def read_phase(project: Project, name: str) -> Weights:
    """Read the weights that a phase, or the backbone stage, wrote."""
    file = BACKBONE_FILE if name == BACKBONE else WEIGHTS_FILE
    return read_weights(project.weights(name) / file)


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically; the same arrays give the same bytes."""
    arrays = {name: np.asarray(weights[name], order="C") for name in sorted(weights)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(arrays))


def get_weights(layers: Iterable[Any]) -> Weights:
    """Copy the weights of Keras layers."""
    return {
        f"{layer.name}/{variable.name}": variable.numpy()
        for layer in layers
        for variable in layer.weights
    }


def set_weights(layers: Iterable[Any], weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into Keras layers; ModelError where one is missing or does not fit."""
    for layer in layers:
        for variable in layer.weights:
            name, shape = f"{layer.name}/{variable.name}", tuple(variable.shape)
            value = weights.get(name)
            if value is None or value.shape != shape:
                found = "are missing" if value is None else f"have shape {value.shape}"
                raise ModelError(
                    f"The weights '{name}' of shape {shape} {found}. "
                    "Run the backbone and training stages again."
                )
            variable.assign(value)
        if hasattr(layer, "finalize_state"):
            # Normalization copies its variables into constants only on request.
            layer.finalize_state()

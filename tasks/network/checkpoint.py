"""Where the weights of the backbone and of each phase are kept, and how they are read."""

import numpy as np

from tasks.layout import Layout
from tasks.network.weights import Weights, read_weights
from tasks.params import BACKBONE

BACKBONE_FILE = "backbone.safetensors"
TRUNK_FILE = "trunk.pb"
WEIGHTS_FILE = "weights.safetensors"
TEMPERATURE = "temperature"


def read_phase(layout: Layout, name: str) -> tuple[Weights, float]:
    """Read what a phase, or the backbone stage, left.

    Returns:
        Weights by layer name, and the temperature, 1 where none was fitted.

    Raises:
        ModelError: the file is missing or is not safetensors.
    """
    file = BACKBONE_FILE if name == BACKBONE else WEIGHTS_FILE
    weights = read_weights(layout.weights(name) / file)
    return weights, float(weights.pop(TEMPERATURE, np.array(1.0)))

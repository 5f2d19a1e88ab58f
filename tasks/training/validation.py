"""The validation logits of a whole model while a phase trains it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.pictures.augment import enlarge
from tasks.training.phase import Plan
from tasks.training.traced import traced


def validation(
    model: Any, plan: Plan, images: NDArray[np.uint8]
) -> Callable[[], NDArray[np.float32]]:
    """Give a function that scores the validation photos with the model's present weights.

    Args:
        model: of `build_model`.
        plan: the phase, with the rows and the size of a batch.
        images: uint8, (n, detail, detail, 3); the dataset's photos.

    Returns:
        Takes nothing and returns float32, (m, 6): logits up to one constant for each photo.
    """
    size = model.input_shape[1]
    infer = traced(lambda photos: model(photos, training=False), tf.zeros((1, size, size, 3)))
    batch = plan.training.batch_size
    parts = [plan.val[start : start + batch] for start in range(0, len(plan.val), batch)]

    def logits() -> NDArray[np.float32]:
        given = [infer(tf.constant(enlarge(images[rows], size), tf.float32)) for rows in parts]
        probabilities = np.concatenate([one.numpy() for one in given])
        found: NDArray[np.float32] = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
        return found

    return logits

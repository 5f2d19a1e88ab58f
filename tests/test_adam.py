"""Adam in one operation does what Keras's does."""

import keras
import numpy as np
import tensorflow as tf

from tasks.training.cached import Adam


def trained(kind: type[keras.optimizers.Adam], rate: float) -> list[np.ndarray]:
    """Two variables after twelve updates with gradients of many sizes."""
    random = np.random.default_rng(0)
    variables = [
        keras.Variable(random.normal(size=size).astype("f4"), name=name)
        for size, name in (((5, 4), "kernel"), ((4,), "bias"))
    ]
    optimizer = kind(rate)
    optimizer.build(variables)
    update = tf.function(lambda *gradients: optimizer.apply(list(gradients), variables))
    for scale in np.logspace(-6, 3, 12):
        update(
            *(tf.constant(scale * random.normal(size=one.shape), tf.float32) for one in variables)
        )
    return [variable.numpy() for variable in variables]


def test_updates_are_keras_adams() -> None:
    ours, keras_own = (trained(kind, 0.05) for kind in (Adam, keras.optimizers.Adam))
    for left, right in zip(ours, keras_own, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours[0], trained(Adam, 0.04)[0], atol=1e-3)

"""Train one phase the plain way: whole model, live augmentation, `keras.Model.fit`.

For GPUs, and as the reference that training on stored features is measured by.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.pictures.augment import enlarge
from tasks.progress import Progress
from tasks.training.average import Average
from tasks.training.phase import Epoch, Plan
from tasks.training.temperature import score
from tasks.training.validation import validation


def fit_end_to_end(
    model: Any, plan: Plan, images: NDArray[np.uint8], progress: Progress
) -> tuple[list[Epoch], NDArray[np.float32]]:
    """Train `model` in place; the averaged weights are kept.

    Args:
        model: of `build_model`, its layers opened by `freeze`.
        plan: the phase; its batches give the order, the model's augmentation
            layer the views.
        images: uint8, (n, detail, detail, 3); the dataset's photos.
        progress: told after every update.

    Returns:
        The learning curve, and the validation logits of the kept weights,
        float32, (m, 6), up to one constant for each photo.
    """
    size = model.input_shape[1]
    model.compile(
        optimizer=plan.optimizer(),
        loss=keras.losses.CategoricalCrossentropy(),
        metrics=["accuracy"],
    )
    # Variables made in the first update would have it traced twice.
    model.optimizer.build(model.trainable_variables)
    watch = _watch(
        plan,
        validation(model, plan, images),
        progress,
        Average(model.trainable_variables, plan.updates, plan.phase.averaging),
    )
    model.fit(
        _photos(plan, images, size),
        epochs=plan.phase.epochs,
        steps_per_epoch=plan.updates_per_epoch,
        shuffle=False,  # the plan has done that
        callbacks=[watch],
        verbose=0,
    )
    watch.average.keep()
    return watch.curve, watch.logits


def _photos(plan: Plan, images: NDArray[np.uint8], size: int) -> Any:
    """All epochs' batches, one after the other, as a tf.data pipeline."""

    def batches() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for epoch in range(plan.phase.epochs):
            for chosen, _ in plan.batches(epoch):
                photos = enlarge(images[plan.train[chosen]], size)
                yield photos.astype(np.float32), plan.targets(chosen)

    shapes = (
        tf.TensorSpec((None, size, size, 3), tf.float32),
        tf.TensorSpec((None, None), tf.float32),
    )
    options = tf.data.Options()
    # A thread that tunes a pipeline sleeps for up to a minute, and TensorFlow 2.20 lets
    # `fit` return only once it has woken. There is nothing to tune in two batches ahead.
    options.autotune.enabled = False
    photos = tf.data.Dataset.from_generator(batches, output_signature=shapes)
    return photos.prefetch(2).with_options(options)


def _watch(
    plan: Plan,
    validate: Callable[[], NDArray[np.float32]],
    progress: Progress,
    average: Average,
) -> Any:
    class Watch(keras.callbacks.Callback):  # type: ignore[misc]
        """Average after each update, score the average after each epoch."""

        def __init__(self) -> None:
            super().__init__()
            self.average = average
            self.curve: list[Epoch] = []
            self.logits = np.empty((0, 0), np.float32)
            self._updates = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            average.update()
            self._updates += 1
            progress(f"train {plan.name}", self._updates, plan.updates)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            with average.in_place():
                self.logits = validate()
            val_loss, val_accuracy = score(self.logits, plan.val_labels)
            self.curve.append(
                Epoch(
                    epoch + 1, float(logs["loss"]), float(logs["accuracy"]), val_loss, val_accuracy
                )
            )

    return Watch()

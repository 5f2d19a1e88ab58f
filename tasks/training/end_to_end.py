"""Train end to end with Keras, on one or more devices or workers."""

import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.callbacks import LambdaCallback
from numpy.typing import NDArray

from tasks.errors import StageError
from tasks.model.augment import enlarge
from tasks.stage import Progress
from tasks.training.cached import WeightAverage, generalize
from tasks.training.plan import Epoch, Plan, score_logits

WAIT_SECONDS = 600  # longest wait for other workers to reach the same phase

_log = logging.getLogger(__name__)


@cache
def find_strategy() -> Any:
    """Strategy over the workers in `TF_CONFIG`, or this process's devices."""
    if os.environ.get("TF_CONFIG"):
        # TensorFlow waits in native code for as long as it takes; the alarm ends the process.
        _log.warning("Waiting up to %d s for the workers in TF_CONFIG.", WAIT_SECONDS)
        signal.alarm(WAIT_SECONDS)
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (RuntimeError, ValueError, KeyError) as error:
            raise StageError(f"TensorFlow cannot use TF_CONFIG ({error}). Correct it.") from error
        finally:
            signal.alarm(0)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def fit_end_to_end(
    model: Any, plan: Plan, images: NDArray[np.uint8], progress: Progress
) -> tuple[list[Epoch], NDArray[np.float32]]:
    """Train `model`, built in the scope of `find_strategy`, in place, and keep the average.

    Returns the learning curve and the validation logits, up to a constant for each photo.
    """
    strategy = find_strategy()
    with strategy.scope():
        optimizer = keras.optimizers.Adam(plan.phase.learning_rate)
        # Variables created in the first update would have it traced twice.
        optimizer.build(model.trainable_variables)
        variables = [variable.value for variable in model.trainable_variables]
        average = WeightAverage(variables, plan.updates, plan.phase.swa_fraction)
    curve, updates, size = list[Epoch](), itertools.count(1), model.input_shape[1]
    logits = np.empty((0, 0), np.float32)
    photos = tf.TensorSpec((None, size, size, 3), tf.float32)
    infer = tf.function(lambda batch: model(batch, training=False), [photos])

    def end_update(batch: int, logs: Any = None) -> None:
        average.update()
        progress(f"train {plan.name}", next(updates), plan.updates)

    def end_epoch(epoch: int, logs: Any) -> None:
        nonlocal logits
        step = plan.training.batch_size
        parts = [plan.val[start : start + step] for start in range(0, len(plan.val), step)]
        with average.applied():
            found = [infer(tf.constant(enlarge(images[at], size), tf.float32)) for at in parts]
        probabilities = np.concatenate([batch.numpy() for batch in found])
        logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
        validation = score_logits(logits, plan.val_labels)
        curve.append(Epoch(epoch + 1, float(logs["loss"]), float(logs["accuracy"]), *validation))

    if strategy.num_replicas_in_sync > 1:  # which `fit` cannot do with several workers
        _fit_replicas(strategy, model, optimizer, plan, images, end_update, end_epoch)
    else:
        model.compile(optimizer, loss=partial(_losses, plan), metrics=["accuracy"])
        recorder = LambdaCallback(on_train_batch_end=end_update, on_epoch_end=end_epoch)
        model.fit(
            _batches(plan, images, size),
            epochs=plan.phase.epochs,
            steps_per_epoch=plan.updates_per_epoch,
            shuffle=False,  # the plan's batches are shuffled
            callbacks=[recorder],
            verbose=0,
        )
    average.keep()
    return curve, logits


def _losses(plan: Plan, targets: Any, probabilities: Any) -> Any:
    losses = tf.keras.losses.categorical_crossentropy(targets, probabilities)
    return generalize(losses, targets, plan.gce_q)


def _batches(plan: Plan, images: NDArray[np.uint8], size: int) -> Any:
    """All epochs' batches in a row, as a tf.data pipeline."""

    def batches() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for epoch in range(plan.phase.epochs):
            for chosen, _ in plan.batches(epoch):
                photos = enlarge(images[plan.train[chosen]], size)
                yield photos.astype(np.float32), plan.targets(chosen)

    shapes = (None, size, size, 3), (None, None)
    signature = tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes)
    options = tf.data.Options()
    # The autotune thread sleeps for up to a minute, and TensorFlow 2.20 lets `fit` return
    # only after it has woken.
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return dataset.prefetch(2).with_options(options)


def _fit_replicas(
    strategy: Any,
    model: Any,
    optimizer: Any,
    plan: Plan,
    images: NDArray[np.uint8],
    end_update: Callable[[int], None],
    end_epoch: Callable[[int, Any], None],
) -> None:
    """Split each batch over the replicas; their gradients add up to those of one device."""
    size, replicas = model.input_shape[1], strategy.num_replicas_in_sync

    def replica_step(*batch: Any) -> Any:
        each = tf.shape(batch[0])[0] // replicas
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * each
        photos, targets, shares = (values[first : first + each] for values in batch)
        with tf.GradientTape() as tape:
            probabilities = model(photos, training=True)
            loss = tf.reduce_sum(_losses(plan, targets, probabilities) * shares)
        gradients = tape.gradient(loss, [one.value for one in model.trainable_variables])
        # Keras's optimizer sums the replicas' gradients.
        optimizer.apply(gradients, model.trainable_variables)
        right = tf.argmax(probabilities, axis=1) == tf.argmax(targets, axis=1)
        return loss, tf.reduce_sum(tf.cast(right & (shares > 0), tf.float32))

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def step(*batch: Any) -> Any:
        parts = strategy.run(replica_step, args=batch)
        return [strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None) for part in parts]

    count = len(plan.train)
    for epoch in range(plan.phase.epochs):
        loss = right = 0.0
        for number, (chosen, _) in enumerate(plan.batches(epoch)):
            # A batch that does not divide evenly is padded with photos that count nothing.
            padded = np.resize(chosen, -(-len(chosen) // replicas) * replicas)
            shares = (np.arange(len(padded)) < len(chosen)) / np.float32(len(chosen))
            photos = tf.constant(enlarge(images[plan.train[padded]], size), tf.float32)
            now = step(photos, tf.constant(plan.targets(padded)), tf.constant(shares, tf.float32))
            end_update(number)
            loss += float(now[0]) * len(chosen)
            right += float(now[1])
        end_epoch(epoch, {"loss": loss / count, "accuracy": right / count})

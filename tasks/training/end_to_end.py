"""Train end to end with Keras, on one or more devices or workers."""

import itertools
import logging
import os
import signal
from functools import cache
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.errors import StageError
from tasks.model.augment import enlarge
from tasks.stage import Progress
from tasks.training.cached import WeightAverage, generalize, traced
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

    Returns the learning curve and the validation logits, up to a constant for each photo. Computes
    the same as `model.fit`, which cannot train with several workers.
    """
    strategy, size = find_strategy(), model.input_shape[1]
    with strategy.scope():
        optimizer = keras.optimizers.Adam(plan.phase.learning_rate)
        # Variables created in the first update would have it traced twice.
        optimizer.build(model.trainable_variables)
        variables = [variable.value for variable in model.trainable_variables]
        average = WeightAverage(variables, plan.updates, plan.phase.swa_fraction)
    replicas, count = strategy.num_replicas_in_sync, np.float32(len(plan.train))

    def read(rows: NDArray[np.int64]) -> Any:
        return tf.constant(enlarge(images[rows], size), tf.float32)

    def learn_part(photos: Any, targets: Any, counted: Any) -> Any:
        """Update the weights with one replica's part of a batch."""
        each = tf.shape(photos)[0] // replicas
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * each
        photos, truth, mask = (part[first : first + each] for part in (photos, targets, counted))
        with tf.GradientTape() as tape:
            probabilities = model(photos, training=True)
            losses = tf.keras.losses.categorical_crossentropy(truth, probabilities)
            # A share of the whole batch's mean: Keras's optimizer adds the replicas' gradients.
            total = tf.reduce_sum(generalize(losses, truth, plan.gce_q) * mask)
            loss = total / tf.reduce_sum(counted)
        gradients = tape.gradient(loss, [one.value for one in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        right = tf.argmax(probabilities, axis=1) == tf.argmax(truth, axis=1)
        return loss, tf.reduce_sum(tf.cast(right, tf.float32) * mask)

    def learn(*batch: Any) -> Any:
        parts = strategy.run(learn_part, args=batch)
        return [strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None) for part in parts]

    example = read(plan.val[:1])
    step = traced(learn, example, tf.zeros((1, plan.classes)), tf.zeros(1))
    infer = traced(lambda photos: model(photos, training=False), example)
    curve, updates = [], itertools.count(1)
    for number in range(plan.phase.epochs):
        loss = right = np.float32(0)
        for chosen, _ in plan.batches(number):
            # A batch that does not divide evenly is padded with photos that count nothing.
            padded = np.resize(chosen, -(-len(chosen) // replicas) * replicas)
            counted = tf.constant(np.arange(len(padded)) < len(chosen), tf.float32)
            now = step(read(plan.train[padded]), tf.constant(plan.targets(padded)), counted)
            average.update()
            progress(f"train {plan.name}", next(updates), plan.updates)
            loss += now[0].numpy() * np.float32(len(chosen))
            right += now[1].numpy()
        batch = plan.training.batch_size
        parts = [plan.val[start : start + batch] for start in range(0, len(plan.val), batch)]
        with average.applied():
            probabilities = np.concatenate([infer(read(rows)).numpy() for rows in parts])
        logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
        validation = score_logits(logits, plan.val_labels)
        curve.append(Epoch(number + 1, float(loss / count), float(right / count), *validation))
    average.keep()
    return curve, logits

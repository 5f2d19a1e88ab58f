"""End-to-end training shared out by `tf.distribute`: several devices, or several machines.

Every replica takes its part of each batch and all of them make one update, so the
weights are those of one device but for rounding. `keras.Model.fit` cannot do this for
several machines (keras-team/keras#20585), so the loop is written out here.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.errors import StageError
from tasks.pictures.augment import enlarge
from tasks.progress import Progress
from tasks.training.average import Average
from tasks.training.phase import Epoch, Plan
from tasks.training.temperature import score
from tasks.training.validation import validation
from tasks.training.workers import waiting_for_workers

_Photos = Callable[[NDArray[np.int64]], NDArray[np.float32]]


@functools.cache
def find_strategy() -> Any:
    """Choose how training is shared out, from what there is; once for each process.

    Returns:
        tf.distribute.Strategy over the workers that `TF_CONFIG` names, else over
        this process's devices; None where there is one device only.

    Raises:
        StageError: TensorFlow was used before, and cannot join other workers any more.
    """
    if os.environ.get("TF_CONFIG"):
        try:
            with waiting_for_workers():
                return tf.distribute.MultiWorkerMirroredStrategy()
        except (RuntimeError, ValueError, KeyError) as error:
            raise StageError(
                f"TensorFlow cannot join the workers that TF_CONFIG names ({error}). Run "
                "`dvc repro` on every worker, in a checkout of its own."
            ) from error
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    devices = [device.name for device in tf.config.list_logical_devices(kind)]
    return tf.distribute.MirroredStrategy(devices) if len(devices) > 1 else None


def fit_distributed(
    strategy: Any, model: Any, plan: Plan, images: NDArray[np.uint8], progress: Progress
) -> tuple[list[Epoch], NDArray[np.float32]]:
    """Train `model` in place on all replicas; the averaged weights are kept.

    Every worker calls this with the same arguments and ends with the same weights.

    Args:
        strategy: of `find_strategy`.
        model: of `build_model`, built in the strategy's scope, its layers opened
            by `freeze`.
        plan: the phase; its batches are split over the replicas.
        images: uint8, (n, detail, detail, 3); the dataset's photos.
        progress: told after every update.

    Returns:
        The learning curve, and the validation logits of the kept weights,
        float32, (m, 6), up to one constant for each photo.
    """
    size = model.input_shape[1]

    def photos(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return enlarge(images[rows], size).astype(np.float32)

    with strategy.scope():
        optimizer = plan.optimizer()
        optimizer.build(model.trainable_variables)
        average = Average(model.trainable_variables, plan.updates, plan.phase.averaging)
    learn = _learner(strategy, model, optimizer)
    validate = validation(model, plan, images)
    curve: list[Epoch] = []
    for number in range(1, plan.phase.epochs + 1):
        loss = right = 0.0
        for place, (chosen, _) in enumerate(plan.batches(number - 1), 1):
            now = learn(*_shared_out(strategy, plan, chosen, photos))
            average.update()
            loss += float(now[0]) * len(chosen)
            right += float(now[1])
            done = (number - 1) * plan.updates_per_epoch + place
            progress(f"train {plan.name}", done, plan.updates)
        with average.in_place():
            logits = validate()
        val_loss, val_accuracy = score(logits, plan.val_labels)
        count = len(plan.train)
        curve.append(Epoch(number, loss / count, right / count, val_loss, val_accuracy))
    average.keep()
    return curve, logits


def _learner(strategy: Any, model: Any, optimizer: Any) -> Callable[..., Any]:
    def replica(photos: Any, targets: Any, shares: Any) -> Any:
        with tf.GradientTape() as tape:
            probabilities = model(photos, training=True)
            losses = tf.keras.losses.categorical_crossentropy(targets, probabilities)
            loss = tf.reduce_sum(losses * shares)
        gradients = tape.gradient(loss, [one.value for one in model.trainable_variables])
        # Keras's optimizer adds the replicas' gradients up.
        optimizer.apply(gradients, model.trainable_variables)
        hits = tf.argmax(probabilities, axis=1) == tf.argmax(targets, axis=1)
        return loss, tf.reduce_sum(tf.cast(hits & (shares > 0), tf.float32))

    def learn(photos: Any, targets: Any, shares: Any) -> Any:
        parts = strategy.run(replica, args=(photos, targets, shares))
        return [strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None) for part in parts]

    compiled: Callable[..., Any] = tf.function(learn, reduce_retracing=True)
    return compiled


def _shared_out(
    strategy: Any, plan: Plan, chosen: NDArray[np.int64], photos: _Photos
) -> tuple[Any, Any, Any]:
    """Give each replica its photos, their targets, and each photo's share of the mean.

    The last batch may not divide evenly: a photo is then repeated at a share of zero.
    """
    replicas = strategy.num_replicas_in_sync
    each = -(-len(chosen) // replicas)
    padded = np.concatenate([chosen, np.repeat(chosen[:1], each * replicas - len(chosen))])
    shares = (np.arange(len(padded)) < len(chosen)).astype(np.float32) / np.float32(len(chosen))

    def part(values: Callable[[slice], Any]) -> Any:
        def of(context: Any) -> Any:
            first = context.replica_id_in_sync_group * each
            return tf.constant(values(slice(first, first + each)))

        return strategy.experimental_distribute_values_from_function(of)

    return (
        part(lambda at: photos(plan.train[padded[at]])),
        part(lambda at: plan.targets(padded[at])),
        part(lambda at: shares[at]),
    )

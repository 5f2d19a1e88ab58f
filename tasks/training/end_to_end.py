"""Train end to end with Keras, on one or more workers."""

import functools
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.errors import StageError
from tasks.model.augment import enlarge
from tasks.stage import Progress
from tasks.training.cached import validation
from tasks.training.plan import Epoch, Plan
from tasks.training.regularizers import Average
from tasks.training.temperature import score

WAIT_SECONDS = 600.0
"""Longest wait for the others; each must come to the same phase first."""

_log = logging.getLogger(__name__)


def named_workers() -> list[str]:
    """Addresses of all workers; none where `TF_CONFIG` is not set, or for TensorFlow to refuse."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}")["cluster"]
        return [str(one) for job in ("chief", "worker") for one in cluster.get(job, [])]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


@contextmanager
def waiting_for_workers(seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """End this process where the others do not come in time, or on Ctrl-C.

    TensorFlow waits in its own code and without end, where no handler of Python's runs
    and no thread of Python's either; so both signals get the kernel's answer.

    Args:
        seconds: longest wait.
    """
    workers = named_workers()
    if len(workers) < 2 or threading.current_thread() is not threading.main_thread():
        yield
        return
    _log.warning(
        "Waiting for the workers that TF_CONFIG names (%s), %.0f s at most. "
        "Run `dvc repro` on each of them.",
        ", ".join(workers),
        seconds,
    )
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in before.items():
            signal.signal(one, handler)


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
        average = Average(model.trainable_variables, plan.updates, plan.phase.swa_fraction)
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
        Average(model.trainable_variables, plan.updates, plan.phase.swa_fraction),
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

"""Train the tail on cached features."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.model.tail import Tail, matmul_in
from tasks.params import LABELS
from tasks.stage import Progress
from tasks.training.plan import Epoch, Plan, score_logits
from tasks.training.regularizers import WeightAverage, mixstyle, random_erasing

BATCH = 64
"""Rows of a batch without gradients."""

Rows = NDArray[np.int64]
Read = Callable[[Rows], NDArray[np.float32]]


class FeatureReader(Protocol):
    """The reading side of `tasks.model.feature_store.Features`."""

    def row(self, name: str, copy: int) -> int: ...

    def batch(self, rows: Any) -> NDArray[Any]: ...


class Adam:
    """Adam as one fused operation per variable, which is faster than Keras's.

    Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, in the form at the end
    of section 2; with Keras's defaults.
    """

    def __init__(self, variables: Sequence[Any], learning_rate: float) -> None:
        self._rate = tf.constant(learning_rate, tf.float32)
        self._updates = tf.Variable(0.0, trainable=False)
        self._slots = [
            (variable, *(tf.Variable(tf.zeros_like(variable), trainable=False) for _ in range(2)))
            for variable in variables
        ]

    def apply(self, gradients: Sequence[Any]) -> None:
        """Update the variables; callable inside a tf.function."""
        updates = self._updates.assign_add(1.0)
        for (variable, m, v), gradient in zip(self._slots, gradients, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=tf.pow(0.9, updates),
                beta2_power=tf.pow(0.999, updates),
                lr=self._rate,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-7,
                grad=gradient,
            )


def fit_cached(
    tail: Tail, plan: Plan, names: Sequence[str], features: FeatureReader, progress: Progress
) -> tuple[list[Epoch], NDArray[np.float32]]:
    """Train `tail` in place and keep the averaged weights.

    Where only the head trains, each row is pooled once and the epochs run on the pooled
    vectors.

    Args:
        names: file name of each dataset row.

    Returns:
        The learning curve, and the validation logits of the kept weights, float32 (m, 6).
    """
    average = WeightAverage(tail.trainable_variables, plan.updates, plan.phase.swa_fraction)
    epochs = [
        [
            (chosen, _rows(features, names, plan.train[chosen], copies))
            for chosen, copies in plan.batches(epoch)
        ]
        for epoch in range(plan.phase.epochs)
    ]
    batches = [rows for epoch in epochs for _, rows in epoch]
    val = _rows(features, names, plan.val, np.zeros_like(plan.val))

    read: Read = lambda rows: features.batch(rows).astype(np.float32)  # noqa: E731
    pool: Callable[[Any], Any] = tail.pooled
    pool_with_gradient: Callable[[Any], Any] = partial(
        tail.pooled, matmul=matmul_in(plan.training.precision)
    )
    if plan.phase.trainable_layers == 0:
        read = _pooled_once(tail, read, np.unique(np.concatenate([*batches, val])))
        pool = pool_with_gradient = tf.identity
        inputs = _read_ahead(read, batches, None)
    else:
        inputs = _read_ahead(read, batches, plan)
    example = tf.constant(read(val[:1]))
    learn = _learner(tail, pool_with_gradient, plan, average, example)
    infer = traced(lambda batch: tail.logits(pool(batch)), example)
    curve, update = [], 0
    for number, epoch in enumerate(epochs, 1):
        loss = right = 0.0
        for chosen, _ in epoch:
            now = learn(next(inputs), tf.constant(plan.targets(chosen)), tf.constant(update))
            update += 1
            loss += float(now[0]) * len(chosen)
            right += float(np.sum(now[1].numpy().argmax(axis=1) == plan.train_labels[chosen]))
            progress(f"train {plan.name}", update, plan.updates)
        with average.applied():
            logits = _in_batches(infer, read, val)
        count = len(plan.train)
        curve.append(
            Epoch(number, loss / count, right / count, *score_logits(logits, plan.val_labels))
        )
    average.keep()
    return curve, logits


def traced(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Trace `function` once for any number of rows; a trace takes as long as ten updates."""
    specs = [
        tf.TensorSpec([None, *example.shape[1:]] if example.shape.rank else [], example.dtype)
        for example in examples
    ]
    graph: Callable[..., Any] = tf.function(function, autograph=False).get_concrete_function(*specs)
    return graph


def _learner(
    tail: Tail, pool: Callable[[Any], Any], plan: Plan, average: WeightAverage, example: Any
) -> Callable[..., Any]:
    variables = tail.trainable_variables
    optimizer = Adam(variables, plan.phase.learning_rate)

    def learn(batch: Any, targets: Any, update: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = tail.logits(pool(batch), update)
            losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, variables))
        average.update()
        return loss, logits

    return traced(learn, example, tf.zeros((1, len(LABELS))), tf.constant(0))


def _rows(features: FeatureReader, names: Sequence[str], photos: Rows, copies: Rows) -> Rows:
    pairs = zip(photos, copies, strict=True)
    return np.array([features.row(names[photo], int(copy)) for photo, copy in pairs], np.int64)


def _read_ahead(read: Read, batches: Iterable[Rows], plan: Plan | None) -> Iterator[Any]:
    """Read, and with a plan regularize, the next batches while an update runs."""

    def prepare(item: tuple[int, Rows]) -> Any:
        update, rows = item
        batch = read(rows)
        if plan is not None:
            random = plan.random(2, update)
            batch = mixstyle(batch, random, plan.training.mixstyle_prob)
            batch = random_erasing(batch, random, plan.training.random_erasing_prob)
        return tf.constant(batch)

    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in enumerate(batches):
            pending.append(pool.submit(prepare, item))
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _pooled_once(tail: Tail, read: Read, rows: Rows) -> Read:
    pool = traced(tail.pooled, tf.constant(read(rows[:1])))
    vectors = _in_batches(pool, read, rows)
    return lambda wanted: vectors[np.searchsorted(rows, wanted)]


def _in_batches(function: Callable[[Any], Any], read: Read, rows: Rows) -> NDArray[np.float32]:
    starts = range(0, len(rows), BATCH)
    return np.concatenate(
        [function(tf.constant(read(rows[at : at + BATCH]))).numpy() for at in starts]
    )

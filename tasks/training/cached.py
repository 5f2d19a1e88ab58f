"""Train the tail on cached features, with MixStyle and weight averaging."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.features import Features
from tasks.model.network import MIXED, Tail, mixed_matmul
from tasks.stage import Progress
from tasks.training.plan import Epoch, Plan, score_logits

BATCH = 64  # rows without gradients
AHEAD = 3  # batches that are read while an update runs
MIXSTYLE_ALPHA = 0.1
Rows = NDArray[np.int64]
Read = Callable[[Rows], NDArray[np.float32]]


def fit_cached(
    tail: Tail, plan: Plan, names: Sequence[str], features: Features, progress: Progress
) -> tuple[list[Epoch], NDArray[np.float32]]:
    """Train `tail` in place and keep the averaged weights; curve and validation logits.

    Where only the head trains, each row is pooled once. `names` are those of dataset rows.
    """

    def rows_of(photos: Rows, copies: Rows) -> Rows:
        pairs = zip(photos, copies.tolist(), strict=True)
        return np.array([features.numbers[names[photo], copy] for photo, copy in pairs], np.int64)

    epochs = [list(plan.batches(epoch)) for epoch in range(plan.phase.epochs)]
    batches = [rows_of(plan.train[at], copies) for epoch in epochs for at, copies in epoch]
    val = rows_of(plan.val, np.zeros_like(plan.val))
    read: Read = features.batch
    pooled = plan.phase.trainable_layers == 0
    if pooled:
        every = np.unique(np.concatenate([*batches, val]))
        pool = traced(tail.pooled, tf.constant(read(every[:1])))
        vectors = _in_batches(pool, read, every)
        read = lambda rows: vectors[np.searchsorted(every, rows)]  # noqa: E731
    inputs = _read_ahead(read, batches, None if pooled else plan)
    example = tf.constant(read(val[:1]))
    matmul = mixed_matmul if plan.training.precision == MIXED else tf.matmul
    variables = tail.trainable_variables
    average = WeightAverage(variables, plan.updates, plan.phase.swa_fraction)
    optimize = adam(variables, plan.phase.learning_rate)

    def learn(batch: Any, targets: Any, update: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = tail.logits(batch if pooled else tail.pooled(batch, matmul), update)
            losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
            loss = tf.reduce_mean(generalize(losses, targets, plan.gce_q))
        optimize(tape.gradient(loss, variables))
        average.update()
        return loss, logits

    learn = traced(learn, example, tf.zeros((1, plan.classes)), tf.constant(0))
    infer = traced(lambda x: tail.logits(x if pooled else tail.pooled(x)), example)
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
        count, validation = len(plan.train), score_logits(logits, plan.val_labels)
        curve.append(Epoch(number, loss / count, right / count, *validation))
    average.keep()
    return curve, logits


def generalize(losses: Any, targets: Any, q: float) -> Any:
    """Turn the cross-entropies of weighted one-hot targets, (n,), into (1 - p**q) / q.

    Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks, 2018.
    """
    if q == 0:
        return losses
    weights = tf.reduce_sum(targets, axis=1)
    return -weights * tf.math.expm1(-q * losses / weights) / q


def traced(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Trace `function` once for any number of rows; a trace takes as long as ten updates."""
    specs = [
        tf.TensorSpec([None, *example.shape[1:]] if example.shape.rank else [], example.dtype)
        for example in examples
    ]
    graph: Callable[..., Any] = tf.function(function, autograph=False).get_concrete_function(*specs)
    return graph


def _read_ahead(read: Read, batches: list[Rows], plan: Plan | None) -> Iterator[Any]:
    """Read, and with a plan mix styles of, the next batches while an update runs."""

    def prepare(update: int) -> Any:
        batch = read(batches[update])
        if plan is not None:
            batch = mixstyle(batch, plan.random(2, update), plan.training.mixstyle_prob)
        return tf.constant(batch)

    with ThreadPoolExecutor(1) as pool:
        pending = deque[Any]()
        for update in range(len(batches) + AHEAD):
            if update < len(batches):
                pending.append(pool.submit(prepare, update))
            if update >= AHEAD:
                yield pending.popleft().result()


def _in_batches(function: Callable[[Any], Any], read: Read, rows: Rows) -> NDArray[np.float32]:
    parts = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
    return np.concatenate([function(tf.constant(read(part))).numpy() for part in parts])


def adam(variables: Sequence[Any], learning_rate: float) -> Callable[[Sequence[Any]], None]:
    """Adam with Keras's defaults, as one fused operation per variable, which is faster."""
    number = tf.Variable(0.0, trainable=False)
    slots = [
        (variable, *(tf.Variable(tf.zeros_like(variable), trainable=False) for _ in range(2)))
        for variable in variables
    ]

    def apply(gradients: Sequence[Any]) -> None:
        updates = number.assign_add(1.0)
        for (variable, m, v), gradient in zip(slots, gradients, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=tf.pow(0.9, updates),
                beta2_power=tf.pow(0.999, updates),
                lr=learning_rate,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-7,
                grad=gradient,
            )

    return apply


class WeightAverage:
    """Mean of variables over the last `fraction` of all `updates`; 0 keeps the final values.

    Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018.
    """

    def __init__(self, variables: Sequence[Any], updates: int, fraction: float) -> None:
        self._variables = list(variables) if fraction else []
        self._averages = [tf.Variable(value, trainable=False) for value in self._variables]
        self._updates = tf.Variable(0.0, trainable=False)
        self._before = updates - round(fraction * updates)

    def update(self) -> None:
        share = 1.0 / tf.maximum(self._updates.assign_add(1.0) - self._before, 1.0)
        for average, variable in zip(self._averages, self._variables, strict=True):
            average.assign_add(share * (variable - average))

    def keep(self) -> None:
        for average, variable in zip(self._averages, self._variables, strict=True):
            variable.assign(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the variables to their average temporarily, to validate it."""
        present = [tf.identity(variable) for variable in self._variables]
        self.keep()
        try:
            yield
        finally:
            for value, variable in zip(present, self._variables, strict=True):
                variable.assign(value)


def mixstyle(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Mix each photo's channel statistics with another's, with a probability for the batch.

    float32, (n, h, w, channels). Zhou et al., Domain Generalization with MixStyle, 2021.
    """
    if random.random() >= probability:
        return features
    count = len(features)
    partners = random.permutation(count)
    weights = random.beta(MIXSTYLE_ALPHA, MIXSTYLE_ALPHA, (count, 1, 1, 1)).astype(np.float32)
    mean = features.mean(axis=(1, 2), keepdims=True)
    deviation = features.std(axis=(1, 2), keepdims=True) + np.float32(1e-6)
    mixed_mean, mixed_deviation = (
        weights * values + (1 - weights) * values[partners] for values in (mean, deviation)
    )
    result: NDArray[np.float32] = (features - mean) / deviation * mixed_deviation
    result += mixed_mean
    return result

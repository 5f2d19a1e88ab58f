"""Train the tail on cached features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tasks.model.augment import enlarge
from tasks.params import LABELS
from tasks.stage import Progress, in_order
from tasks.training.plan import Epoch, Plan
from tasks.training.regularizers import Average, erase_patches, mix_styles
from tasks.training.tail import Tail, product_in
from tasks.training.temperature import score


def traced(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Trace `function` once, for any number of rows.

    A plain `tf.function` is traced twice for its first calls, and again for the last,
    smaller batch; a trace takes as long as ten updates.

    Args:
        function: takes one tensor for each example.
        examples: tensors whose first axis counts rows, or of no axis.

    Returns:
        The same function as a graph.
    """
    specs = [
        tf.TensorSpec([None, *example.shape[1:]] if example.shape.rank else [], example.dtype)
        for example in examples
    ]
    graph: Callable[..., Any] = tf.function(function, autograph=False).get_concrete_function(*specs)
    return graph


class Adam(keras.optimizers.Adam):  # type: ignore[misc]
    """`keras.optimizers.Adam` for variables that lie on one device.

    Keras writes an update as a dozen operations that each go through the whole variable.
    TensorFlow has the same arithmetic as one (Kingma and Ba, Adam, 2015, the form at the
    end of section 2): an update of the tail takes a fortieth less time, and a phase a
    tenth of a second less to begin.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its two moments."""
        index = self._get_variable_index(variable)
        updates = tf.cast(self.iterations.value + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, updates),
            beta2_power=tf.pow(self.beta_2, updates),
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


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


_BATCH = 64
_Rows = NDArray[np.int64]
_Change = Callable[[NDArray[np.float32], int], NDArray[np.float32]]


class FeatureStore(Protocol):
    """What `tasks.model.feature_store.Features` gives."""

    def row(self, name: str, view: int) -> int: ...

    def batch(self, rows: Any) -> NDArray[Any]: ...


def fit_cached(
    model: Any, plan: Plan, names: Sequence[str], features: FeatureStore, progress: Progress
) -> tuple[list[Epoch], NDArray[np.float32]]:
    """Train `model`'s tail and head in place; the averaged weights are kept.

    Where only the head trains, block 7a and the top run once for each view that
    will be seen, and the epochs are over pooled vectors.

    Args:
        model: of `build_model`, its layers opened by `freeze`.
        plan: the phase.
        names: file name of each dataset row.
        features: the stored activations.
        progress: told after every update.

    Returns:
        The learning curve, and the validation logits of the kept weights,
        float32, (m, 6).
    """
    tail = Tail(model, plan.training.dropout, plan.seed)
    average = Average(tail.variables, plan.updates, plan.phase.swa_fraction)
    epochs = [
        [
            (chosen, _rows(features, names, plan.train[chosen], views))
            for chosen, views in plan.batches(epoch)
        ]
        for epoch in range(plan.phase.epochs)
    ]
    val = _rows(features, names, plan.val, np.zeros_like(plan.val))
    seen = [rows for batches in epochs for _, rows in batches]
    inputs = _reader(features)
    pool: Callable[[Any], Any] = tail.pooled
    product = product_in(plan.training.precision)
    pool_to_learn: Callable[[Any], Any] = partial(tail.pooled, product=product)
    change = _changes(plan)
    if plan.phase.trainable_layers == 0:
        inputs = _pooled_once(tail, inputs, np.unique(np.concatenate([*seen, val])))
        pool = pool_to_learn = tf.identity
        change = _unchanged
    some = inputs(val[:1])
    learn = _learner(tail, pool_to_learn, plan, average, some)
    infer = traced(lambda batch: tail.logits(pool(batch)), some)
    coming = _read_ahead(inputs, seen, change)
    curve, update = [], 0
    for number, batches in enumerate(epochs, 1):
        loss = right = 0.0
        for chosen, _ in batches:
            now = learn(next(coming), tf.constant(plan.targets(chosen)), tf.constant(update))
            update += 1
            loss += float(now[0]) * len(chosen)
            right += float(np.sum(now[1].numpy().argmax(axis=1) == plan.train_labels[chosen]))
            progress(f"train {plan.name}", update, plan.updates)
        with average.in_place():
            logits = _in_batches(infer, inputs, val)
        val_loss, val_accuracy = score(logits, plan.val_labels)
        count = len(plan.train)
        curve.append(Epoch(number, loss / count, right / count, val_loss, val_accuracy))
    average.keep()
    return curve, logits


def _learner(
    tail: Tail, pool: Callable[[Any], Any], plan: Plan, average: Average, some: Any
) -> Callable[..., Any]:
    optimizer = plan.optimizer(Adam)
    optimizer.build(tail.variables)

    def learn(batch: Any, targets: Any, update: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = tail.logits(pool(batch), update)
            losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, [variable.value for variable in tail.variables])
        optimizer.apply(gradients, tail.variables)
        average.update()
        return loss, logits

    return traced(learn, some, tf.zeros((1, len(LABELS))), tf.constant(0))


def _rows(features: FeatureStore, names: Sequence[str], photos: _Rows, views: _Rows) -> _Rows:
    pairs = zip(photos, views, strict=True)
    return np.array([features.row(names[photo], int(view)) for photo, view in pairs], np.int64)


def _reader(features: FeatureStore) -> Callable[[_Rows], Any]:
    return lambda rows: tf.constant(features.batch(rows).astype(np.float32))


def _changes(plan: Plan) -> _Change:
    """What a batch goes through before an update of a phase that opens layers."""
    training = plan.training

    def change(features: NDArray[np.float32], update: int) -> NDArray[np.float32]:
        random = plan.random(2, update)
        mixed = mix_styles(features, random, training.mixstyle_prob)
        return erase_patches(mixed, random, training.random_erasing_prob)

    return change


def _unchanged(vectors: NDArray[np.float32], update: int) -> NDArray[np.float32]:
    return vectors


def _read_ahead(
    inputs: Callable[[_Rows], Any], seen: Iterable[_Rows], change: _Change
) -> Iterator[Any]:
    """Read and change the next batches while an update runs."""

    def read(item: tuple[int, _Rows]) -> Any:
        update, rows = item
        return tf.constant(change(inputs(rows).numpy(), update))

    return in_order(read, enumerate(seen), workers=1)


def _pooled_once(tail: Tail, inputs: Callable[[_Rows], Any], rows: _Rows) -> Callable[[_Rows], Any]:
    pooled = traced(tail.pooled, inputs(rows[:1]))
    vectors = _in_batches(pooled, inputs, rows)
    return lambda wanted: tf.constant(vectors[np.searchsorted(rows, wanted)])


def _in_batches(
    function: Callable[[Any], Any], inputs: Callable[[_Rows], Any], rows: _Rows
) -> NDArray[np.float32]:
    starts = range(0, len(rows), _BATCH)
    return np.concatenate([function(inputs(rows[at : at + _BATCH])).numpy() for at in starts])

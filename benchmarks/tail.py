"""One update of the tail, the ways it can be computed, and how fast its products are.

    python -m benchmarks.tail [--rounds N] [--json]

32 photos with sixteen layers open, forward and backward, Adam and the even average;
random features and weights. The ways take turns in one process, so that a busy moment
meets all of them.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import keras
import numpy as np
import tensorflow as tf
import typer

from benchmarks import markdown
from benchmarks.training import ROOT
from tasks.model.network import FEATURE_SHAPE, backbone_of, build_tail, freeze
from tasks.params import LABELS, load_params
from tasks.training.cached import Adam, traced
from tasks.training.regularizers import Average
from tasks.training.tail import FULL, MIXED, Tail, product_in, tail_layers

BATCH, OPEN = 32, 16
PLACES = BATCH * FEATURE_SHAPE[0] * FEATURE_SHAPE[1]
PRODUCTS = ((PLACES, 192, 1152), (PLACES, 1152, 320), (PLACES, 320, 1280))
Run = Callable[[], Any]


def main(
    rounds: Annotated[int, typer.Option(help="Updates, and products, of each way.")] = 100,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure, and print two tables."""
    found = {"updates": in_turns(updates(), rounds), "products": in_turns(products(), rounds)}
    print(json.dumps(found, indent=1) if json_ else tables(found))


def updates() -> dict[str, Run]:
    """Ways to compute one update, the committed one last."""
    return {
        "through Keras's layers": update(layers, keras.optimizers.Adam),
        "written out, each batch norm in its convolution": update(FULL, keras.optimizers.Adam),
        "the same, Adam in one operation a variable": update(FULL, Adam),
        "the same, large products of bfloat16 numbers": update(MIXED, Adam),
    }


def update(way: Any, adam: type[Any]) -> Run:
    """Build a tail of its own and give what updates it once."""
    model = build_tail()
    random = np.random.default_rng(0)
    for layer in tail_layers(model):
        for variable in layer.weights:
            if "kernel" in variable.path:
                spread = np.prod(variable.shape[:-1]) ** -0.5
                variable.assign(spread * random.normal(size=variable.shape))
    freeze(model, OPEN)
    training = load_params(ROOT / "params.yaml").training
    tail = Tail(model, training.dropout)
    pool = (
        partial(layers, model) if way is layers else partial(tail.pooled, product=product_in(way))
    )
    average = Average(tail.variables, 1, 0.75)
    optimizer = adam(1e-4)
    optimizer.build(tail.variables)

    def learn(features: Any, targets: Any, number: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = tail.logits(pool(features), number)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
        gradients = tape.gradient(loss, [variable.value for variable in tail.variables])
        optimizer.apply(gradients, tail.variables)
        average.update()
        return loss

    features = tf.constant(np.abs(random.normal(size=(BATCH, *FEATURE_SHAPE))), tf.float32)
    targets = tf.one_hot(np.arange(BATCH) % len(LABELS), len(LABELS))
    graph = traced(learn, features[:1], targets[:1], tf.constant(0))
    return lambda: float(graph(features, targets, tf.constant(0)))


def layers(model: Any, features: Any) -> Any:
    """Pool what Keras's layers give."""
    return tf.reduce_mean(backbone_of(model)(features, training=False), [1, 2])


def products() -> dict[str, Run]:
    """The products of an update's forward half, in both precisions."""
    found: dict[str, Run] = {}
    for rows, inner, columns in PRODUCTS:
        for kind in (tf.float32, tf.bfloat16):
            left, right = tf.ones((rows, inner), kind), tf.ones((inner, columns), kind)
            graph = tf.function(tf.matmul).get_concrete_function(left, right)
            name = f"{rows:,} x {inner:,} by {inner:,} x {columns:,}, {kind.name}"
            found[name] = partial(lambda graph, *both: graph(*both)[0, 0], graph, left, right)
    return found


def in_turns(ways: dict[str, Run], rounds: int) -> dict[str, float]:
    """Give the median of each way in milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(all_) for name, all_ in taken.items()}


def tables(found: dict[str, dict[str, float]]) -> str:
    """Milliseconds of each way, and what the products reach."""
    sizes = [size for size in PRODUCTS for _ in range(2)]
    speeds = [
        (name, f"{taken:.2f}", f"{2 * np.prod(size) / taken / 1e6:.0f}")
        for (name, taken), size in zip(found["products"].items(), sizes, strict=True)
    ]
    return "\n\n".join(
        (
            markdown.table(
                ("one update", "ms"),
                [(name, f"{taken:.1f}") for name, taken in found["updates"].items()],
            ),
            markdown.table(("product", "ms", "GFLOP/s"), speeds),
        )
    )


if __name__ == "__main__":
    typer.run(main)

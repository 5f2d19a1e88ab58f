"""How soon a photo is answered: the released graph beside Keras, and from a cold start.

    python -m benchmarks.latency [--artifacts FOLDER] [--json]

Takes `model.pb` and `model.keras` of a retrain. Pictures are uint8 and of the model's
size already. The engines take turns in one process, so that a busy moment meets all of
them. Commands are run from a shell, best of several; `predict` needs a champion here.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.training import ROOT, markdown_table
from tasks.model.inference import Engine
from tasks.rendering.scene import draw
from tasks.synthetic import encode

HANDSIGNS = Path(sys.executable).with_name("handsigns")
SIZE = 224
BATCH = 32
Pictures = NDArray[np.uint8]


def main(
    artifacts: Annotated[Path, typer.Option(help="Holds model.pb and model.keras.")] = (
        ROOT / "artifacts"
    ),
    rounds: Annotated[int, typer.Option(help="Photos, and batches of 32, an engine.")] = 100,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure, and print two tables."""
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    results: dict[str, Any] = {
        "engines": engines(artifacts, pictures, rounds),
        "commands": dict(commands()),
    }
    if json_:
        print(json.dumps(results, indent=1))
    else:
        print(table(results["engines"]), cold(results["commands"]), sep="\n\n")


def engines(artifacts: Path, pictures: Pictures, rounds: int) -> dict[str, dict[str, float]]:
    """Time each way of running the model on one picture and on 32."""
    ways = dict(prepared(artifacts))
    alone: dict[str, list[float]] = {name: [] for name in ways}
    together: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run(pictures[:1])
        run(pictures)
    for number in range(rounds):
        for name, run in ways.items():
            alone[name].append(timed(run, pictures[number % BATCH :][:1]))
            if number % 10 == 0:
                together[name].append(timed(run, pictures))
    return {
        name: {
            "median_ms": 1e3 * statistics.median(alone[name]),
            "p95_ms": 1e3 * float(np.percentile(alone[name], 95)),
            "photos_per_second": BATCH / statistics.median(together[name]),
            "best_photos_per_second": BATCH / min(together[name]),
        }
        for name in ways
    }


def prepared(artifacts: Path) -> Iterator[tuple[str, Callable[[Pictures], Any]]]:
    """Yield the ways to run the model."""
    import tensorflow as tf
    from keras.saving import load_model

    graph = artifacts / "model.pb"
    every, one = Engine(graph), Engine(graph, cores=1)
    yield (
        "model.pb, OpenVINO, as predict and serve run it",
        lambda photos: list(every.stream(photos)),
    )
    yield (
        "the same, one stream of one core",
        lambda photos: [next(one.stream([photo])) for photo in photos],
    )
    model = load_model(artifacts / "model.keras", compile=False)
    traced = tf.function(
        lambda photos: model(tf.cast(photos, tf.float32), training=False), reduce_retracing=True
    )
    yield "model.keras in a tf.function", lambda photos: np.asarray(traced(tf.constant(photos)))
    yield "model.keras, keras predict", lambda photos: model.predict(photos, verbose=0)


def commands(repeats: int = 5) -> Iterator[tuple[str, list[float]]]:
    """Time commands as a person types them; `predict` only where there is a champion."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        photo.write_bytes(encode(draw((0, 3, 0))))
        for title, words in (
            ("handsigns --help", ["--help"]),
            ("handsigns predict PHOTO", ["predict", str(photo)]),
        ):
            seconds = []
            for _ in range(repeats):
                began = time.monotonic()
                ended = subprocess.run([HANDSIGNS, *words], cwd=ROOT, capture_output=True)
                seconds.append(time.monotonic() - began)
                if ended.returncode:
                    print(f"{title}: {ended.stderr.decode().strip()}", file=sys.stderr)
                    break
            else:
                yield title, seconds


def timed(run: Callable[[Pictures], Any], pictures: Pictures) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run(pictures)
    return time.perf_counter() - began


def table(results: dict[str, dict[str, float]]) -> str:
    """One row an engine."""
    return markdown_table(
        ("", "one photo, median ms", "95th percentile ms", "photos/s of 32, median", "best"),
        [
            (
                name,
                f"{found['median_ms']:.1f}",
                f"{found['p95_ms']:.1f}",
                f"{found['photos_per_second']:.0f}",
                f"{found['best_photos_per_second']:.0f}",
            )
            for name, found in results.items()
        ],
    )


def cold(results: dict[str, list[float]]) -> str:
    """One row a command."""
    return markdown_table(
        ("command", "seconds, median", "best", "worst"),
        [
            (
                f"`{name}`",
                f"{statistics.median(seconds):.2f}",
                f"{min(seconds):.2f}",
                f"{max(seconds):.2f}",
            )
            for name, seconds in results.items()
        ],
    )


if __name__ == "__main__":
    typer.run(main)

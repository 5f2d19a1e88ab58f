"""One way of training, in a process of its own: `python -m benchmarks.variant RESULT`.

Runs in a prepared folder (see `benchmarks.training`): times every stage whose result
is not there yet, and writes what it measured to RESULT. Scoring the test split comes
after that, and is not timed.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer

from tasks import assemble, audit, features, preprocess, train
from tasks.data.dataset import open_dataset
from tasks.garbage import rare_collection
from tasks.io import read_json
from tasks.model.inference import load_classifier
from tasks.params import load_params
from tasks.project import Project
from tasks.scoring.metrics import score
from tasks.stage import Context, Stage


class Stopwatch:
    """Times stages, and what the stages themselves say they have done by when."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.work: dict[str, float] = {}
        self.updates: list[tuple[str, int, int, float]] = []

    def progress(self, what: str, done: int, total: int) -> None:
        if what.startswith("train "):
            moment = time.monotonic() - self.began
            self.updates.append((what.removeprefix("train "), done, total, moment))

    def run(self, name: str, stage: Stage, context: Context, item: str | None = None) -> None:
        began = time.monotonic()
        stage(context, item)
        self.seconds[name] = time.monotonic() - began
        moments = [moment for phase, *_, moment in self.updates if phase == name]
        if len(moments) > 1:
            self.work[name] = moments[-1] - moments[0]
        print(f"  {name}: {self.seconds[name]:.1f} s", flush=True)


def main(result: Path) -> None:
    """Train, then score."""
    import tensorflow  # noqa: F401  (its import is no part of any way of training)

    project = Project(Path.cwd())
    params = load_params(project.params)
    watch = Stopwatch()
    context = Context(project, params, watch.progress)
    if not project.dataset.exists():
        watch.run("audit", audit.run, context)
        watch.run("preprocess", preprocess.run, context)
    computed: dict[str, Any] = {}
    if params.training.mode == "cached":
        watch.run("features", features.run, context)
        computed = read_json(project.features_report)
        watch.work["features"] = computed["computed"] / computed["images_per_second"]
    for phase in params.phases:
        watch.run(phase, train.run, context, phase)
    trained = sum(watch.seconds.values())
    peak = peak_mib()
    histories = {phase: read_json(project.history(phase)) for phase in params.phases}
    content = {
        "seconds": trained,
        "stages": watch.seconds,
        "work": watch.work,
        "rows": computed.get("computed", 0),
        "peak_mib": peak,
        "features_mib": sum(path.stat().st_size for path in project.features.rglob("*")) / 2**20,
        "curve": curve(histories, watch.updates),
        "val": {name: histories[params.last_phase][f"val_{name}"] for name in ("accuracy", "loss")},
        "test": scores(context),
    }
    result.write_text(json.dumps(content))


def scores(context: Context) -> dict[str, float]:
    """Accuracy and loss on the test split."""
    assemble.run(context)
    dataset = open_dataset(context.project.dataset)
    rows = dataset.rows("test")
    classifier = load_classifier(context.project.graph, context.params.preprocess.image_size)
    given = classifier.probabilities(dataset.images[rows])
    found = score(given.astype(np.float64), dataset.labels[rows])
    return {"accuracy": found.accuracy, "loss": found.loss}


def peak_mib() -> float:
    """The most memory that this process, or one that it started, held at a time."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


def curve(
    histories: dict[str, dict[str, list[dict[str, float]]]],
    updates: list[tuple[str, int, int, float]],
) -> list[tuple[float, float]]:
    """Validation accuracy by the second at which its epoch was trained."""
    points = []
    for phase, history in histories.items():
        moments = [(done, total, moment) for name, done, total, moment in updates if name == phase]
        epochs = history["epochs"]
        for number, epoch in enumerate(epochs, start=1):
            moment = min(at for done, total, at in moments if done * len(epochs) >= number * total)
            points.append((moment, epoch["val_accuracy"]))
    return points


if __name__ == "__main__":
    with rare_collection():  # as every stage's own process does
        typer.run(main)

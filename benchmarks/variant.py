"""One way of training, in a process of its own: `python -m benchmarks.variant RESULT`.

Runs in a prepared folder (see `benchmarks.training`): times every stage whose result
is not there yet, scores the model on the test split afterwards, and writes what it
measured to RESULT.
"""

import json
import resource
import sys
import time
from pathlib import Path

from tasks import assemble, audit, evaluate, features, preprocess, train
from tasks.layout import Layout
from tasks.params import load_params
from tasks.stage import Context, Stage


class Stopwatch:
    """Times stages, and the moment at which each update of a phase was done."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.updates: list[tuple[str, int, int, float]] = []

    def progress(self, what: str, done: int, total: int) -> None:
        if what.startswith("train "):
            moment = time.monotonic() - self.began
            self.updates.append((what.removeprefix("train "), done, total, moment))

    def run(self, name: str, stage: Stage, context: Context, item: str | None = None) -> None:
        began = time.monotonic()
        stage(context, item)
        self.seconds[name] = time.monotonic() - began
        print(f"  {name}: {self.seconds[name]:.1f} s", flush=True)


def main(result: Path) -> None:
    """Train, then score."""
    import tensorflow  # noqa: F401  (its import is no part of any way of training)

    layout = Layout(Path.cwd())
    params = load_params(layout.params)
    watch = Stopwatch()
    context = Context(layout, params, watch.progress)
    if not layout.dataset.exists():
        watch.run("audit", audit.run, context)
        watch.run("preprocess", preprocess.run, context)
    if params.training.mode == "cached":
        watch.run("features", features.run, context)
    for phase in params.phases:
        watch.run(phase, train.run, context, phase)
    trained = sum(watch.seconds.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features_bytes = sum(path.stat().st_size for path in layout.features.rglob("*"))
    assemble.run(context)
    evaluate.run(context)
    histories = {
        phase: json.loads((layout.weights(phase) / "history.json").read_text())
        for phase in params.phases
    }
    content = {
        "seconds": trained,
        "stages": watch.seconds,
        "peak_mib": peak / 1024,
        "features_mib": features_bytes / 2**20,
        "curve": curve(histories, watch.updates),
        "val": {name: histories[params.last_phase][f"val_{name}"] for name in ("accuracy", "loss")},
        "test": json.loads(layout.metrics.read_text()),
    }
    result.write_text(json.dumps(content))


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
    main(Path(sys.argv[1]))

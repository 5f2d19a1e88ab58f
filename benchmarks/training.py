"""Compare this workflow's training with plain Keras, on the same split, in one go.

    python -m benchmarks.training [--photos FOLDER] [--test FOLDER] [--only NAME]… [--json]

Plain Keras trains as the published model's notebook does: live augmentation and
`keras.Model.fit` through the whole network, 5 epochs on 10 % of the photos, 6 more with the
top 10 layers unfrozen, 5 on all photos. Against it: the same epochs and rates on cached
features, and the default recipe of `params.yaml`.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from tasks import assemble, audit, backbone, features, preprocess, synthetic, train
from tasks.data.dataset import open_dataset
from tasks.data.importer import import_photos
from tasks.io import read_json, write_json
from tasks.model.inference import load_classifier
from tasks.params import PHASES, load_params
from tasks.project import Project
from tasks.scoring.metrics import score
from tasks.stage import Context, collect_rarely
from tasks.synthetic import render_sample

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = {
    "training": {"dropout": 0.0, "mixstyle_prob": 0.0, "temperature": 1.0},
    "phases": {
        "base": {"epochs": 5, "learning_rate": 0.001},
        "fine_tune": {"epochs": 6, "learning_rate": 0.0001},
        "full": {
            "epochs": 5,
            "learning_rate": 0.0001,
            "swa_fraction": 0.0,
            "trainable_layers": 10,
        },
    },
    "features": {"augmented_copies": 0},
    "synthetic": {"per_class": 0},
}
VARIANTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "plain": ("plain Keras", [NOTEBOOK, {"training": {"mode": "end_to_end"}}]),
    "cached": ("cached features, same epochs", [NOTEBOOK]),
    "photos": ("default recipe, photos only", [{"synthetic": {"per_class": 0}}]),
    "default": ("default recipe", []),
}


def main(
    photos: Annotated[Path | None, typer.Option(help="Class folders; else the sample.")] = None,
    test: Annotated[Path | None, typer.Option(help="An official test set.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these variants.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    measured: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Train every variant and print times, ratios, scores and memory."""
    if measured:
        measure(Project(Path.cwd()))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Project(Path(temporary) / "base")
        prepare(base, photos, test)
        for name in only or VARIANTS:
            print(VARIANTS[name][0], file=sys.stderr, flush=True)
            results[name] = run_variant(base, Path(temporary) / name, VARIANTS[name][1])
    print(json.dumps(results, indent=1) if json_ else table(results))


def prepare(project: Project, photos: Path | None, test: Path | None) -> None:
    """Import or render the photos, and fetch the backbone."""
    project.root.mkdir()
    shutil.copy(ROOT / "params.yaml", project.params)
    cached = Project(ROOT).local / "backbone"
    if cached.is_dir():
        shutil.copytree(cached, project.local / "backbone")
    if photos is None:
        render_sample(project.data)
    else:
        import_photos(project, photos, test)
    context = Context(project, load_params(project.params))
    audit.run(context)
    backbone.run(context)


def run_variant(base: Project, folder: Path, changes: list[dict[str, Any]]) -> dict[str, Any]:
    """Train one variant in a process and folder of its own."""
    shutil.copytree(base.root, folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for change in changes:
        merge(params, change)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    command = [sys.executable, "-m", "benchmarks.training", "--measured"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=True)
    result: dict[str, Any] = read_json(folder / "result.json")
    shutil.rmtree(folder)
    return result


def measure(project: Project) -> None:
    """Time features and phases, score the test split, and write `result.json`."""
    import tensorflow  # noqa: F401  (its import is not part of training)

    context = Context(project, load_params(project.params))
    synthetic.run(context)
    preprocess.run(context)
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Any, item: str | None = None) -> None:
        start = time.monotonic()
        stage.run(context, item)
        seconds[name] = time.monotonic() - start

    if context.params.training.mode == "cached":
        timed("features", features)
    for phase in context.params.phases:
        timed(phase, train, phase)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024
    assemble.run(context)
    dataset = open_dataset(project.dataset)
    rows = dataset.rows("test")
    params = context.params.preprocess
    classifier = load_classifier(project.graph, params, dataset.classes)
    probabilities = classifier.probabilities(dataset.images[rows]).astype(np.float64)
    scores = score(probabilities, dataset.labels[rows], dataset.classes)
    history = read_json(project.history(PHASES[-1]))
    content = {
        "seconds": sum(seconds.values()),
        "stages": seconds,
        "peak_mib": peak,
        "val": {"accuracy": history["val_accuracy"], "loss": history["val_loss"]},
        "test": {"accuracy": scores.accuracy, "loss": scores.loss},
    }
    write_json(project.root / "result.json", content)


def merge(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` into nested `content`."""
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(content[key], value)
        else:
            content[key] = value


def table(results: dict[str, Any]) -> str:
    """Times, how many times shorter than plain Keras, scores, memory and stages."""
    heads = ("", "seconds", "plain ÷ this", "val accuracy, loss", "test accuracy, loss", "peak MiB")
    plain = results.get("plain")
    rows = []
    for name, result in results.items():
        ratio = f"{plain['seconds'] / result['seconds']:.1f}" if plain else "-"
        scores = [f"{result[s]['accuracy']:.1%}, {result[s]['loss']:.3f}" for s in ("val", "test")]
        parts = ", ".join(f"{stage} {value:.1f}" for stage, value in result["stages"].items())
        peak = f"{result['peak_mib']:,.0f}"
        rows.append((VARIANTS[name][0], f"{result['seconds']:.1f}", ratio, *scores, peak, parts))
    return markdown_table((*heads, "stages"), rows)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table: first column left, the others right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    collect_rarely()  # as every stage's process does
    typer.run(main)

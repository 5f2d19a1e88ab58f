"""What a change costs: a whole retrain, 5 % more photos, another rate, nothing at all.

    python -m benchmarks.increment --photos FOLDER [--json]
    python -m benchmarks.increment --render N [--json]

Wall time of `handsigns retrain` in a clone of the last commit, servers and all, and of
that the stages of `dvc.yaml` alone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks import markdown
from benchmarks.training import ROOT, lend_package
from tasks.params import LABELS
from tasks.project import Project
from tasks.rendering.sample import render_sample

HANDSIGNS = Path(sys.executable).with_name("handsigns")
FIRST = 19
SHARE = 20
"""Of every twenty photos one comes after the nineteen others: 5 % more."""


def main(
    photos: Annotated[Path | None, typer.Option(help="Class folders.")] = None,
    render: Annotated[int, typer.Option(help="Photos to render in place of them.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Retrain four times, each after another change."""
    if (photos is None) == (render == 0):
        raise typer.BadParameter("Name photos, or how many to render.")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if photos is None:
            render_sample(folder / "rendered", per_class=render // len(LABELS))
            photos = folder / "rendered" / "train"
        clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        lend_package(Project(clone))
        divide(photos, folder / "first", folder / "later")
        run(clone, "import", folder / "first", "--replace")
        results["everything"] = retrain(clone)
        run(clone, "import", folder / "later")
        results["5 % more photos"] = retrain(clone)
        params = yaml.safe_load((clone / "params.yaml").read_text())
        params["phases"]["full"]["learning_rate"] *= 0.9
        (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        results["another rate in full"] = retrain(clone)
        results["nothing"] = retrain(clone)
    if json_:
        print(json.dumps(results, indent=1))
    else:
        print(table(results), stages(results), sep="\n\n")


def divide(photos: Path, first: Path, later: Path) -> None:
    """Put every twentieth photo of each class aside."""
    for label in LABELS:
        for number, path in enumerate(sorted((photos / label).iterdir())):
            target = (later if number % SHARE == FIRST else first) / label / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def retrain(clone: Path) -> dict[str, Any]:
    """Wall time of one retrain, and what it says it did."""
    began = time.monotonic()
    run(clone, "retrain")
    wall = time.monotonic() - began
    report = json.loads((clone / "artifacts/run.json").read_text())
    known = yaml.safe_load((clone / "dvc.yaml").read_text())["stages"]
    seconds = {
        name: value
        for name, value in report["seconds"].items()
        if name.partition("@")[0] in known and report["status"] != "unchanged"
    }
    return {
        "wall": wall,
        "stages": seconds,
        "status": report["status"],
        "features": report["features"],
    }


def run(clone: Path, *words: str | Path) -> None:
    """Run the clone's own `handsigns`; a model that is refused is a result too."""
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    subprocess.run(
        [HANDSIGNS, *words],
        cwd=clone,
        env=environment,
        stdout=sys.stderr,
        check=words[0] != "retrain",
    )


def table(results: dict[str, Any]) -> str:
    """One row a change, each against the whole."""
    whole = results["everything"]
    return markdown.table(
        ("changed", "seconds", "of the whole", "stages", "of the whole", "computed", "reused", ""),
        [
            (
                name,
                f"{result['wall']:.1f}",
                f"{result['wall'] / whole['wall']:.0%}",
                f"{sum(result['stages'].values()):.1f}",
                f"{sum(result['stages'].values()) / sum(whole['stages'].values()):.0%}",
                f"{result['features']['computed']:,}",
                f"{result['features']['reused']:,}",
                result["status"],
            )
            for name, result in results.items()
        ],
    )


def stages(results: dict[str, Any]) -> str:
    """Seconds of each stage."""
    names = list(results["everything"]["stages"])
    return markdown.table(
        ("seconds", *names),
        [
            (name, *(f"{result['stages'].get(stage, 0.0):.1f}" for stage in names))
            for name, result in results.items()
        ],
    )


if __name__ == "__main__":
    typer.run(main)

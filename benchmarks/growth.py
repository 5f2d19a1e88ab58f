"""What more photos cost: time, memory and disk at 1, 3 and 10 times as many.

    python -m benchmarks.growth [--photos N] [--picture FILE] [--json]

The photos are rendered. Timed are all stages from the audit to the last phase; memory is
the most that the process, or one that it starts, holds at a time.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from benchmarks import markdown
from benchmarks.training import begin, measure
from tasks import backbone
from tasks.params import LABELS, load_params
from tasks.project import Project
from tasks.rendering.sample import render_sample
from tasks.stage import Context

TIMES = (1, 3, 10)


def main(
    photos: Annotated[int, typer.Option(help="Photos at 1 time.")] = 300,
    picture: Annotated[Path | None, typer.Option(help="Where to draw the curve.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure each size in a process of its own."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        base, every = Project(Path(temporary) / "base"), Path(temporary) / "every"
        begin(base)
        backbone.run(Context(base, load_params(base.params)))
        print("render", file=sys.stderr, flush=True)
        render_sample(every, per_class=photos * max(TIMES) // len(LABELS))
        for times in TIMES:
            count = photos * times
            print(f"{count} photos", file=sys.stderr, flush=True)
            choose(every, base.data, count // len(LABELS))
            results[count] = measure(base, Path(temporary) / "run", {}, {})
    if picture:
        draw(results).savefig(picture, dpi=110, metadata={"Software": None})
    if json_:
        print(json.dumps(results, indent=1))
    else:
        print(table(results))


def choose(every: Path, data: Path, per_class: int) -> None:
    """Copy the first photos of each class; a smaller choice lies within a larger one."""
    for label in LABELS:
        target = data / "train" / label
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((every / "train" / label).iterdir())[:per_class]:
            shutil.copy(path, target)


def table(results: dict[int, Any]) -> str:
    """One row a size, each against the first."""
    first = next(iter(results.values()))
    return markdown.table(
        ("photos", "seconds", "times", "peak MiB", "more MiB", "features, rows", "on disk, MiB"),
        [
            (
                f"{count:,}",
                f"{result['seconds']:.1f}",
                f"{result['seconds'] / first['seconds']:.2f}",
                f"{result['peak_mib']:,.0f}",
                f"{result['peak_mib'] - first['peak_mib']:,.0f}",
                f"{result['rows']:,}",
                f"{result['features_mib']:.0f}",
            )
            for count, result in results.items()
        ],
    )


def draw(results: dict[int, Any]) -> Figure:
    """Seconds and memory by number of photos."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    counts = list(results)
    for place, (key, title) in enumerate(
        (("seconds", "seconds, audit to last phase"), ("peak_mib", "peak memory, MiB")), start=1
    ):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(counts, [result[key] for result in results.values()], marker="o")
        axes.set_xlabel("photos")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    typer.run(main)

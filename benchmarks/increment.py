"""What a change costs: a whole retrain, 5 % more photos, another rate, nothing at all.

    python -m benchmarks.increment --photos FOLDER [--json]

Wall time of `handsigns retrain` in a clone, servers and all.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.training import ROOT
from tasks.labels import LABELS

HANDSIGNS = Path(sys.executable).with_name("handsigns")
SHARE = 20
"""Every twentieth photo comes later: 5 %."""


def main(
    photos: Annotated[Path, typer.Option(help="Class folders.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Retrain four times, each after another change."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
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
        Console().print(table(results))


def divide(photos: Path, first: Path, later: Path) -> None:
    """Put every twentieth photo of each class aside."""
    for label in LABELS:
        for number, path in enumerate(sorted((photos / label).iterdir())):
            target = (later if number % SHARE == 0 else first) / label / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def retrain(clone: Path) -> dict[str, Any]:
    """Wall time of one retrain, and what it says it did."""
    began = time.monotonic()
    run(clone, "retrain")
    seconds = time.monotonic() - began
    report = json.loads((clone / "artifacts/run.json").read_text())
    kept = {name: report[name] for name in ("status", "features", "seconds")}
    return {"wall": seconds, **kept}


def run(clone: Path, *words: str | Path) -> None:
    """Run `handsigns` in the clone."""
    subprocess.run([HANDSIGNS, *words], cwd=clone, stdout=sys.stderr, check=True)


def table(results: dict[str, Any]) -> Table:
    """One row a change, each against the whole."""
    shown = Table(title="What a change costs")
    for head in ("changed", "seconds", "of the whole", "status", "computed", "reused"):
        shown.add_column(head, justify="left" if head in ("changed", "status") else "right")
    whole = results["everything"]["wall"]
    for name, result in results.items():
        shown.add_row(
            name,
            f"{result['wall']:.1f}",
            f"{result['wall'] / whole:.0%}",
            result["status"],
            str(result["features"]["computed"]),
            str(result["features"]["reused"]),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)

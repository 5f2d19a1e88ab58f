"""A recipe on people it did not learn from: consecutive halves of each class, both ways.

    python -m benchmarks.halves FOLDER [--seeds 3] [--set training.style_mixing=0]

The photos of a class are sorted by the number in their file names, which cameras count
up, and cut in the middle; the recipe of `params.yaml`, with what `--set` changes, trains
on one half and is scored on the other. Before the temperature, which would be fitted on
the photos that are scored.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.training import merge, prepare
from tasks import features, train
from tasks.data.dataset import INDEX
from tasks.data.images import read_photo
from tasks.io import read_json, write_json
from tasks.params import load_params
from tasks.project import Project
from tasks.stage import Context


def main(
    photos: Annotated[Path, typer.Argument(help="Class folders.")],
    seeds: Annotated[int, typer.Option(help="Runs on each half.")] = 3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.name=value")] = None,
) -> None:
    """Print accuracy and loss of every run, then the mean and the worst."""
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Project(Path(temporary) / "base")
        prepare(base, photos, None)
        numbers = {
            read_photo(path.read_bytes(), path.name).name: camera_number(path)
            for path in sorted(photos.glob("*/*"))
        }
        for half in (0, 1):
            for seed in range(1, seeds + 1):
                project = Project(Path(temporary) / f"{half}-{seed}")
                shutil.copytree(base.root, project.root)
                hold_out(project, numbers, half)
                change(project, [*(set_ or []), f"seed={seed}", "training.calibrate=false"])
                runs.append(fit(project))
                print(f"half {half}, seed {seed}: {runs[-1]}", flush=True)
                shutil.rmtree(project.root)
    accuracies, losses = zip(*runs, strict=True)
    print(f"accuracy {sum(accuracies) / len(runs):.3f}, worst {min(accuracies):.3f}")
    print(f"loss {sum(losses) / len(runs):.3f}, worst {max(losses):.3f}")


def camera_number(path: Path) -> int:
    """The last number in a file's name; 0 where there is none."""
    found = re.findall(r"\d+", path.stem)
    return int(found[-1]) if found else 0


def hold_out(project: Project, numbers: dict[str, int], half: int) -> None:
    """Make one half of every class the validation split, and the other the training split."""
    index = read_json(project.dataset / INDEX)
    for label in {photo["label"] for photo in index["photos"]}:
        rows = [photo for photo in index["photos"] if photo["label"] == label]
        rows.sort(key=lambda photo: (numbers[photo["name"]], photo["name"]))
        middle = (len(rows) + 1) // 2
        for place, photo in enumerate(rows):
            photo["split"] = "val" if (place >= middle) == half else "train"
    write_json(project.dataset / INDEX, index)


def change(project: Project, changes: list[str]) -> None:
    """Set values in `params.yaml`, each given as `section.name=value`."""
    content = yaml.safe_load(project.params.read_text())
    for text in changes:
        name, _, value = text.partition("=")
        nested: Any = yaml.safe_load(value)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        merge(content, nested)
    project.params.write_text(yaml.safe_dump(content, sort_keys=False))


def fit(project: Project) -> tuple[float, float]:
    """Run the features and all phases; return the last one's accuracy and loss."""
    params = load_params(project.params)
    context = Context(project, params)
    features.run(context)
    for phase in params.phases:
        train.run(context, phase)
    history = json.loads(project.history(params.last_phase).read_text())
    return history["val_accuracy"], history["val_loss"]


if __name__ == "__main__":
    typer.run(main)

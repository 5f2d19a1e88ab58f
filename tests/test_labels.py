"""Any classes: labels in params.yaml, taken from folders, and followed by every stage."""

import json
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import synthetic
from tasks.data.directory import render
from tasks.data.images import encode
from tasks.data.importer import import_photos
from tasks.errors import DataError, ParamsError
from tasks.params import load_params
from tasks.project import Project
from tasks.services.dvc import Pipeline
from tasks.stage import Context
from tests.fixtures.checkouts import make_checkout, with_stages
from tests.fixtures.photos import CHECKOUT, LABELS, with_params

TEXT = CHECKOUT.params.read_text()
WORDS = ("bus", "two words", "ökologisch")


def write_classes(folder: Path, names: tuple[str, ...], per_class: int) -> Path:
    """Noisy pictures of one hue for each class."""
    random = np.random.default_rng(0)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        hue = Image.new("HSV", (1, 1), (number * 256 // len(names), 220, 200)).convert("RGB")
        for photo in range(per_class):
            noise = random.normal(np.asarray(hue, float), 25, (64, 64, 3))
            picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
            picture.save(folder / name / f"{photo}.png")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return with_params(tmp_path / "checkout")


@pytest.mark.parametrize(
    "old",
    ['["0", "1"]', '[\n  "0",\n  "1",\n]', '\n- "0"  # none\n- "1"', '\n  - "0"\n  - "1"'],
    ids=["line", "lines", "dashes", "indented"],
)
def test_set_labels_changes_nothing_else_in_params(
    project: Project, tmp_path: Path, old: str
) -> None:
    text = TEXT.replace('["0", "1", "2", "3", "4", "5"]', f"{old}\n# Of audit:")
    project.params.write_text(text)
    source = write_classes(tmp_path / "source", WORDS, 1)
    report = import_photos(project, source, replace=True, set_labels=True)
    assert report.labels == load_params(project.params).labels == WORDS
    assert project.params.read_text() == text.replace(old, '["bus", "two words", "ökologisch"]')


def test_a_limit_for_labels_that_go_is_refused_before_photos_are_replaced(
    project: Project, tmp_path: Path
) -> None:
    least = "{" + ", ".join(f'"{label}": 0.5' for label in LABELS) + "}"
    project.params.write_text(TEXT.replace("min_recall: 0.75", f"min_recall: {least}"))
    before = project.params.read_bytes()
    source = write_classes(tmp_path / "s", WORDS, 1)
    with pytest.raises(ParamsError, match=r"must name each of the labels bus, two words"):
        import_photos(project, source, replace=True, set_labels=True)
    assert project.params.read_bytes() == before
    assert not project.data.exists()


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        ("10/a 9/b 1/c", ("1", "9", "10")),
        ("export/set/b/1 export/set/a/2 export/read.txt", ("a", "b")),
        ("train/b/1 train/a/2 valid/c/3 test/a/4 data.yaml", ("a", "b", "c")),
        ("train/1 bus/2 car/3", ("bus", "car", "train")),
        ("train/train/1 train/bus/2 test/train/3", ("bus", "train")),
        ("dog/near/1 dog/far/2 cat/3", ("cat", "dog")),
        (f"{unicodedata.normalize('NFD', 'ö')}k/1 b/2", ("b", "ök")),
    ],
)
def test_labels_are_the_names_of_class_folders(
    project: Project, tmp_path: Path, paths: str, labels: tuple[str, ...]
) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, name in enumerate(paths.split()):
            archive.writestr(name, encode(np.full((40, 40, 3), number * 40, np.uint8)))
    report = import_photos(project, tmp_path / "photos.zip", replace=True, set_labels=True)
    assert report.labels == labels
    assert {label for _, label in report.imported} == set(labels)


def test_hands_are_only_rendered_for_their_own_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = with_stages(tmp_path / "checkout")
    project.params.write_text(TEXT.replace('labels: ["0",', 'labels: ["zero",'))
    with pytest.raises(DataError, match=r"shows the signs 0 to 5, and labels .* are zero, 1"):
        render(project, Pipeline(project))
    with caplog.at_level("INFO"):
        synthetic.run(Context(project, load_params(project.params)))
    assert "Synthetic hands are off: they show the signs 0 to 5" in caplog.text


def test_an_unknown_folder_is_one_line_and_a_class_without_photos_ends_the_command_with_1(
    tmp_path: Path, photos: Callable[..., Path]
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    folder = photos("mine", 3)
    (folder / "4").rename(folder / "four")
    done = checkout.run("handsigns", "import", folder, "--replace", "--json", code=1)
    assert json.loads(done.stdout)["taken"]["train"] == dict.fromkeys("01235", 3)
    *_, unknown, few = done.stderr.splitlines()
    assert unknown == (
        "unknown label folder: 'four' is none of 0, 1, 2, 3, 4, 5; 3 files quarantined. To take a "
        "source's folders as the labels: --replace --set-labels."
    )
    assert "train/4" in few


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple(f"kind {n}" for n in range(1, 11)), WORDS])
def test_any_classes_take_three_commands(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = write_classes(tmp_path / "source", names, 10)
    made = make_checkout(tmp_path / "checkout")
    assert "--replace --set-labels" in made.handsigns("import", source, "--replace", code=1)
    assert made.run("handsigns", "import", source, "--set-labels", code=2)
    found = made.handsigns("import", source, "--replace", "--set-labels")
    assert found["taken"]["train"] == dict.fromkeys(sorted(names), 10)
    assert made.handsigns("retrain")["status"] == "promoted"
    (read,) = made.handsigns("predict", source / names[1] / "0.png")["predictions"]
    assert read["label"] == names[1]
    assert list(read["probabilities"]) == list(names)
    assert names[-1] in made.run("handsigns", "predict", source / names[1] / "0.png").stdout
    assert made.handsigns("evaluate", source)["accuracy"] > 0.5

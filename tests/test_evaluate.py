"""Scoring a class folder, and the stage from dataset to pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.errors import DataError, ModelError, StageError
from tasks.evaluate import run
from tasks.io import write_json
from tasks.params import Params
from tasks.project import Project
from tasks.scoring.folder import evaluate_folder
from tasks.scoring.metrics import score
from tasks.stage import Context
from tests.fixtures.photos import LABELS, photo
from tests.test_inference import BRIGHTNESS


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    """Three photos a sign whose brightness is the sign."""
    for index, label in enumerate(LABELS):
        (tmp_path / "greys" / label).mkdir(parents=True)
        for number in range(3):
            level = (index * 51, index * 51, min(255, index * 51 + number))
            Image.new("RGB", (40, 30), level).save(tmp_path / "greys" / label / f"{number}.png")
    return tmp_path / "greys"


def test_a_class_folder_is_scored_by_its_folder_names(greys: Path) -> None:
    report = evaluate_folder(BRIGHTNESS, greys)
    assert (report["n"], report["accuracy"], report["auc"]) == (18, 1.0, 1.0)
    (greys / "0" / "2.png").rename(greys / "5" / "moved.png")
    report = evaluate_folder(BRIGHTNESS, greys)
    assert report["accuracy"] == pytest.approx(17 / 18, abs=1e-6)
    (misread,) = report["misread"]
    assert (misread["truth"], misread["label"]) == ("5", "0")
    assert misread["file"].endswith("moved.png")


def test_unreadable_files_are_listed_and_the_rest_is_scored(greys: Path) -> None:
    (greys / "3" / "broken.jpg").write_bytes(b"\xff\xd8\xff rubbish")
    (greys / "3" / ".hidden").write_text("left out")
    progress: list[tuple[str, int, int]] = []
    report = evaluate_folder(BRIGHTNESS, greys, lambda *news: progress.append(news))
    assert (report["n"], report["accuracy"]) == (18, 1.0)
    (unreadable,) = report["unreadable"]
    assert unreadable["file"].endswith("broken.jpg")
    assert unreadable["error"]
    assert progress[-1][1:] == (18, 18)


def test_a_folder_without_some_classes_is_scored_without_auc(greys: Path) -> None:
    for path in [*(greys / "4").iterdir(), greys / "4"]:
        path.unlink() if path.is_file() else path.rmdir()
    report = evaluate_folder(BRIGHTNESS, greys)
    assert (report["n"], report["auc"], report["worst_recall"]) == (15, None, None)
    assert report["auc_note"] == "not defined: no photo of class 4"


def test_folders_that_cannot_be_scored_are_refused_in_one_line(greys: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere' does not exist"):
        evaluate_folder(BRIGHTNESS, tmp_path / "nowhere")
    with pytest.raises(DataError, match="png' is a file"):
        evaluate_folder(BRIGHTNESS, greys / "0" / "0.png")
    with pytest.raises(DataError, match="no folder named 0, 1, 2, 3, 4, 5"):
        evaluate_folder(BRIGHTNESS, greys / "0")


def test_files_outside_of_class_folders_are_listed_and_not_scored(greys: Path) -> None:
    (greys / "six").mkdir()
    (greys / "1" / "0.png").rename(greys / "six" / "0.png")
    (greys / "1" / "1.png").rename(greys / "1.png")
    report = evaluate_folder(BRIGHTNESS, greys)
    assert report["n"] == 16
    unreadable = report["unreadable"]
    assert [(Path(one["file"]).name, one["error"][:13]) for one in unreadable] == [
        ("1.png", "no label: it "),
        ("0.png", "unknown label"),
    ]


def test_train_and_test_are_not_scored_as_one(greys: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    greys.rename(both / "test")
    assert evaluate_folder(BRIGHTNESS, both)["n"] == 18
    (both / "train" / "0").mkdir(parents=True)
    (both / "test" / "0" / "0.png").rename(both / "train" / "0" / "0.png")
    with pytest.raises(DataError, match="one set of photos"):
        evaluate_folder(BRIGHTNESS, both)


def test_a_folder_of_rubbish_only_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "rubbish" / "2").mkdir(parents=True)
    (tmp_path / "rubbish" / "2" / "a.png").touch()
    with pytest.raises(DataError, match=r"1 files .* usable photo.*a\.png.*zero bytes"):
        evaluate_folder(BRIGHTNESS, tmp_path / "rubbish")


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """A dataset of 18 test, 5 val and 6 train photos, and the phases' histories."""
    project = Project(tmp_path)
    project.dataset.mkdir(parents=True)
    rows = [("test", index % 6, index) for index in range(18)] + [
        ("train", index, 100 + index) for index in range(6)
    ]
    rows += [("val", index, 200 + index) for index in range(5)]
    images = np.stack([photo(label, seed) for _, label, seed in rows])
    np.save(project.dataset / "images.npy", images)
    named = [
        {"name": f"{seed}.png", "label": LABELS[label], "split": split}
        for split, label, seed in rows
    ]
    write_json(
        project.dataset / "index.json", {"image_size": 64, "labels": LABELS, "photos": named}
    )
    numbers = {"loss": 0.4, "val_loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.8}
    for name in params.phases:
        epochs = [{"epoch": 1, **numbers}, {"epoch": 2, **numbers}]
        content = {"phase": name, "images": 6, "epochs": epochs}
        write_json(project.weights(name) / "history.json", content)
    return Context(project, params)


def test_missing_inputs_are_named(context: Context) -> None:
    project = context.project
    with pytest.raises(ModelError, match=r"model\.pb"):
        run(context)
    (project.weights("full") / "history.json").write_text("{")
    with pytest.raises(StageError, match="history of phase 'full' cannot be read"):
        run(context)
    index = (project.dataset / "index.json").read_text()
    (project.dataset / "index.json").write_text(index.replace('"test"', '"train"'))
    with pytest.raises(DataError, match="test split holds no photos"):
        run(context)
    (project.dataset / "index.json").unlink()
    with pytest.raises(DataError, match="preprocess"):
        run(context)
    assert not project.metrics.exists()


def test_the_stage_scores_the_test_split_and_repeats_itself_to_the_byte(context: Context) -> None:
    from tasks.model.files import export_graph
    from tasks.model.network import build_model

    project = context.project
    project.graph.write_bytes(export_graph(build_model(6, seed=1)))
    run(context)
    outputs = [project.metrics, project.predictions]
    outputs += [project.reference, *sorted(project.plots.glob("*.png"))]
    names = ["reference", "confusion", "curves", "mistakes", "reliability", "roc_pr"]
    assert [path.stem for path in outputs[2:]] == names
    first = [path.read_bytes() for path in outputs]
    predictions, metrics = json.loads(first[1]), json.loads(first[0])
    assert [entry["name"] for entry in predictions["photos"]] == [f"{n}.png" for n in range(18)]
    again = score(
        np.array([entry["probabilities"] for entry in predictions["photos"]]),
        np.array([predictions["labels"].index(entry["label"]) for entry in predictions["photos"]]),
        LABELS,
    )
    assert {"robustness", "standard_errors", "certainty"} < set(metrics)
    assert 0 < metrics["certainty"]["certain_above"] < 1
    assert metrics["robustness"]["photos"] == 18
    assert {**metrics, **json.loads(json.dumps(again.to_json()))} == metrics
    assert metrics["n"] == 18
    with np.load(project.reference) as reference:
        assert reference["labels"].sum() == reference["confidences"].sum() == 5
        assert reference["embeddings"].shape == (5, 1280)
    run(context)
    assert [path.read_bytes() for path in outputs] == first

"""Scoring a class folder, and the stage from dataset to pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.errors import DataError, ModelError, StageError
from tasks.evaluate import run
from tasks.io import read_json, write_json
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
    (greys / "3" / "broken.jpg").write_bytes(b"\xff\xd8\xff rubbish")
    (greys / "3" / ".hidden").write_text("left out")
    (greys / "six").mkdir()
    (greys / "1" / "0.png").rename(greys / "six" / "0.png")
    (greys / "1" / "1.png").rename(greys / "1.png")
    progress: list[tuple[str, int, int]] = []
    report = evaluate_folder(BRIGHTNESS, greys, lambda *news: progress.append(news))
    assert report["n"] == 16
    assert report["accuracy"] == pytest.approx(15 / 16, abs=1e-6)
    (misread,) = report["misread"]
    assert (misread["truth"], misread["label"]) == ("5", "0")
    assert misread["file"].endswith("moved.png")
    unreadable = {Path(one["file"]).name: one["error"] for one in report["unreadable"]}
    assert unreadable.keys() == {"broken.jpg", "0.png", "1.png"}
    assert unreadable["0.png"].startswith("unknown label folder: 'six'")
    assert unreadable["1.png"].startswith("no label")
    assert progress[-1][1:] == (16, 16)
    for path in (greys / "4").iterdir():
        path.unlink()
    report = evaluate_folder(BRIGHTNESS, greys)
    assert (report["n"], report["auc"], report["worst_recall"]) == (13, None, None)
    assert report["auc_note"] == "not defined: no photo of class 4"


def test_folders_that_cannot_be_scored_are_refused_in_one_line(greys: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere' does not exist"):
        evaluate_folder(BRIGHTNESS, tmp_path / "nowhere")
    with pytest.raises(DataError, match="png' is a file"):
        evaluate_folder(BRIGHTNESS, greys / "0" / "0.png")
    with pytest.raises(DataError, match="no folder named 0, 1, 2, 3, 4, 5"):
        evaluate_folder(BRIGHTNESS, greys / "0")
    (tmp_path / "rubbish" / "2").mkdir(parents=True)
    (tmp_path / "rubbish" / "2" / "a.png").touch()
    with pytest.raises(DataError, match=r"1 files .* usable photo.*a\.png.*zero bytes"):
        evaluate_folder(BRIGHTNESS, tmp_path / "rubbish")
    both = tmp_path / "both"
    both.mkdir()
    greys.rename(both / "test")
    assert evaluate_folder(BRIGHTNESS, both)["n"] == 18
    (both / "train" / "0").mkdir(parents=True)
    (both / "test" / "0" / "0.png").rename(both / "train" / "0" / "0.png")
    with pytest.raises(DataError, match="one set of photos"):
        evaluate_folder(BRIGHTNESS, both)


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """A dataset of 18 test, 5 val and 6 train photos, and the phases' histories."""
    project = Project(tmp_path)
    project.dataset.mkdir(parents=True)
    rows = [("test", index % 6, index) for index in range(18)]
    rows += [("train", index, 100 + index) for index in range(6)]
    rows += [("val", index, 200 + index) for index in range(5)]
    images = np.stack([photo(label, seed) for _, label, seed in rows])
    np.save(project.dataset / "images.npy", images)
    named = [
        {"name": f"{seed}.png", "label": LABELS[label], "split": split}
        for split, label, seed in rows
    ]
    write_json(project.dataset_index, {"image_size": 64, "labels": LABELS, "photos": named})
    numbers = {"loss": 0.4, "val_loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.8}
    for name in params.phases:
        epochs = [{"epoch": 1, **numbers}, {"epoch": 2, **numbers}]
        write_json(project.history(name), {"phase": name, "images": 6, "epochs": epochs})
    return Context(project, params)


def test_missing_inputs_are_named(context: Context) -> None:
    project, index = context.project, context.project.dataset_index
    for error, reason, damage in (
        (ModelError, r"model\.pb", lambda: None),
        (StageError, "history of a phase", lambda: project.history("full").write_text("{")),
        (
            DataError,
            "test split holds no photos",
            lambda: index.write_text(index.read_text().replace('"test"', '"train"')),
        ),
        (DataError, "preprocess", index.unlink),
    ):
        damage()
        with pytest.raises(error, match=reason):
            run(context)
    assert not project.metrics.exists()


def test_the_stage_scores_the_test_split(context: Context) -> None:
    from tasks.model.files import export_graph
    from tasks.model.network import build_model

    project = context.project
    project.graph.write_bytes(export_graph(build_model(6, seed=1)))
    run(context)
    pictures = [path.stem for path in sorted(project.plots.glob("*.png"))]
    assert pictures == ["confusion", "curves", "mistakes", "reliability", "roc_pr"]
    predictions, metrics = read_json(project.predictions), read_json(project.metrics)
    assert [entry["name"] for entry in predictions["photos"]] == [f"{n}.png" for n in range(18)]
    again = score(
        np.array([entry["probabilities"] for entry in predictions["photos"]]),
        np.array([predictions["labels"].index(entry["label"]) for entry in predictions["photos"]]),
        LABELS,
    )
    write_json(project.gate, again.to_json())
    assert {**metrics, **read_json(project.gate)} == metrics
    assert {"robustness", "standard_errors", "certainty"} < set(metrics)
    assert 0 < metrics["certainty"]["certain_above"] < 1
    assert (metrics["n"], metrics["robustness"]["photos"]) == (18, 18)
    with np.load(project.reference) as reference:
        assert reference["labels"].sum() == reference["confidences"].sum() == 5
        assert reference["embeddings"].shape == (5, 1280)

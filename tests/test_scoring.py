"""Scores against plain re-computations, class folders, plots, the stage, and drift."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, roc_auc_score

from tasks.errors import DataError
from tasks.evaluate import (
    CORRUPTIONS,
    HANDLESS,
    MAX_PHOTOS,
    balanced_rows,
    certain_above,
    draw_handless,
    robustness,
    run,
)
from tasks.gate import CORRUPTIONS as GATE_CORRUPTIONS
from tasks.io import read_json, write_json
from tasks.model.files import export_graph
from tasks.model.inference import Classifier
from tasks.model.network import build_model
from tasks.scoring.drift import compare_counts, compare_embeddings
from tasks.scoring.folder import evaluate_folder
from tasks.scoring.metrics import CALIBRATION_BINS, score
from tasks.stage import Context
from tests.fixtures.models import BRIGHTNESS, RESIZE, copied
from tests.fixtures.photos import LABELS, photo

SIX = np.eye(6)


def case(seed: int, n: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right more often the sharper they are, and labels in turn."""
    y = np.arange(n) % 6
    logits = np.random.default_rng(seed).normal(0, 1, (n, 6)) + sharpness * SIX[y]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), y


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.1, 1.0, 30.0]))
def test_every_number_equals_its_plain_definition(seed: int, n: int, sharpness: float) -> None:
    p, y = case(seed, n, sharpness)
    scores = score(p, y, LABELS)
    guesses, confidence = p.argmax(axis=1), p.max(axis=1)
    right, clipped = guesses == y, np.clip(p[np.arange(n), y], 1e-7, 1 - 1e-7)
    assert (scores.n, scores.accuracy) == (n, right.mean())
    assert scores.loss == pytest.approx(-np.log(clipped).mean(), rel=1e-12)
    assert scores.log_loss == pytest.approx(scores.loss, abs=1e-6)
    bounds = binomtest(int(right.sum()), n).proportion_ci(method="wilson")
    assert scores.accuracy_interval == pytest.approx((bounds.low, bounds.high))
    matrix = confusion_matrix(y, guesses, labels=range(6))
    assert np.array_equal(scores.confusion_matrix, matrix)
    for found, row, column, hits in zip(
        scores.per_class, matrix, matrix.T, matrix.diagonal(), strict=True
    ):
        assert found.support == row.sum()
        assert found.recall == (hits / row.sum() if row.any() else None)
        assert found.precision == (hits / column.sum() if column.any() else None)
        if found.f1 is not None:
            assert found.f1 == pytest.approx(2 * hits / (row.sum() + column.sum()))
    bins = np.ceil(confidence * CALIBRATION_BINS)
    error = sum(
        (bins == one).mean() * abs(confidence[bins == one].mean() - right[bins == one].mean())
        for one in np.unique(bins)
    )
    assert scores.ece == pytest.approx(error, abs=1e-12)
    if n >= 6:
        areas = [roc_auc_score(y == index, p[:, index]) for index in range(6)]
        assert scores.auc == pytest.approx(np.mean(areas), abs=1e-9)
        assert scores.worst_recall == min(one.recall or 0 for one in scores.per_class)
    assert scores.to_json()["loss"] == round(scores.loss, 6)


def test_a_missing_class_has_no_auc_and_what_is_no_probability_is_refused() -> None:
    scores = score(SIX[:5], np.arange(5), LABELS)
    assert (scores.auc, scores.worst_recall) == (None, None)
    assert scores.auc_note == "not defined: no photo of class 5"
    assert list(scores.per_class[5].model_dump().values()) == ["5", None, None, None, 0]
    for probabilities, reason in (
        (SIX[:0], "no photos to score"),
        (SIX * np.nan, "row 0 is .nan"),
        (SIX * 3 - 1 / 3, "between 0 and 1"),
        (SIX * 0.9, "sum to one, but row 0"),
    ):
        with pytest.raises(DataError, match=reason):
            score(probabilities, np.arange(len(probabilities)), LABELS)


def test_a_class_folder_is_scored_by_its_folder_names(tmp_path: Path) -> None:
    greys = tmp_path / "greys"
    for index, number in product(range(6), range(3)):
        file = greys / LABELS[index] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        level = (index * 51, index * 51, min(255, index * 51 + number))
        Image.new("RGB", (40, 30), level).save(file)
    (greys / "six").mkdir()
    (greys / "0/2.png").rename(greys / "5/moved.png")
    (greys / "1/0.png").rename(greys / "six/0.png")
    (greys / "3/broken.jpg").write_bytes(b"\xff\xd8\xff rubbish")
    report = evaluate_folder(BRIGHTNESS, greys)
    assert (report["n"], report["accuracy"]) == (17, pytest.approx(16 / 17, abs=1e-6))
    (misread,) = report["misread"]
    assert (misread["truth"], misread["label"]) == ("5", "0")
    assert misread["file"].endswith("moved.png")
    unreadable = {Path(one["file"]).name: one["error"] for one in report["unreadable"]}
    assert unreadable.keys() == {"broken.jpg", "0.png"}
    assert unreadable["0.png"].startswith("unknown label folder: 'six'")
    (greys / "test").mkdir()
    (greys / "2").rename(greys / "test/2")
    (tmp_path / "bad/2").mkdir(parents=True)
    (tmp_path / "bad/2/a.png").touch()
    for folder, reason in (
        ("nowhere", "nowhere' does not exist"),
        ("bad/2/a.png", "png' is a file"),
        ("bad", r"1 files .* usable photo.*a\.png.*zero bytes"),
        ("greys", "one set of photos"),
    ):
        with pytest.raises(DataError, match=reason):
            evaluate_folder(BRIGHTNESS, tmp_path / folder)


def test_a_reader_of_brightness_fails_under_other_light_only() -> None:
    labels = np.repeat(np.arange(6), 10)
    images = np.empty((60, 32, 32, 3), np.uint8)
    images[:] = (labels * 51)[:, None, None, None]
    accuracy = robustness(BRIGHTNESS, images, labels)["accuracy"]
    assert tuple(accuracy) == tuple(CORRUPTIONS) == GATE_CORRUPTIONS
    assert accuracy.pop("brightness") < 0.7
    assert set(accuracy.values()) == {1.0}
    image = photo(3, seed=1)
    for corrupt in CORRUPTIONS.values():
        assert 1 < np.abs(corrupt(image, 1).astype(float) - image).mean() < 50
    many = np.repeat(np.arange(6), [500, 3, 200, 100, 400, 90])
    counts = np.bincount(many[balanced_rows(many, MAX_PHOTOS)], minlength=6)
    assert (counts.sum(), counts[1], np.ptp(np.delete(counts, 1))) == (MAX_PHOTOS, 3, 1)


def test_an_answer_is_certain_above_what_pictures_without_a_hand_reach() -> None:
    def half_sure(pictures: Iterable[np.ndarray]) -> np.ndarray:
        best = 0.5 + np.array([picture.mean() for picture in pictures]) / 2550
        rest = np.repeat((1 - best)[:, None] / 5, 5, axis=1)
        return np.column_stack([best, rest]).astype(np.float32)

    classifier = Classifier(half_sure, RESIZE, LABELS, 32)
    clear = certain_above(classifier, np.full(50, 0.99, np.float32))
    confidences = half_sure(draw_handless(HANDLESS, RESIZE)).max(axis=1)
    assert (confidences < clear).mean() == pytest.approx(0.95, abs=0.01)
    assert certain_above(classifier, np.full(50, 0.52, np.float32)) == pytest.approx(0.52, abs=2e-6)


def test_the_stage_scores_the_test_split(chain: Context, tmp_path: Path) -> None:
    context = copied(chain, tmp_path)
    project, index = context.project, read_json(context.project.dataset_index)
    for row in index["photos"][:18]:
        row["split"] = "test"
    write_json(project.dataset_index, index)
    project.graph.write_bytes(export_graph(build_model(6, seed=1)))
    run(context)
    pictures = {path.stem: path.read_bytes() for path in sorted(project.plots.glob("*.png"))}
    assert list(pictures) == ["confusion", "curves", "mistakes", "reliability", "roc_pr"]
    run(context)
    assert pictures == {path.stem: path.read_bytes() for path in project.plots.glob("*.png")}
    predictions, metrics = read_json(project.predictions), read_json(project.metrics)
    names = [entry["name"] for entry in predictions["photos"]]
    assert names == [row["name"] for row in index["photos"][:18]]
    probabilities = np.array([entry["probabilities"] for entry in predictions["photos"]])
    truths = [predictions["labels"].index(entry["label"]) for entry in predictions["photos"]]
    assert {**metrics, **score(probabilities, truths, LABELS).to_json()} == metrics
    assert 0 < metrics["certainty"]["certain_above"] < 1
    assert (metrics["n"], metrics["robustness"]["photos"]) == (18, 18)
    with np.load(project.reference) as reference:
        assert reference["labels"].sum() == reference["confidences"].sum() == 12
        assert reference["embeddings"].shape == (12, 1280)


def test_chance_is_no_drift_and_few_samples_say_nothing() -> None:
    usual, random = np.array([0.2, 0.2, 0.2, 0.15, 0.15, 0.1]), np.random.default_rng(3)
    reference = random.multinomial(500, usual)
    for size in (60, 300, 5000):
        windows = [random.multinomial(size, usual) for _ in range(10)]
        assert {compare_counts("labels", reference, one).verdict for one in windows} == {"no drift"}
    for _ in range(3):
        samples = random.normal(size=(230, 64))
        assert compare_embeddings(samples[:150], samples[150:]).verdict == "no drift"
    for n, m in ((49, 500), (500, 49)):
        assert compare_counts("labels", [n, 0], [m, 0]).verdict == "too few samples"

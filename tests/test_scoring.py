"""Scores against plain re-computations, corrupted photos, certainty, and plots."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tasks.errors import DataError
from tasks.evaluate import (
    CORRUPTIONS,
    DOUBTED_PHOTOS,
    HANDLESS,
    MAX_PHOTOS,
    balanced_rows,
    certainty,
    draw_handless,
    robustness,
)
from tasks.gate import CORRUPTIONS as GATE_CORRUPTIONS
from tasks.model.inference import Classifier
from tasks.scoring import plots
from tasks.scoring.metrics import CALIBRATION_BINS, calibration_error
from tasks.scoring.metrics import score as score_
from tests.fixtures.photos import LABELS, photo
from tests.test_inference import BRIGHTNESS, RESIZE

score = partial(score_, names=LABELS)

CLASSES = len(LABELS)
SIX = np.eye(CLASSES)


def random_case(seed: int, n: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, sharpness, (n, CLASSES))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p, random.integers(0, CLASSES, n)


cases = st.builds(
    random_case,
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_number_equals_its_plain_definition(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = case
    scores = score(p, y)
    guesses = [max(range(CLASSES), key=lambda c, row=row: row[c]) for row in p]
    right = sum(guess == truth for guess, truth in zip(guesses, y, strict=True))
    losses = [
        -math.log(min(max(row[truth], 1e-7), 1 - 1e-7)) for row, truth in zip(p, y, strict=True)
    ]
    assert (scores.n, scores.accuracy) == (len(y), right / len(y))
    assert scores.loss == pytest.approx(sum(losses) / len(y), rel=1e-12)
    if p[np.arange(len(y)), y].min() > 1e-7:
        assert scores.loss == pytest.approx(scores.log_loss, abs=1e-6)
    for index, found in enumerate(scores.per_class):
        hits = sum(g == t == index for g, t in zip(guesses, y, strict=True))
        assert found.support == sum(y == index)
        assert found.recall == (hits / found.support if found.support else None)
        assert found.precision == (hits / guesses.count(index) if index in guesses else None)
        if found.recall and found.precision:
            assert found.f1 == pytest.approx(2 / (1 / found.recall + 1 / found.precision))
        assert scores.confusion_matrix[index][index] == hits
    assert sum(map(sum, scores.confusion_matrix)) == len(y)

    z, n, share = 1.959963984540054, scores.n, scores.accuracy
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    bounds = max(0, middle - half), min(1, middle + half)
    assert scores.accuracy_interval == pytest.approx(bounds, abs=1e-12)

    total = 0.0
    for number in range(CALIBRATION_BINS):
        low, high = number / CALIBRATION_BINS, (number + 1) / CALIBRATION_BINS
        rows = [i for i in range(len(y)) if low < max(p[i]) <= high]
        if rows:
            confidence = sum(max(p[i]) for i in rows) / len(rows)
            accuracy = sum(int(p[i].argmax() == y[i]) for i in rows) / len(rows)
            total += len(rows) / len(y) * abs(confidence - accuracy)
    assert scores.ece == pytest.approx(total, abs=1e-12)
    assert calibration_error(p, y) == pytest.approx(total, abs=1e-12)

    content = scores.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["loss"] == round(content["loss"], 6)
    assert [item["label"] for item in content["per_class"]] == list(LABELS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40))
def test_auc_is_the_chance_that_a_photo_of_the_class_ranks_first(seed: int, extra: int) -> None:
    p, y = random_case(seed, CLASSES + extra)
    y[:CLASSES] = range(CLASSES)
    areas = []
    for index in range(CLASSES):
        own, other = p[y == index, index], p[y != index, index]
        wins = [(a > b) + 0.5 * (a == b) for a in own for b in other]
        areas.append(sum(wins) / len(wins))
    assert score(p, y).auc == pytest.approx(sum(areas) / CLASSES, abs=1e-9)


def test_a_missing_class_leaves_auc_and_its_recall_null_and_says_so() -> None:
    scores = score(SIX[:5], np.arange(5))
    assert (scores.auc, scores.worst_recall) == (None, None)
    assert scores.auc_note == "not defined: no photo of class 5"
    assert list(scores.per_class[5].model_dump().values()) == ["5", None, None, None, 0]


@pytest.mark.parametrize(
    ("probabilities", "labels", "reason"),
    [
        (SIX, np.arange(5), r"\(6, 6\), are not those of 5 labels"),
        (SIX[:, :5], np.arange(6), r"\(6, 5\), are not those of 6"),
        (SIX, np.arange(6) + 1, "are not those"),
        (SIX[:0], np.arange(0), "no photos to score"),
        (SIX * np.nan, np.arange(6), "row 0 is .nan"),
        (np.full((6, 6), np.inf), np.arange(6), "row 0 is .inf"),
        (SIX * 3 - 1 / 3, np.arange(6), "between 0 and 1"),
        (SIX * 0.9, np.arange(6), "sum to one, but row 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_value(
    probabilities: np.ndarray, labels: np.ndarray, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        score(probabilities, labels)


def test_a_reader_of_brightness_fails_under_other_light_only() -> None:
    labels = np.repeat(np.arange(6), 10)
    images = np.empty((60, 32, 32, 3), np.uint8)
    images[:] = (labels * 51)[:, None, None, None]
    kept, progress = images.copy(), list[tuple[str, int, int]]()
    found = robustness(BRIGHTNESS, images, labels, lambda *news: progress.append(news))
    assert tuple(CORRUPTIONS) == GATE_CORRUPTIONS
    accuracy = dict(found["accuracy"])
    assert found["photos"] == 60
    assert accuracy.pop("brightness") < 0.7
    assert set(accuracy.values()) == {1.0}
    assert found["interval"]["jpeg"] == [0.939828, 1.0]  # 60 / (60 + 1.959964 ** 2)
    assert progress[-1] == ("score corrupted photos", 5, 5)
    assert found == robustness(BRIGHTNESS, images, labels)
    assert (images == kept).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_changes_a_photo_a_little(kind: str) -> None:
    image = photo(3, seed=1)
    one, other = CORRUPTIONS[kind](image, 1), CORRUPTIONS[kind](image, -1)
    for corrupted in (one, other):
        assert (corrupted.shape, corrupted.dtype) == (image.shape, np.uint8)
        assert 1 < np.abs(corrupted.astype(float) - image).mean() < 50
    assert (one != other).any() == (kind in ("rotation", "brightness", "scale"))
    plain = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    if kind == "jpeg":
        assert np.abs(CORRUPTIONS[kind](plain, 1).astype(int) - plain).max() < 8


def test_corrupted_photos_are_balanced_over_the_classes() -> None:
    labels = np.repeat(np.arange(6), [500, 3, 200, 100, 400, 90])
    rows = balanced_rows(labels, MAX_PHOTOS)
    counts = np.bincount(labels[rows], minlength=6)
    assert len(rows) == MAX_PHOTOS
    assert counts[1] == 3
    assert counts[[0, 2, 3, 4, 5]].max() - counts[[0, 2, 3, 4, 5]].min() <= 1
    assert (np.diff(rows) > 0).all()
    assert balanced_rows(labels[:7], 10).tolist() == list(range(7))


def test_an_answer_is_certain_above_what_pictures_without_a_hand_reach() -> None:
    handless = draw_handless(HANDLESS, RESIZE)
    assert np.array_equal(handless, draw_handless(HANDLESS, RESIZE))
    assert 0 < np.mean([not np.ptp(picture, axis=(0, 1)).any() for picture in handless]) < 0.5

    def half_sure(pictures: np.ndarray) -> np.ndarray:
        best = 0.5 + pictures.mean((1, 2, 3)) / 2550
        rest = np.repeat((1 - best)[:, None] / 5, 5, axis=1)
        return np.column_stack([best, rest]).astype(np.float32)

    classifier = Classifier(half_sure, RESIZE, LABELS, 32)
    clear = certainty(classifier, np.full(50, 0.99, np.float32))
    assert 0.5 < clear["certain_above"] < 0.6
    assert clear["doubted_photos"] == 0
    assert clear["doubted_handless"] == pytest.approx(0.95, abs=0.01)
    blurred = certainty(classifier, np.full(50, 0.52, np.float32))
    assert blurred["certain_above"] == pytest.approx(0.52, abs=2e-6)
    assert blurred["doubted_photos"] <= DOUBTED_PHOTOS
    assert certainty(classifier, np.empty(0, np.float32))["doubted_photos"] == 0


def case(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = np.arange(n) % 6
    logits = random.normal(0, 1, (n, 6)) + sharpness * np.eye(6)[y]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.stack([photo(int(label), row) for row, label in enumerate(y)]), p, y


def history(phase: str, epochs: int) -> dict[str, object]:
    numbers = {"loss": 0.4, "val_loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.8}
    rows = [{"epoch": number + 1, **numbers} for number in range(epochs)]
    return {"phase": phase, "images": 1080, "epochs": rows}


def draw(n: int, sharpness: float) -> dict[str, Figure]:
    images, p, y = case(n, sharpness)
    return {
        "curves": plots.curves([history("base", 3), history("full", 2)]),
        "confusion": plots.confusion(score(p, y)),
        "roc_pr": plots.roc_pr(p, y, LABELS),
        "reliability": plots.reliability_diagram(p, y),
        "mistakes": plots.mistakes(images, p, y, LABELS),
    }


@pytest.mark.parametrize("n", [1, 18])
def test_plots_of_the_same_numbers_have_the_same_bytes(n: int, tmp_path: Path) -> None:
    for name, figure in draw(n, 1.0).items():
        plots.save(figure, tmp_path / f"{name}.png")
    for name, figure in draw(n, 1.0).items():
        plots.save(figure, tmp_path / "again.png")
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_plots_say_what_they_show() -> None:
    figures = draw(60, 0.5)
    loss, accuracy = figures["curves"].axes
    assert [text.get_text() for text in loss.texts] == ["base\n1,080 photos", "full\n1,080 photos"]
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert list(accuracy.lines[1].get_ydata()) == [0.8] * 5
    for title, n, sharpness in (
        ("{} of 60 test photos misclassified; the 24 most confident", 60, 0.5),
        ("None of 30 test photos misclassified; the 12 least confident", 30, 20.0),
    ):
        _, p, y = case(n, sharpness)
        wrong = np.flatnonzero(p.argmax(axis=1) != y)
        first = wrong[p[wrong].max(axis=1).argmax()] if len(wrong) else p.max(axis=1).argmin()
        verdict = f"{y[first]} as {p[first].argmax()}" if len(wrong) else f"{y[first]}, correct"
        mistakes = draw(n, sharpness)["mistakes"]
        assert mistakes.get_suptitle() == title.format(len(wrong))
        assert mistakes.axes[0].get_title() == f"{verdict} ({p[first].max():.0%})"
    legend = draw(5, 0.0)["roc_pr"].axes[0].get_legend()
    assert legend is not None
    assert "5 (not defined)" in [text.get_text() for text in legend.get_texts()]

"""Scores against naive re-computations, corrupted photos, and plots."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from tasks.errors import DataError
from tasks.gate import CORRUPTIONS as GATE_CORRUPTIONS
from tasks.scoring import plots
from tasks.scoring.metrics import CALIBRATION_BINS, CLASSES, calibration_error, score
from tasks.scoring.robustness import CORRUPTIONS, MAX_PHOTOS, balanced_rows, robustness
from tests.fixtures.photos import photo
from tests.test_inference import BRIGHTNESS

FEW = settings(max_examples=30, deadline=None)  # a busy machine is no fault
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


@FEW
@given(cases)
def test_every_number_equals_its_naive_definition(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = case
    scores = score(p, y)
    guesses = [max(range(CLASSES), key=lambda c, row=row: row[c]) for row in p]
    right = sum(guess == truth for guess, truth in zip(guesses, y, strict=True))
    losses = [
        -math.log(min(max(row[truth], 1e-7), 1 - 1e-7)) for row, truth in zip(p, y, strict=True)
    ]
    assert scores.n == len(y)
    assert scores.accuracy == right / len(y)
    assert scores.loss == pytest.approx(sum(losses) / len(y), rel=1e-12)
    for index, found in enumerate(scores.per_class):
        hits = sum(g == t == index for g, t in zip(guesses, y, strict=True))
        assert found.support == sum(y == index)
        if found.support:
            assert found.recall == hits / found.support
        if guesses.count(index):
            assert found.precision == hits / guesses.count(index)
        if found.recall and found.precision:
            harmonic = 2 / (1 / found.recall + 1 / found.precision)
            assert found.f1 == pytest.approx(harmonic)
        assert scores.confusion_matrix[index][index] == hits
    assert sum(map(sum, scores.confusion_matrix)) == len(y)


@FEW
@given(cases)
def test_wilson_interval_follows_its_formula(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = case
    scores = score(p, y)
    z, n, share = 1.959963984540054, scores.n, scores.accuracy
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert scores.accuracy_interval[0] == pytest.approx(max(0, middle - half), abs=1e-12)
    assert scores.accuracy_interval[1] == pytest.approx(min(1, middle + half), abs=1e-12)


@FEW
@given(cases)
def test_calibration_error_equals_a_walk_over_the_bins(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    p, y = case
    total = 0.0
    for number in range(CALIBRATION_BINS):
        low, high = number / CALIBRATION_BINS, (number + 1) / CALIBRATION_BINS
        rows = [i for i in range(len(y)) if low < max(p[i]) <= high]
        if rows:
            confidence = sum(max(p[i]) for i in rows) / len(rows)
            accuracy = sum(int(p[i].argmax() == y[i]) for i in rows) / len(rows)
            total += len(rows) / len(y) * abs(confidence - accuracy)
    assert calibration_error(p, y) == pytest.approx(total, abs=1e-12)


@FEW
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


@FEW
@given(cases)
def test_loss_and_log_loss_agree_unless_the_clip_bites(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    p, y = case
    scores = score(p, y)
    if p[np.arange(len(y)), y].min() > 1e-7:
        assert scores.loss == pytest.approx(scores.log_loss, abs=1e-6)
    else:
        assert scores.loss <= scores.log_loss + 1e-6


@FEW
@given(cases)
def test_json_is_plain_rounded_and_free_of_nan(case: tuple[np.ndarray, np.ndarray]) -> None:
    content = score(*case).to_json()
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again == content
    assert content["loss"] == round(content["loss"], 6)
    assert [item["label"] for item in content["per_class"]] == list("012345")


def test_a_missing_class_leaves_auc_and_its_recall_null_and_says_so() -> None:
    scores = score(SIX[:5], np.arange(5))
    assert scores.auc is None
    assert scores.auc_note == "not defined: no photo of class 5"
    assert scores.worst_recall is None
    assert scores.per_class[5].model_dump() == {
        "label": "5",
        "precision": None,
        "recall": None,
        "f1": None,
        "support": 0,
    }
    assert scores.to_json()["auc"] is None


@pytest.mark.parametrize(
    ("probabilities", "labels", "reason"),
    [
        (SIX, np.arange(6)[:, None], r"Labels must be integers of shape \(6,\).*\(6, 1\)"),
        (SIX, SIX, r"Labels must be integers.*float64 \(6, 6\)"),
        (SIX, np.arange(6.0), "Labels must be integers.*float64"),
        (SIX, np.arange(5), r"shape \(6,\).*\(5,\)"),
        (SIX, np.ones(6, bool), "Labels must be integers.*bool"),
        (SIX[:, :5], np.arange(6), r"shape \(n, 6\).*\(6, 5\)"),
        (SIX[0], np.arange(6), r"shape \(n, 6\).*\(6,\)"),
        (SIX[None], np.arange(6), r"shape \(n, 6\).*\(1, 6, 6\)"),
        (SIX.astype(int), np.arange(6), "must be floats.*int"),
        (SIX[:0], np.arange(0), "no photos to score"),
        (SIX * np.nan, np.arange(6), "row 0 is .nan"),
        (np.full((6, 6), np.inf), np.arange(6), "row 0 is .inf"),
        (SIX * 3 - 1 / 3, np.arange(6), "between 0 and 1"),
        (SIX * 0.9, np.arange(6), "sum to one, but row 0"),
        (SIX, np.arange(6) + 1, "0 to 5, not 1 to 6"),
        (SIX, np.arange(6) - 1, "0 to 5, not -1 to 4"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_value(
    probabilities: np.ndarray, labels: np.ndarray, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        score(probabilities, labels)


def greys(per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Photos whose brightness is the sign, which `BRIGHTNESS` reads."""
    labels = np.repeat(np.arange(6), per_class)
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    images[:] = (labels * 51)[:, None, None, None]
    return images, labels


def test_the_gate_expects_the_corruptions_that_are_scored() -> None:
    assert tuple(CORRUPTIONS) == GATE_CORRUPTIONS


def test_a_reader_of_brightness_fails_under_other_light_only() -> None:
    images, labels = greys(per_class=10)
    kept = images.copy()
    told: list[tuple[str, int, int]] = []
    found = robustness(BRIGHTNESS, images, labels, lambda *news: told.append(news))
    accuracy = dict(found["accuracy"])
    assert found["photos"] == 60
    assert accuracy.pop("brightness") < 0.7
    assert set(accuracy.values()) == {1.0}
    assert found["interval"]["jpeg"] == [0.939828, 1.0]  # 60 / (60 + 1.959964 ** 2)
    assert told[-1] == ("score corrupted photos", 5, 5)
    assert found == robustness(BRIGHTNESS, images, labels)
    assert (images == kept).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_changes_a_photo_a_little(kind: str) -> None:
    image = photo(3, seed=1)
    one, other = CORRUPTIONS[kind](image, 1), CORRUPTIONS[kind](image, -1)
    for corrupted in (one, other):
        assert (corrupted.shape, corrupted.dtype) == (image.shape, np.uint8)
        change = np.abs(corrupted.astype(float) - image).mean()
        assert 1 < change < 50
    if kind in ("rotation", "brightness", "scale"):
        assert (one != other).any()


def test_a_colour_stays_that_colour_under_jpeg() -> None:
    image = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    assert np.abs(CORRUPTIONS["jpeg"](image, 1).astype(int) - image).max() < 8


def test_corrupted_photos_are_balanced_over_the_classes() -> None:
    labels = np.repeat(np.arange(6), [500, 3, 200, 100, 400, 90])
    rows = balanced_rows(labels, MAX_PHOTOS)
    counts = np.bincount(labels[rows], minlength=6)
    assert len(rows) == MAX_PHOTOS
    assert counts[1] == 3
    assert counts[[0, 2, 3, 4, 5]].max() - counts[[0, 2, 3, 4, 5]].min() <= 1
    assert (np.diff(rows) > 0).all()
    assert balanced_rows(labels[:7], 10).tolist() == list(range(7))


def case(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = np.arange(n) % 6
    logits = random.normal(0, 1, (n, 6)) + sharpness * np.eye(6)[y]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.stack([photo(int(label), row) for row, label in enumerate(y)]), p, y


def history(phase: str, epochs: int) -> dict[str, object]:
    numbers = {"loss": 0.4, "val_loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.8}
    return {
        "phase": phase,
        "images": 1080,
        "epochs": [{"epoch": number + 1, **numbers} for number in range(epochs)],
    }


def texts(figure: Figure) -> list[str]:
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        legend = axes.get_legend()
        found += [axes.get_title(), *(text.get_text() for text in axes.texts)]
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return found


def test_plots_of_the_same_numbers_have_the_same_bytes(tmp_path: Path) -> None:
    images, p, y = case(18, 1.0)
    digests = []
    for attempt in ("one", "two"):
        folder = tmp_path / attempt
        drawn = {
            "curves": plots.curves([history("base", 3), history("full", 2)]),
            "confusion": plots.confusion(score(p, y)),
            "roc_pr": plots.roc_pr(p, y),
            "reliability": plots.reliability_diagram(p, y),
            "mistakes": plots.mistakes(images, p, y),
        }
        for name, figure in drawn.items():
            plots.save(figure, folder / f"{name}.png")
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        )
    assert digests[0] == digests[1]
    assert len(digests[0]) == 5
    with Image.open(tmp_path / "one" / "curves.png") as picture:
        assert picture.size == (1320, 528)
        assert "Software" not in picture.info


def test_curves_name_every_phase_and_join_their_epochs() -> None:
    figure = plots.curves([history("base", 3), history("fine_tune", 1), history("full", 2)])
    named = texts(figure)
    assert [text for text in named if "photos" in text] == 2 * [
        f"{name}\n1,080 photos" for name in ("base", "fine_tune", "full")
    ]
    loss, accuracy = figure.axes
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(accuracy.lines[1].get_ydata()) == [0.8] * 6


def test_mistakes_are_shown_most_confident_first() -> None:
    images, p, y = case(60, 0.5)
    wrong = np.flatnonzero(p.argmax(axis=1) != y)
    surest = wrong[p[wrong].max(axis=1).argmax()]
    figure = plots.mistakes(images, p, y)
    assert f"{len(wrong)} of 60 test photos misclassified" in figure.get_suptitle()
    assert "24 most confident" in figure.get_suptitle()
    assert (
        figure.axes[0].get_title() == f"{y[surest]} as {p[surest].argmax()} ({p[surest].max():.0%})"
    )


def test_without_mistakes_the_least_confident_photos_are_shown() -> None:
    images, p, y = case(30, 20.0)
    figure = plots.mistakes(images, p, y)
    assert figure.get_suptitle() == "None of 30 test photos misclassified; the 12 least confident"
    assert (
        figure.axes[0].get_title()
        == f"{y[p.max(axis=1).argmin()]}, correct ({p.max(axis=1).min():.0%})"
    )


@pytest.mark.parametrize("n", [1, 5, 7])
def test_a_few_photos_and_missing_classes_are_drawn_too(n: int, tmp_path: Path) -> None:
    images, p, y = case(n, 0.0)
    roc = plots.roc_pr(p, y)
    missing = 6 - len(set(y.tolist()))
    not_defined = [text for text in texts(roc) if "not defined" in text]
    assert len(not_defined) == 2 * (missing if n > 1 else 6)
    for name, figure in (
        ("confusion", plots.confusion(score(p, y))),
        ("roc", roc),
        ("reliability", plots.reliability_diagram(p, y)),
        ("mistakes", plots.mistakes(images, p, y)),
    ):
        plots.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000

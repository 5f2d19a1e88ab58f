"""Scores against naive re-computations, and refusal of what cannot be scored."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.scoring.metrics import CALIBRATION_BINS, CLASSES, Scores, calibration_error, score

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
@given(st.integers(0, 10**6), st.permutations(range(12)))
def test_the_order_of_photos_does_not_matter(seed: int, order: list[int]) -> None:
    p, y = random_case(seed, 12)
    assert score(p[order], y[order]).to_json() == score(p, y).to_json()


@FEW
@given(cases)
def test_json_is_plain_rounded_and_free_of_nan(case: tuple[np.ndarray, np.ndarray]) -> None:
    content = score(*case).to_json()
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again == content
    assert content["loss"] == round(content["loss"], 6)
    assert [item["label"] for item in content["per_class"]] == list("012345")


def test_a_perfect_model_scores_perfectly() -> None:
    scores = score(SIX, np.arange(CLASSES))
    assert (scores.accuracy, scores.auc, scores.ece, scores.worst_recall) == (1, 1, 0, 1)
    assert scores.loss == pytest.approx(1e-7, rel=1e-3)
    assert 0.6 < scores.accuracy_interval[0] < 0.62
    assert scores.accuracy_interval[1] == 1


def test_float32_rows_are_scored_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    p, y = random_case(3, 50)
    assert score(p.astype(np.float32), y).loss == pytest.approx(score(p, y).loss, abs=1e-6)
    assert not recwarn.list


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
        (SIX[:0], np.arange(0), "must be photos.*Received: 0"),
        (SIX * np.nan, np.arange(6), "finite.*nan"),
        (np.full((6, 6), np.inf), np.arange(6), "finite"),
        (SIX * 3 - 1 / 3, np.arange(6), "between 0 and 1"),
        (SIX * 0.9, np.arange(6), "sum to one.*0.9 in row 0"),
        (SIX, np.arange(6) + 1, "0 to 5. Received: 6 in row 5"),
        (SIX, np.arange(6) - 1, "0 to 5. Received: -1 in row 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_what_was_received(
    probabilities: np.ndarray, labels: np.ndarray, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        score(probabilities, labels)


def test_scores_cannot_be_changed_or_extended() -> None:
    scores = score(SIX, np.arange(CLASSES))
    with pytest.raises(ValueError, match="frozen"):
        scores.accuracy = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="extra"):
        Scores(**scores.model_dump(), surprise=1)

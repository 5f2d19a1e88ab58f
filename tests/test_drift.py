"""Drift is found when the photos change, and not when only chance differs."""

import numpy as np
import pytest

from tasks.scoring.drift import compare_counts, compare_embeddings, confidence_histogram

RNG = np.random.default_rng(3)
USUAL = np.array([0.2, 0.2, 0.2, 0.15, 0.15, 0.1])


def embeddings(count: int, shift: float = 0.0) -> np.ndarray:
    rows = RNG.normal(size=(count, 64))
    rows[:, :8] += shift
    return rows.astype(np.float16)


@pytest.mark.parametrize("size", [60, 300, 5000])
def test_usual_windows_are_no_drift(size):
    reference = RNG.multinomial(200, USUAL)
    windows = [RNG.multinomial(size, USUAL) for _ in range(10)]
    assert {compare_counts("labels", reference, one).verdict for one in windows} == {"no drift"}


def test_a_class_that_vanishes_is_drift():
    reference = RNG.multinomial(500, USUAL)
    window = RNG.multinomial(500, [0.5, 0.2, 0.2, 0.1, 0, 0])
    assert compare_counts("labels", reference, window).verdict == "drift"


def test_confidences_are_counted_in_ten_bins():
    assert confidence_histogram([0.0, 0.05, 0.15, 0.95, 1.0]) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_usual_embeddings_are_no_drift_in_ten_windows():
    reference = embeddings(150)
    found = [compare_embeddings(reference, embeddings(80)) for _ in range(10)]
    assert {one.verdict for one in found} == {"no drift"}


def test_other_photos_are_drift():
    found = compare_embeddings(embeddings(150), embeddings(80, shift=1.0))
    assert found.verdict == "drift"
    assert found.interval is not None
    assert 0.5 < found.interval[0] < found.value <= found.interval[1] <= 1.0


@pytest.mark.parametrize("sizes", [(49, 500), (500, 49), (0, 0)])
def test_too_few_samples_are_stated(sizes):
    n, m = sizes
    assert compare_counts("labels", [n, 0], [m, 0]).to_json()["verdict"] == "too few samples"
    assert compare_embeddings(embeddings(n), embeddings(m)).value is None

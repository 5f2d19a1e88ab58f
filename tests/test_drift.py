"""Drift is found when the photos change, and not when only chance differs."""

import numpy as np

from tasks.scoring.drift import compare_counts, compare_embeddings, confidence_histogram

RNG = np.random.default_rng(3)
USUAL = np.array([0.2, 0.2, 0.2, 0.15, 0.15, 0.1])


def embeddings(count: int, shift: float = 0.0) -> np.ndarray:
    return RNG.normal(size=(count, 64)) + np.where(np.arange(64) < 8, shift, 0)


def test_a_class_that_vanishes_is_drift_and_usual_windows_are_not():
    reference = RNG.multinomial(500, USUAL)
    for size in (60, 300, 5000):
        windows = [RNG.multinomial(size, USUAL) for _ in range(10)]
        assert {compare_counts("labels", reference, one).verdict for one in windows} == {"no drift"}
    window = RNG.multinomial(500, [0.5, 0.2, 0.2, 0.1, 0, 0])
    assert compare_counts("labels", reference, window).verdict == "drift"
    assert confidence_histogram([0.0, 0.05, 0.15, 0.95, 1.0]) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_other_photos_are_drift_and_usual_ones_are_not():
    for sizes in ((150, 80), (50, 50)):
        found = [compare_embeddings(*map(embeddings, sizes)) for _ in range(10)]
        assert {one.verdict for one in found} == {"no drift"}
    assert compare_embeddings(embeddings(150), embeddings(80, shift=1.0)).verdict == "drift"


def test_too_few_samples_are_stated():
    for n, m in ((49, 500), (500, 49), (0, 0)):
        assert compare_counts("labels", [n, 0], [m, 0]).to_json()["verdict"] == "too few samples"
        assert compare_embeddings(embeddings(n), embeddings(m)).value is None

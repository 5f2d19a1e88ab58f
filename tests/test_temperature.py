"""Scores of logits, and the temperature fitted on them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.temperature import LIMITS, fit_temperature, score


def drawn(scale: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `scale` times too sure, and labels drawn from the right ones."""
    random = np.random.default_rng(3)
    honest = random.normal(0, 2, (count, 6))
    odds = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    labels = (odds.cumsum(axis=1) > random.uniform(size=(count, 1))).argmax(axis=1)
    return honest * scale, labels


def test_score_of_even_odds_is_the_logarithm_of_six() -> None:
    assert score(np.zeros((12, 6)), np.arange(12) % 6) == pytest.approx((np.log(6), 1 / 6))


def test_score_stays_finite_for_very_sure_logits() -> None:
    logits = np.array([[1e4, 0, 0, 0, 0, 0]], np.float32)
    assert score(logits, np.array([1]))[0] == pytest.approx(1e4)


@pytest.mark.parametrize("scale", [1.4, 2.0, 3.0])
def test_temperature_undoes_what_made_logits_too_sure(scale: float) -> None:
    assert fit_temperature(*drawn(scale)) == pytest.approx(scale, rel=0.03)


@given(seed=st.integers(0, 1000), count=st.integers(1, 40))
def test_temperature_is_never_worse_than_the_lowest_one(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    logits, labels = random.normal(0, 3, (count, 6)), random.integers(0, 6, count)
    temperature = fit_temperature(logits, labels)
    assert LIMITS[0] <= temperature <= LIMITS[1]
    lowest = score(logits / LIMITS[0], labels)[0]
    assert score(logits / temperature, labels)[0] <= lowest + 1e-6
    assert score(logits / temperature, labels)[1] == score(logits, labels)[1]


def test_a_model_that_is_not_sure_enough_is_softened_all_the_same() -> None:
    assert fit_temperature(*drawn(0.8)) == LIMITS[0]


def test_right_answers_do_not_make_a_model_surer() -> None:
    labels = np.arange(300) % 6
    assert fit_temperature(np.eye(6)[labels] * 4, labels) == LIMITS[0]


def test_few_wrong_answers_do_not_make_a_model_doubt_everything() -> None:
    labels = np.arange(6)
    logits = np.roll(np.eye(6), 1, axis=1)[labels] * 4
    assert LIMITS[0] < fit_temperature(logits, labels) < LIMITS[1] * 0.9

"""A challenger beside a champion: the verdict, the rule, and what changed."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.scoring.compare import compare, mcnemar
from tasks.scoring.metrics import CLASSES

FEW = settings(max_examples=30, deadline=None)  # a busy machine is no fault


def certain(classes: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Probabilities that name `classes` with `confidence`; float64, (n, 6)."""
    p = np.full((len(classes), CLASSES), (1 - confidence) / (CLASSES - 1))
    p[np.arange(len(classes)), classes] = confidence
    return p


def models(both: int, won: int, lost: int, neither: int) -> tuple[np.ndarray, ...]:
    """Champion, challenger and labels with these counts of right answers."""
    n = both + won + lost + neither
    y = np.arange(n) % CLASSES
    champion, challenger = y.copy(), y.copy()
    champion[both : both + won] += 1
    challenger[both + won : both + won + lost] += 1
    champion[n - neither :] += 1
    challenger[n - neither :] += 1
    return certain(champion % CLASSES), certain(challenger % CLASSES), y


counts = st.tuples(st.integers(1, 40), *[st.integers(0, 25)] * 3)


@FEW
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_sums_the_binomial_tail(won: int, lost: int) -> None:
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    assert mcnemar(won, lost) == pytest.approx(min(1.0, 2 * tail))


@FEW
@given(counts)
def test_the_rule_follows_accuracy_and_never_contradicts_the_words(
    case: tuple[int, int, int, int],
) -> None:
    result = compare(*models(*case))
    _, won, lost, _ = case
    assert (result.won, result.lost) == (won, lost)
    assert result.no_worse == (result.challenger.accuracy >= result.champion.accuracy)
    if result.verdict == "better":
        assert result.no_worse
    if result.verdict == "worse":
        assert not result.no_worse


@FEW
@given(counts)
def test_swapping_the_models_mirrors_the_comparison(case: tuple[int, int, int, int]) -> None:
    champion, challenger, y = models(*case)
    one, other = compare(champion, challenger, y), compare(challenger, champion, y)
    mirrored = {"better": "worse", "worse": "better"}
    assert other.verdict == mirrored.get(one.verdict, one.verdict)
    assert (other.won, other.lost, other.p_value) == (one.lost, one.won, one.p_value)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_a_model_is_no_worse_than_itself(seed: int, n: int) -> None:
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(CLASSES), n)
    result = compare(p, p, random.integers(0, CLASSES, n))
    assert result.no_worse
    assert result.verdict == "no significant difference"
    assert (result.changed, result.p_value, result.loss_p_value) == ((), 1.0, 1.0)


@pytest.mark.parametrize(
    ("won", "lost", "verdict", "no_worse"),
    [
        (6, 0, "better", True),
        (0, 6, "worse", False),
        (5, 0, "no significant difference", True),
        (0, 5, "no significant difference", False),
        (1, 2, "no significant difference", False),
        (3, 3, "no significant difference", True),
    ],
)
def test_six_to_none_is_significant_and_five_to_none_is_not(
    won: int, lost: int, verdict: str, no_worse: bool
) -> None:
    result = compare(*models(100, won, lost, 2))
    assert (result.verdict, result.no_worse) == (verdict, no_worse)


def test_equal_accuracy_with_significantly_higher_loss_is_worse() -> None:
    y = np.arange(60) % CLASSES
    random = np.random.default_rng(0)
    sure = np.concatenate(
        [certain(y[i : i + 1], c) for i, c in enumerate(random.uniform(0.9, 1, 60))]
    )
    unsure = np.concatenate(
        [certain(y[i : i + 1], c) for i, c in enumerate(random.uniform(0.5, 0.7, 60))]
    )
    result = compare(sure, unsure, y)
    assert not result.no_worse
    assert "significantly higher loss" in result.reason
    assert compare(unsure, sure, y).no_worse
    assert not compare(certain(y, 0.9), certain(y, 0.8), y).no_worse


def test_equal_accuracy_with_a_little_higher_loss_is_no_worse() -> None:
    y = np.arange(60) % CLASSES
    random = np.random.default_rng(1)
    noise = [random.uniform(0.8, 0.99, 60) for _ in range(2)]
    one, other = (
        np.concatenate([certain(y[i : i + 1], c) for i, c in enumerate(values)]) for values in noise
    )
    assert compare(one, other, y).no_worse
    assert compare(other, one, y).no_worse
    # Steadily higher, hence significant, but by 0.002 only.
    assert compare(certain(y, 0.992), certain(y, 0.99), y).no_worse


def test_photos_that_changed_are_named_with_what_they_became() -> None:
    y = np.array([0, 1, 2, 3])
    champion, challenger = certain(np.array([0, 0, 2, 0])), certain(np.array([0, 1, 5, 1]))
    result = compare(champion, challenger, y, names=["a.png", "b.png", "c.png", "d.png"])
    assert [(p.name, p.label, p.champion, p.challenger, p.now) for p in result.changed] == [
        ("b.png", "1", "0", "1", "right"),
        ("c.png", "2", "2", "5", "wrong"),
        ("d.png", "3", "0", "1", "still wrong"),
    ]


def test_recall_changes_are_given_for_each_class_and_null_without_photos() -> None:
    y = np.array([0, 0, 1, 2, 3, 4])
    result = compare(certain(np.array([0, 5, 1, 2, 3, 4])), certain(y), y)
    assert [(c.label, c.support, c.change) for c in result.recalls] == [
        ("0", 2, 0.5),
        ("1", 1, 0.0),
        ("2", 1, 0.0),
        ("3", 1, 0.0),
        ("4", 1, 0.0),
        ("5", 0, None),
    ]


def test_probabilities_of_other_photos_are_refused() -> None:
    champion, challenger, y = models(10, 1, 1, 1)
    with pytest.raises(DataError, match="Labels must be integers of shape"):
        compare(champion, challenger[:-1], y)
    with pytest.raises(DataError, match="2 names for 13 photos"):
        compare(champion, challenger, y, names=["a", "b"])

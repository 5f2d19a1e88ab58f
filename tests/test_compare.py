"""A challenger beside a champion: the promotion rule, and what changed."""

from functools import partial
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.scoring.compare import LOSS_MARGIN, mcnemar
from tasks.scoring.compare import compare as compare_
from tests.fixtures.photos import LABELS

compare = partial(compare_, classes=LABELS)

FEW = settings(max_examples=30, deadline=None)  # a busy machine is no fault
CLASSES = len(LABELS)


def certain(classes: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Probabilities that name `classes` with `confidence`; float64, (n, labels)."""
    p = np.full((len(classes), CLASSES), (1 - confidence) / (CLASSES - 1))
    p[np.arange(len(classes)), classes] = confidence
    return p


def models(
    both: int, won: int, lost: int, neither: int, confidence: float = 0.9
) -> list[np.ndarray]:
    """Champion, challenger and labels with these counts of right answers."""
    n = both + won + lost + neither
    y = np.arange(n) % CLASSES
    champion, challenger = y.copy(), y.copy()
    champion[both : both + won] += 1
    challenger[both + won : both + won + lost] += 1
    champion[n - neither :] += 1
    challenger[n - neither :] += 1
    return [certain(champion % CLASSES), certain(challenger % CLASSES, confidence), y]


counts = st.tuples(st.integers(1, 40), *[st.integers(0, 25)] * 3)


@FEW
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_sums_the_binomial_tail(won: int, lost: int) -> None:
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    assert mcnemar(won, lost) == pytest.approx(min(1.0, 2 * tail))


@FEW
@given(counts)
def test_swapping_the_models_mirrors_the_comparison(case: tuple[int, int, int, int]) -> None:
    champion, challenger, y = models(*case)
    one, other = compare(champion, challenger, y), compare(challenger, champion, y)
    assert (one.won, one.lost) == case[1:3]
    mirrored = {"better": "worse", "worse": "better"}
    assert other.verdict == mirrored.get(one.verdict, one.verdict)
    assert (other.won, other.lost, other.p_value) == (one.lost, one.won, one.p_value)
    assert one.no_worse or other.no_worse


@pytest.mark.parametrize(
    ("won", "lost", "verdict"),
    [
        (6, 0, "better"),
        (0, 6, "worse"),
        (5, 0, "no significant difference"),
        (0, 5, "no significant difference"),
        (3, 3, "no significant difference"),
        (12, 2, "better"),
        (2, 12, "worse"),
    ],
)
def test_significance_decides_and_within_noise_the_loss(won: int, lost: int, verdict: str) -> None:
    significant = verdict != "no significant difference"
    for confidence, lower in ((0.99, True), (0.7, False)):
        result = compare(*models(2000, won, lost, 2, confidence))
        assert result.verdict == verdict
        assert (result.challenger.loss < result.champion.loss) == lower
        assert result.no_worse == (won > lost if significant else lower)


def test_the_loss_may_rise_by_its_margin_and_no_more() -> None:
    y = np.arange(60) % CLASSES
    kept = np.exp(-LOSS_MARGIN)
    assert compare(certain(y, 0.9), certain(y, 0.9), y).no_worse
    assert compare(certain(y, 0.9), certain(y, 0.9 * kept + 1e-6), y).no_worse
    assert not compare(certain(y, 0.9), certain(y, 0.9 * kept - 1e-6), y).no_worse


@pytest.mark.parametrize(
    ("rows", "confidence", "words"),
    [
        ((100, 9, 0, 0), 0.9, "right on significantly more photos than the champion: "),
        ((100, 0, 9, 0), 0.9, "right on significantly fewer photos than the champion: "),
        ((100, 0, 1, 0), 0.95, "within noise, and the loss is at most 0.01 higher: "),
        ((100, 1, 0, 0), 0.8, "within noise, and the loss is more than 0.01 higher: "),
    ],
)
def test_the_reason_names_the_part_of_the_rule_that_decided(
    rows: tuple[int, int, int, int], confidence: float, words: str
) -> None:
    result = compare(*models(*rows, confidence=confidence))
    assert words in result.reason
    old, new = result.champion, result.challenger
    assert f"accuracy {old.accuracy:.4f} -> {new.accuracy:.4f}" in result.reason
    assert f"loss {old.loss:.4f} -> {new.loss:.4f}" in result.reason
    assert f"{rows[1]} photos won, {rows[2]} lost (McNemar p = " in result.reason


def test_photos_that_changed_are_named_with_what_they_became() -> None:
    y = np.array([0, 1, 2, 3])
    champion, challenger = certain(np.array([0, 0, 2, 0])), certain(np.array([0, 1, 5, 1]))
    result = compare(champion, challenger, y, names=["a.png", "b.png", "c.png", "d.png"])
    assert [tuple(photo.values()) for photo in result.changed] == [
        ("b.png", "1", "0", "1", "right"),
        ("c.png", "2", "2", "5", "wrong"),
        ("d.png", "3", "0", "1", "still wrong"),
    ]
    assert result.to_json()["changed"][0]["name"] == "b.png"
    assert compare(champion, challenger, y).changed[0]["name"] == "1"
    assert compare(champion, champion, y).changed == ()


def test_recall_changes_are_given_for_each_class_and_null_without_photos() -> None:
    y = np.array([0, 0, 1, 2, 3, 4])
    result = compare(certain(np.array([0, 5, 1, 2, 3, 4])), certain(y), y)
    assert [(c["label"], c["support"], c["change"]) for c in result.recalls] == [
        ("0", 2, 0.5),
        *((str(label), 1, 0.0) for label in range(1, 5)),
        ("5", 0, None),
    ]
    assert (result.recalls[0]["champion"], result.recalls[0]["challenger"]) == (0.5, 1.0)


def test_probabilities_of_other_photos_are_refused() -> None:
    champion, challenger, y = models(10, 1, 1, 1)
    with pytest.raises(DataError, match="Labels must be integers of shape"):
        compare(champion, challenger[:-1], y)
    with pytest.raises(DataError, match="2 names for 13 photos"):
        compare(champion, challenger, y, names=["a", "b"])

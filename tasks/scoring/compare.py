"""Compare two models on the same photos.

`verdict` says whether McNemar's exact test finds a difference in accuracy. `no_worse` is
the promotion rule: the challenger must be right on at least as many photos, and on a tie
its mean loss must not be significantly higher by more than 0.01. A rule on significance
alone would let small losses of accuracy add up over many nightly runs.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest, ttest_1samp

from tasks.errors import DataError
from tasks.params import LABELS
from tasks.scoring.metrics import FrozenModel, Scores, checked, photo_losses, rounded, score

SIGNIFICANCE = 0.05
LOSS_MARGIN = 0.01
"""Rise in mean loss (nats) that no user notices, however significant."""


class ClassChange(FrozenModel):
    """Recall of one class under both models; null where the class has no photo."""

    label: str
    support: int
    champion: float | None
    challenger: float | None
    change: float | None


class ChangedPhoto(FrozenModel):
    """A photo that the two models classify differently."""

    name: str
    label: str
    champion: str
    challenger: str
    now: Literal["right", "wrong", "still wrong"]


class Comparison(FrozenModel):
    """A challenger and the champion, scored on the same photos.

    Args:
        changed: photos that got another label, in the photos' order.
        won: photos that only the challenger classifies correctly.
        lost: photos that only the champion classifies correctly.
        p_value: McNemar's exact test, two-sided.
        loss_p_value: paired t-test of a higher mean loss, one-sided.
        no_worse: whether the challenger may become champion.
    """

    champion: Scores
    challenger: Scores
    recalls: tuple[ClassChange, ...]
    changed: tuple[ChangedPhoto, ...]
    won: int
    lost: int
    p_value: float
    loss_p_value: float
    verdict: Literal["better", "worse", "no significant difference"]
    no_worse: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, floats rounded as in the metrics."""
        content: dict[str, Any] = rounded(self.model_dump(mode="json"))
        scores = {"champion": self.champion.to_json(), "challenger": self.challenger.to_json()}
        return content | scores


def compare(
    champion: np.ndarray,
    challenger: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Compare two models' probabilities, float (n, 6), for the same photos.

    Args:
        labels: integer, (n,); 0 to 5.
        names: of the photos; their row numbers by default.
    """
    old, y = checked(champion, labels)
    new, _ = checked(challenger, labels)
    names = [str(row) for row in range(len(y))] if names is None else names
    if len(names) != len(y):
        raise DataError(
            f"There are {len(names)} names for {len(y)} photos. "
            "Pass the names of the photos that were scored."
        )
    was, now = old.argmax(axis=1), new.argmax(axis=1)
    won = int(((was != y) & (now == y)).sum())
    lost = int(((was == y) & (now != y)).sum())
    rise = photo_losses(new, y) - photo_losses(old, y)
    loss_p_value = _higher_loss_p_value(rise)
    first, second = score(old, y), score(new, y)
    comparison = Comparison(
        champion=first,
        challenger=second,
        recalls=_recall_changes(first, second),
        changed=_changed_photos(names, y, was, now),
        won=won,
        lost=lost,
        p_value=mcnemar(won, lost),
        loss_p_value=loss_p_value,
        verdict=_verdict(won, lost),
        no_worse=won > lost
        or (won == lost and (loss_p_value >= SIGNIFICANCE or rise.mean() <= LOSS_MARGIN)),
        reason="",
    )
    return comparison.model_copy(update={"reason": _reason(comparison)})


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test; 1 where the models never differ.

    McNemar, Note on the sampling error of the difference between correlated proportions
    or percentages, 1947, in its binomial form.
    """
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _higher_loss_p_value(rise: np.ndarray) -> float:
    if np.ptp(rise) < 1e-12:  # the test divides by the spread
        return 0.0 if rise.mean() > 1e-12 else 1.0
    return float(ttest_1samp(rise, 0.0, alternative="greater").pvalue)


def _verdict(won: int, lost: int) -> Literal["better", "worse", "no significant difference"]:
    if mcnemar(won, lost) >= SIGNIFICANCE:
        return "no significant difference"
    return "better" if won > lost else "worse"


def _recall_changes(champion: Scores, challenger: Scores) -> tuple[ClassChange, ...]:
    return tuple(
        ClassChange(
            label=old.label,
            support=old.support,
            champion=old.recall,
            challenger=new.recall,
            change=None if old.recall is None or new.recall is None else new.recall - old.recall,
        )
        for old, new in zip(champion.per_class, challenger.per_class, strict=True)
    )


def _changed_photos(
    names: Sequence[str], y: np.ndarray, was: np.ndarray, now: np.ndarray
) -> tuple[ChangedPhoto, ...]:
    return tuple(
        ChangedPhoto(
            name=names[row],
            label=LABELS[y[row]],
            champion=LABELS[was[row]],
            challenger=LABELS[now[row]],
            now="right" if now[row] == y[row] else "wrong" if was[row] == y[row] else "still wrong",
        )
        for row in np.flatnonzero(was != now).tolist()
    )


def _reason(found: Comparison) -> str:
    if found.no_worse:
        rule = "no worse than the champion"
    elif found.won < found.lost:
        rule = "worse than the champion: right on fewer photos"
    else:
        rule = "worse than the champion: as many photos right, but a significantly higher loss"
    old, new = found.champion, found.challenger
    return (
        f"{rule}; accuracy {old.accuracy:.4f} -> {new.accuracy:.4f}, "
        f"loss {old.loss:.4f} -> {new.loss:.4f}, {found.won} photos won, {found.lost} lost, "
        f"{found.verdict} (McNemar p = {found.p_value:.3g})"
    )

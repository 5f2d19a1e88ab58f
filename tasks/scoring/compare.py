"""Two models on the same photos: which is better, and is that more than chance.

The two questions are kept apart. `verdict` says in words whether McNemar's
exact test finds a difference in accuracy. `no_worse` is the rule for
promotion: the challenger must be right on at least as many photos, and where
both are right on equally many its mean loss must not be higher by more than
0.01, and significantly so.
A rule on significance alone would let a model that is worse by a photo or two
in through every nightly run, and the losses would add up.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest, ttest_1samp

from tasks.errors import DataError
from tasks.params import LABELS
from tasks.scoring.metrics import DIGITS, Scores, checked, photo_losses, score

SIGNIFICANCE = 0.05
LOSS_MARGIN = 0.01
"""A rise in mean loss (nats) up to this is nothing to a user, however significant."""

Words = Literal["better", "worse", "no significant difference"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassChange(_Frozen):
    """Recall of one class under both; null where the class has no photo."""

    label: str
    support: int
    champion: float | None
    challenger: float | None
    change: float | None


class ChangedPhoto(_Frozen):
    """A photo that the two models read differently."""

    name: str
    label: str
    champion: str
    challenger: str
    now: Literal["right", "wrong", "still wrong"]


class Comparison(_Frozen):
    """A challenger beside the champion, scored on the same photos.

    Args:
        champion: scores of the present champion.
        challenger: scores of the model that may replace it.
        recalls: change in recall of each class.
        changed: photos that got another label, in the photos' order.
        won: photos that only the challenger has right.
        lost: photos that only the champion has right.
        p_value: McNemar's exact test, two-sided: the chance of a split of the
            `won + lost` photos at least this uneven between equal models.
        loss_p_value: paired t-test, one-sided: the chance of a mean loss at
            least this much higher between equal models.
        verdict: 'better' or 'worse' when `p_value` is below 0.05.
        no_worse: whether the challenger may become champion.
        reason: both in one sentence.
    """

    champion: Scores
    challenger: Scores
    recalls: tuple[ClassChange, ...]
    changed: tuple[ChangedPhoto, ...]
    won: int
    lost: int
    p_value: float
    loss_p_value: float
    verdict: Words
    no_worse: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, floats rounded as in the metrics."""
        content = self.model_dump(mode="json")
        content["champion"] = self.champion.to_json()
        content["challenger"] = self.challenger.to_json()
        for row in content["recalls"]:
            for key in ("champion", "challenger", "change"):
                row[key] = None if row[key] is None else round(row[key], DIGITS)
        for key in ("p_value", "loss_p_value"):
            content[key] = round(content[key], DIGITS)
        return content


def compare(
    champion: np.ndarray,
    challenger: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Compare two models' probabilities for the same photos.

    Args:
        champion: float, (n, 6); rows sum to one.
        challenger: float, (n, 6); of the same photos in the same order.
        labels: integer, (n,); 0 to 5.
        names: n names of the photos; their numbers when left out.

    Returns:
        Scores of both, what changed, and the verdict.

    Raises:
        DataError: the arrays do not fit each other; see `tasks.scoring.metrics.score`.
    """
    before, y = checked(champion, labels)
    after, _ = checked(challenger, labels)
    titles = [str(number) for number in range(len(y))] if names is None else list(names)
    if len(titles) != len(y):
        raise DataError(
            f"There must be one name a photo, {len(y)}. Received: {len(titles)} names. "
            "Pass the names of the photos that were scored."
        )
    was, now = before.argmax(axis=1), after.argmax(axis=1)
    won = int(((was != y) & (now == y)).sum())
    lost = int(((was == y) & (now != y)).sum())
    p_value = mcnemar(won, lost)
    rise = photo_losses(after, y) - photo_losses(before, y)
    loss_p_value = _chance_of_higher_loss(rise)
    higher_loss = loss_p_value < SIGNIFICANCE and float(rise.mean()) > LOSS_MARGIN
    verdict = _words(won, lost, p_value)
    no_worse = won > lost or (won == lost and not higher_loss)
    first, second = score(before, y), score(after, y)
    return Comparison(
        champion=first,
        challenger=second,
        recalls=_recall_changes(first, second),
        changed=_changed(titles, y, was, now),
        won=won,
        lost=lost,
        p_value=p_value,
        loss_p_value=loss_p_value,
        verdict=verdict,
        no_worse=no_worse,
        reason=_reason(first, second, (won, lost), p_value, verdict, no_worse),
    )


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact test on the photos that exactly one of two models has right.

    McNemar, "Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12, 1947, in its binomial form.

    Args:
        won: photos that only the second model has right.
        lost: photos that only the first has right.

    Returns:
        Two-sided p-value; 1 where the models never differ.
    """
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _chance_of_higher_loss(rise: np.ndarray) -> float:
    if np.ptp(rise) < 1e-12:  # the test divides by the spread
        return 0.0 if rise.mean() > 1e-12 else 1.0
    return float(ttest_1samp(rise, 0.0, alternative="greater").pvalue)


def _words(won: int, lost: int, p_value: float) -> Words:
    if p_value >= SIGNIFICANCE:
        return "no significant difference"
    return "better" if won > lost else "worse"


def _recall_changes(champion: Scores, challenger: Scores) -> tuple[ClassChange, ...]:
    pairs = zip(champion.per_class, challenger.per_class, strict=True)
    return tuple(
        ClassChange(
            label=old.label,
            support=old.support,
            champion=old.recall,
            challenger=new.recall,
            change=None if old.recall is None or new.recall is None else new.recall - old.recall,
        )
        for old, new in pairs
    )


def _changed(
    names: Sequence[str], y: np.ndarray, was: np.ndarray, now: np.ndarray
) -> tuple[ChangedPhoto, ...]:
    photos = []
    for row in np.flatnonzero(was != now).tolist():
        outcome: Literal["right", "wrong", "still wrong"] = (
            "right" if now[row] == y[row] else "wrong" if was[row] == y[row] else "still wrong"
        )
        photos.append(
            ChangedPhoto(
                name=names[row],
                label=LABELS[y[row]],
                champion=LABELS[was[row]],
                challenger=LABELS[now[row]],
                now=outcome,
            )
        )
    return tuple(photos)


def _reason(
    champion: Scores,
    challenger: Scores,
    discordant: tuple[int, int],
    p_value: float,
    verdict: Words,
    no_worse: bool,
) -> str:
    won, lost = discordant
    if no_worse:
        rule = "no worse than the champion"
    elif won < lost:
        rule = "worse than the champion: right on fewer photos"
    else:
        rule = "worse than the champion: as many photos right, but a significantly higher loss"
    return (
        f"{rule}; accuracy {champion.accuracy:.4f} -> {challenger.accuracy:.4f}, "
        f"loss {champion.loss:.4f} -> {challenger.loss:.4f}, {won} photos won, {lost} lost, "
        f"{verdict} (McNemar p = {p_value:.3g})"
    )

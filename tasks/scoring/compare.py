"""Compare two models on the same photos.

The promotion rule: a challenger is promoted if it is right on significantly more photos than
the champion (McNemar's exact test, 5 %), or if the difference is within noise and its mean
loss is higher by at most 0.01.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

from tasks.errors import DataError
from tasks.params import list_labels
from tasks.scoring.metrics import FrozenModel, Scores, checked, rounded, score

SIGNIFICANCE = 0.05
LOSS_MARGIN = 0.01
"""Rise in mean loss (nats) that no user notices."""


class Comparison(FrozenModel):
    """A challenger and the champion, scored on the same photos.

    Args:
        recalls: by class `label`, `support`, the recall of `champion` and `challenger` and its
            `change`; null where the class has no photo.
        changed: photos that got another label: `name`, `label`, what `champion` and
            `challenger` say, and whether they are `now` right, wrong or still wrong.
        won: photos that only the challenger classifies correctly.
        lost: photos that only the champion classifies correctly.
        p_value: McNemar's exact test, two-sided.
        verdict: what the test says about the accuracy.
        no_worse: whether the challenger may become champion.
    """

    champion: Scores
    challenger: Scores
    recalls: tuple[dict[str, Any], ...]
    changed: tuple[dict[str, str], ...]
    won: int
    lost: int
    p_value: float
    verdict: Literal["better", "worse", "no significant difference"]
    no_worse: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, floats rounded as in the metrics."""
        content: dict[str, Any] = rounded(self.model_dump(mode="json"))
        scores = {"champion": self.champion.to_json(), "challenger": self.challenger.to_json()}
        return content | scores


def differing_labels(first: Sequence[str], second: Sequence[str]) -> str | None:
    """Why models with these labels cannot be compared, or None if they can."""
    if [*first] == [*second]:
        return None
    only = {
        "the first": [label for label in first if label not in second],
        "the second": [label for label in second if label not in first],
    }
    faults = [f"only {who} has {list_labels(found)}" for who, found in only.items() if found]
    return "their labels differ: " + (" and ".join(faults) or "they are in another order")


def compare(
    champion: np.ndarray,
    challenger: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | None = None,
    *,
    classes: Sequence[str],
) -> Comparison:
    """Compare two models' probabilities, float (n, classes), for the same photos.

    Args:
        labels: integer, (n,).
        names: of the photos; their row numbers by default.
        classes: names of the classes.
    """
    old, y = checked(champion, labels, classes)
    new, _ = checked(challenger, labels, classes)
    names = [str(row) for row in range(len(y))] if names is None else names
    if len(names) != len(y):
        raise DataError(
            f"There are {len(names)} names for {len(y)} photos. "
            "Pass the names of the photos that were scored."
        )
    was, now = old.argmax(axis=1), new.argmax(axis=1)
    won = int(((was != y) & (now == y)).sum())
    lost = int(((was == y) & (now != y)).sum())
    before, after = score(old, y, classes), score(new, y, classes)
    p_value, rise = mcnemar(won, lost), after.loss - before.loss
    verdict: Literal["better", "worse", "no significant difference"]
    if p_value < SIGNIFICANCE:
        verdict = "better" if won > lost else "worse"
        no_worse = won > lost
        rule = f"right on significantly {'more' if no_worse else 'fewer'} photos than the champion"
    else:
        verdict, no_worse = "no significant difference", rise <= LOSS_MARGIN
        limit = f"at most {LOSS_MARGIN} higher" if no_worse else f"more than {LOSS_MARGIN} higher"
        rule = f"accuracy equals the champion's within noise, and the loss is {limit}"
    return Comparison(
        champion=before,
        challenger=after,
        recalls=tuple(
            {
                "label": one.label,
                "support": one.support,
                "champion": one.recall,
                "challenger": two.recall,
                "change": None
                if one.recall is None or two.recall is None
                else two.recall - one.recall,
            }
            for one, two in zip(before.per_class, after.per_class, strict=True)
        ),
        changed=tuple(
            {
                "name": names[row],
                "label": classes[y[row]],
                "champion": classes[was[row]],
                "challenger": classes[now[row]],
                "now": "right"
                if now[row] == y[row]
                else "wrong"
                if was[row] == y[row]
                else "still wrong",
            }
            for row in np.flatnonzero(was != now).tolist()
        ),
        won=won,
        lost=lost,
        p_value=p_value,
        verdict=verdict,
        no_worse=no_worse,
        reason=f"{rule}: accuracy {before.accuracy:.4f} -> {after.accuracy:.4f}, "
        f"loss {before.loss:.4f} -> {after.loss:.4f}, {won} photos won, {lost} lost "
        f"(McNemar p = {p_value:.3g})",
    )


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test; 1 where the models never differ.

    McNemar, Note on the sampling error of the difference between correlated proportions
    or percentages, 1947, in its binomial form.
    """
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0

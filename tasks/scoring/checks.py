"""One check of the gate: a value, its limit, and how far chance could have moved it.

A value that is missing, null, NaN, infinite, not a number (a string, a boolean) or out
of its range fails its check.
"""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest, norm

Number = int | float
Interval = tuple[float, float]

LARGEST = 1e12
"""No loss and no count is larger; what is, is broken."""


class Check(BaseModel):
    """One limit and what was found; `value` is null where it is unusable.

    Args:
        name: what was measured.
        value: what was found.
        limit: what it was held against.
        interval: where the true value lies, at the gate's confidence; null for counts.
        passed: whether the limit is met.
        detail: why not, where the numbers do not say it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    value: Number | None
    limit: Number | None
    interval: Interval | None = None
    passed: bool
    detail: str | None = None

    @property
    def told(self) -> str:
        """The check in words."""
        fault = self.detail or f"{shown(self.value)} misses the limit of {shown(self.limit)}"
        return self.name if self.passed else f"{self.name}: {fault}"


def at_least(
    name: str, value: Any, limit: Number, highest: float, interval: Interval | None = None
) -> Check:
    """Pass a number that reaches its limit."""
    fault = _fault(value, highest, whole=False)
    return _check(name, value, limit, interval, fault, lambda: value >= limit)


def at_most(
    name: str, value: Any, limit: Number, highest: float, interval: Interval | None = None
) -> Check:
    """Pass a number that does not exceed its limit."""
    fault = _fault(value, highest, whole=False)
    return _check(name, value, limit, interval, fault, lambda: value <= limit)


def surely_at_least(
    name: str, value: Any, limit: Number, interval: Interval | None, level: float
) -> Check:
    """Pass a share whose interval's lower bound reaches the limit."""
    fault = _fault(value, 1.0, whole=False)
    if fault is None and interval is None:
        fault = "no interval: the number of photos is missing"
    check = _check(
        name, value, limit, interval, fault, lambda: bool(interval and interval[0] >= limit)
    )
    if fault or check.passed or interval is None:
        return check
    bound = f"{shown(value)}, at {level:.0%} confidence at least {interval[0]:.4f}"
    return check.model_copy(update={"detail": f"{bound}, misses the limit of {shown(limit)}"})


def count_at_least(name: str, value: Any, limit: int) -> Check:
    """Pass a whole number that reaches its limit."""
    return _check(name, value, limit, None, _fault(value, LARGEST, True), lambda: value >= limit)


def count_at_most(name: str, value: Any, limit: int) -> Check:
    """Pass a whole number that does not exceed its limit."""
    return _check(name, value, limit, None, _fault(value, LARGEST, True), lambda: value <= limit)


def share_interval(share: Any, photos: Any, level: float) -> Interval | None:
    """Wilson's interval of a share of photos; None where there is no such share."""
    if _fault(share, 1.0, False) or _fault(photos, LARGEST, True) or not photos:
        return None
    bounds = binomtest(round(share * photos), photos).proportion_ci(level, method="wilson")
    return round(float(bounds.low), 6), round(float(bounds.high), 6)


def mean_interval(value: Any, error: Any, level: float) -> Interval | None:
    """Normal interval of something that cannot be negative, from its standard error."""
    if _fault(value, LARGEST, False) or _fault(error, LARGEST, False):
        return None
    reach = float(norm.ppf((1 + level) / 2)) * error
    return round(max(0.0, value - reach), 6), round(value + reach, 6)


def shown(value: Number | None) -> str:
    """A number as tables show it."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def shown_interval(interval: Any) -> str:
    """An interval as tables show it."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def _check(
    name: str,
    value: Any,
    limit: Number,
    interval: Interval | None,
    fault: str | None,
    holds: Any,
) -> Check:
    if fault:
        return Check(name=name, value=None, limit=limit, passed=False, detail=fault)
    return Check(name=name, value=value, limit=limit, interval=interval, passed=bool(holds()))


def _fault(value: Any, highest: float, whole: bool) -> str | None:
    if value is None:
        return "missing"
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return f"not a {'whole ' if whole else ''}number: {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"not finite: {value!r}"
    if not 0 <= value <= highest:
        return f"out of range, 0 to {highest:g}"
    return None

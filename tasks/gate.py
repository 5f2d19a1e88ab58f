"""Stage: decide whether a model is good enough to be released; fails closed.

The stage writes `gate.json` and exits with 0 either way, so that `dvc repro` completes.
Whoever would publish the model reads `passed`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import norm

from tasks.data.dataset import INDEX
from tasks.io import read_json, write_json
from tasks.params import GateParams
from tasks.scoring.metrics import DIGITS, FrozenModel, Interval, wilson_interval
from tasks.stage import Context, stage_main

Number = int | float

CORRUPTIONS = ("rotation", "brightness", "blur", "scale", "jpeg")
"""Kinds that the model must have been tested with; see `tasks.evaluate`."""
LARGEST = 1e12  # a loss or a count above this is broken
DEFAULT_CONFIDENCE = 0.95  # of the intervals that are shown where `gate.confidence` is not set


class Check(FrozenModel):
    """One limit and what was measured; value and interval are null where unusable."""

    name: str
    value: Number | None
    limit: Number | None
    interval: Interval | None = None
    passed: bool
    detail: str | None = None

    def describe(self) -> str:
        """The check in words."""
        if self.passed:
            return self.name
        fault = f"{shown(self.value)} misses the limit of {shown(self.limit)}"
        return f"{self.name}: {self.detail or fault}"


class Verdict(FrozenModel):
    """The gate's answer."""

    passed: bool
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line for each failed check."""
        return tuple(check.describe() for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `detail` only where there is one."""
        rows = [check.model_dump() for check in self.checks]
        checks = [{k: v for k, v in row.items() if k != "detail" or v} for row in rows]
        return {"passed": self.passed, "checks": checks}


def run(context: Context, item: str | None = None) -> None:
    """Judge `metrics.json` and the index of the dataset; write and print the verdict."""
    index, metrics = read_json(context.project.dataset / INDEX), read_json(context.project.metrics)
    params = context.params
    verdict = judge(metrics, _mapping(index).get("leaks"), params.gate, params.labels)
    write_json(context.project.gate, verdict.to_json())
    print("Gate:", "passed" if verdict.passed else "failed")
    for check in verdict.checks:
        numbers = f"{check.name} {shown(check.value)}, limit {shown(check.limit)}"
        print("  passed " if check.passed else "  FAILED ", numbers, check.detail or "")


def judge(metrics: Any, duplicates: Any, limits: GateParams, labels: Sequence[str]) -> Verdict:
    """Check metrics against the limits; unusable values fail, and so does having no limit."""
    checks = tuple(_checks(_mapping(metrics), duplicates, limits, labels))
    if not checks:
        detail = "no limit is set; set at least one under gate in params.yaml"
        checks = (Check(name="limits", value=None, limit=None, passed=False, detail=detail),)
    return Verdict(passed=all(check.passed for check in checks), checks=checks)


def shown(value: Number | None) -> str:
    """A number as tables show it."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def shown_interval(interval: Any) -> str:
    """An interval as tables show it."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def _checks(
    metrics: Mapping[str, Any], duplicates: Any, limits: GateParams, labels: Sequence[str]
) -> Iterator[Check]:
    level = limits.confidence or DEFAULT_CONFIDENCE
    for name, value, photos, limit in _shares(metrics, limits, labels):
        if limit is not None:
            interval, usable = None, _usable(value, 1.0)
            if usable and _usable(photos, whole=True) and photos:
                interval = wilson_interval(round(value * photos), photos, level)
            sure = limits.confidence if name == "accuracy" else None
            yield _check(name, value, limit, usable, interval=interval, level=sure)
    errors, z = _mapping(metrics.get("standard_errors")), float(norm.ppf((1 + level) / 2))
    for name, key, limit, largest in (
        ("loss", "loss", limits.max_loss, LARGEST),
        ("calibration error", "ece", limits.max_calibration_error, 1.0),
    ):
        if limit is not None:
            mean: Any = metrics.get(key)
            error: Any = errors.get(key)
            interval, usable = None, _usable(mean, largest)
            if usable and _usable(error):
                interval = max(0.0, mean - z * error), mean + z * error
            yield _check(name, mean, limit, usable, upper=True, interval=interval)
    if (most := limits.max_cross_split_duplicates) is not None:
        usable = _usable(duplicates, whole=True)
        yield _check("cross-split duplicates", duplicates, most, usable, upper=True)
    if limits.min_test_photos is not None:
        photos = metrics.get("n")
        yield _check("test photos", photos, limits.min_test_photos, _usable(photos, whole=True))


def _shares(
    metrics: Mapping[str, Any], limits: GateParams, labels: Sequence[str]
) -> Iterator[tuple[str, Any, Any, float | None]]:
    """Names, values, numbers of photos and limits of accuracies and recalls."""
    yield "accuracy", metrics.get("accuracy"), metrics.get("n"), limits.min_accuracy
    per_class, least = metrics.get("per_class"), limits.min_recall
    rows = [_mapping(row) for row in per_class] if isinstance(per_class, list) else []
    for label in labels:
        # A label that occurs twice counts as missing.
        found = [row for row in rows if row.get("label") == label]
        row = found[0] if len(found) == 1 else {}
        # An older release may have a label that no limit is named for today.
        limit = least.get(label, 1.0) if isinstance(least, dict) else least
        yield f"recall of {label}", row.get("recall"), row.get("support"), limit
    tested = _mapping(metrics.get("robustness"))
    accuracies, photos = _mapping(tested.get("accuracy")), tested.get("photos")
    for kind in CORRUPTIONS:
        limit = limits.min_robust_accuracy
        yield f"accuracy under {kind}", accuracies.get(kind), photos, limit


def _check(
    name: str,
    value: Any,
    limit: Number,
    usable: bool,
    *,
    upper: bool = False,
    interval: Interval | None = None,
    level: float | None = None,
) -> Check:
    """Check one value; with `level` its interval's lower bound must reach the limit."""
    detail = None
    if not usable:
        detail = "missing" if value is None else f"not a number in range: {value!r:.40}"
    elif level and interval is None:
        detail = "no interval: the number of photos is missing"
    if detail:
        return Check(name=name, value=None, limit=limit, passed=False, detail=detail)
    if interval:
        interval = round(interval[0], DIGITS), round(interval[1], DIGITS)
    reached = interval[0] if level and interval else value
    passed = reached <= limit if upper else reached >= limit
    if level and not passed:
        detail = (
            f"{shown(value)}, at {level:.0%} confidence at least {reached:.4f}, "
            f"misses the limit of {shown(limit)}"
        )
    return Check(
        name=name, value=value, limit=limit, interval=interval, passed=passed, detail=detail
    )


def _usable(value: Any, largest: float = LARGEST, whole: bool = False) -> bool:
    """Whether a value is a number from 0 to `largest`."""
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return bool(number and 0 <= value <= largest)


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}


if __name__ == "__main__":
    stage_main(run)

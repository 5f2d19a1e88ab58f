"""Stage: decide whether a model is good enough to be released; fails closed.

The stage writes `gate.json` and exits with 0 either way, so that `dvc repro` completes.
Whoever would publish the model reads `passed`.
"""

import math
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

LARGEST = 1e12
"""A loss or a count above this is broken."""

DEFAULT_CONFIDENCE = 0.95
"""Level of the intervals that are shown where `gate.confidence` is not set."""


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
        checks = [
            {key: value for key, value in check.model_dump().items() if key != "detail" or value}
            for check in self.checks
        ]
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
    """Check metrics against the limits; unusable values fail, and so does having no limit.

    Args:
        metrics: content of `metrics.json`.
        duplicates: number of test photos with a near-duplicate in training.
        labels: of the model.
    """
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
            interval = None
            if not _fault(value, 1.0) and not _fault(photos, LARGEST, integer=True) and photos:
                interval = wilson_interval(round(value * photos), photos, level)
            sure = limits.confidence if name == "accuracy" else None
            yield _check(name, value, limit, 1.0, interval=interval, level=sure)
    errors, z = _mapping(metrics.get("standard_errors")), float(norm.ppf((1 + level) / 2))
    for name, key, limit, largest in (
        ("loss", "loss", limits.max_loss, LARGEST),
        ("calibration error", "ece", limits.max_calibration_error, 1.0),
    ):
        if limit is not None:
            mean: Any = metrics.get(key)
            error: Any = errors.get(key)
            interval = None
            if not _fault(mean, LARGEST) and not _fault(error, LARGEST):
                interval = max(0.0, mean - z * error), mean + z * error
            yield _check(name, mean, limit, largest, upper=True, interval=interval)
    if (most := limits.max_cross_split_duplicates) is not None:
        yield _check("cross-split duplicates", duplicates, most, upper=True)
    if limits.min_test_photos is not None:
        yield _check("test photos", metrics.get("n"), limits.min_test_photos)


def _shares(
    metrics: Mapping[str, Any], limits: GateParams, labels: Sequence[str]
) -> Iterator[tuple[str, Any, Any, float | None]]:
    """Names, values, numbers of photos and limits of accuracies and recalls."""
    yield "accuracy", metrics.get("accuracy"), metrics.get("n"), limits.min_accuracy
    rows, least = _rows_by_label(metrics.get("per_class")), limits.min_recall
    for label in labels:
        row = rows.get(label, {})
        # An older release may have a label that no limit is named for today: it fails.
        limit = least.get(label, 1.0) if isinstance(least, dict) else least
        yield f"recall of {label}", row.get("recall"), row.get("support"), limit
    found = _mapping(metrics.get("robustness"))
    accuracies, photos = _mapping(found.get("accuracy")), found.get("photos")
    for kind in CORRUPTIONS:
        limit = limits.min_robust_accuracy
        yield f"accuracy under {kind}", accuracies.get(kind), photos, limit


def _check(
    name: str,
    value: Any,
    limit: Number,
    largest: float | None = None,
    *,
    upper: bool = False,
    interval: Interval | None = None,
    level: float | None = None,
) -> Check:
    """Check one value.

    Args:
        largest: possible value; None for a count.
        upper: whether the limit is an upper one.
        level: of the interval, where its lower bound must reach the limit.
    """
    detail = _fault(value, largest or LARGEST, integer=largest is None)
    if level and not detail and interval is None:
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


def _fault(value: Any, largest: float, integer: bool = False) -> str | None:
    if value is None:
        return "missing"
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        return f"not a {'whole ' if integer else ''}number: {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"not finite: {value!r}"
    if not 0 <= value <= largest:
        return f"out of range, 0 to {largest:g}"
    return None


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}


def _rows_by_label(per_class: Any) -> dict[str, Mapping[str, Any]]:
    """Scores by label; a label that occurs twice counts as missing."""
    rows = per_class if isinstance(per_class, list) else []
    rows = [row for row in rows if isinstance(row, Mapping) and isinstance(row.get("label"), str)]
    labels = [row["label"] for row in rows]
    return {row["label"]: row for row in rows if labels.count(row["label"]) == 1}


if __name__ == "__main__":
    stage_main(run)

"""Stage: decide whether a model is good enough to be released; fails closed.

The stage writes `gate.json` and exits with 0 either way, so that `dvc repro` completes.
Whoever would publish the model reads `passed`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tasks.data.dataset import INDEX
from tasks.io import read_json, write_json
from tasks.params import GateParams
from tasks.scoring.metrics import DIGITS, wilson_interval
from tasks.stage import Context

CORRUPTIONS = ("rotation", "brightness", "blur", "scale", "jpeg")
"""Kinds that the model must have been tested with; see `tasks.evaluate`."""
LARGEST = 1e12  # a loss or a count above this is broken
DEFAULT_CONFIDENCE = 0.95  # of the intervals that are shown where `gate.confidence` is not set

_log = logging.getLogger(__name__)

Check = dict[str, Any]
"""Name, value, limit, interval, passed, and for some a detail; no value where it is unusable."""


def run(context: Context, item: str | None = None) -> None:
    """Judge `metrics.json` and the index of the dataset; write the verdict, log what fails."""
    index, metrics = read_json(context.project.dataset / INDEX), read_json(context.project.metrics)
    params = context.params
    verdict = judge(metrics, _mapping(index).get("leaks"), params.gate, params.labels)
    write_json(context.project.gate, verdict)
    if verdict["reasons"]:
        _log.warning("The gate rejects the model: %s.", "; ".join(verdict["reasons"]))


def judge(
    metrics: Any, duplicates: Any, limits: GateParams, labels: Sequence[str]
) -> dict[str, Any]:
    """The content of `gate.json`; unusable values fail, and so does having no limit."""
    found = _checks(_mapping(metrics), duplicates, limits, labels)
    checks = [check for check in found if check is not None]
    if not checks:
        detail = "no limit is set; set at least one under gate in params.yaml"
        checks = [_failed("limits", None, detail)]
    reasons = [_describe(check) for check in checks if not check["passed"]]
    return {"passed": not reasons, "reasons": reasons, "checks": checks}


def _describe(failed: Check) -> str:
    name, value, limit = (failed[key] for key in ("name", "value", "limit"))
    if "detail" in failed:
        return f"{name}: {failed['detail']}"
    return f"{name} {shown(value)} {'<' if value < limit else '>'} {shown(limit)}"


def shown(value: float | None) -> str:
    """A number as tables show it."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _checks(
    metrics: Mapping[str, Any], duplicates: Any, limits: GateParams, labels: Sequence[str]
) -> Iterator[Check | None]:
    """Every check; None where it has no limit."""
    share = partial(_check, largest=1.0, level=limits.confidence or DEFAULT_CONFIDENCE)
    accuracy, n, sure = metrics.get("accuracy"), metrics.get("n"), limits.confidence is not None
    yield share("accuracy", accuracy, limits.min_accuracy, photos=n, sure=sure)
    per_class, least = metrics.get("per_class"), limits.min_recall
    rows = [_mapping(row) for row in per_class] if isinstance(per_class, list) else []
    for label in labels:
        # A label that occurs twice counts as missing.
        found = [row for row in rows if row.get("label") == label]
        row = found[0] if len(found) == 1 else {}
        # An older release may have a label that no limit is named for today.
        limit = least.get(label, 1.0) if isinstance(least, dict) else least
        yield share(f"recall of {label}", row.get("recall"), limit, photos=row.get("support"))
    tested = _mapping(metrics.get("robustness"))
    accuracies, photos = _mapping(tested.get("accuracy")), tested.get("photos")
    limit = limits.min_robust_accuracy
    for kind in CORRUPTIONS:
        yield share(f"accuracy under {kind}", accuracies.get(kind), limit, photos=photos)
    yield _check("loss", metrics.get("loss"), limits.max_loss, upper=True)
    worst, most = limits.max_calibration_error, limits.max_cross_split_duplicates
    yield _check("calibration error", metrics.get("ece"), worst, upper=True)
    yield _check("cross-split duplicates", duplicates, most, whole=True, upper=True)
    yield _check("test photos", n, limits.min_test_photos, whole=True)


def _check(
    name: str,
    value: Any,
    limit: float | None,
    largest: float = LARGEST,
    *,
    whole: bool = False,
    upper: bool = False,
    photos: Any = None,
    level: float = DEFAULT_CONFIDENCE,
    sure: bool = False,
) -> Check | None:
    """Check a value that has a limit, which, to be `sure`, its interval's lower bound must reach.

    A share of a number of `photos` has an interval.
    """
    if limit is None:
        return None
    if not _usable(value, largest, whole):
        fault = "missing" if value is None else f"not a number in range: {value!r:.40}"
        return _failed(name, limit, fault)
    counted = _usable(photos, whole=True) and photos
    if sure and not counted:
        return _failed(name, limit, "no interval: the number of photos is missing")
    bounds = wilson_interval(round(value * photos), photos, level) if counted else ()
    interval = tuple(round(bound, DIGITS) for bound in bounds) or None
    reached = interval[0] if sure and interval else value
    passed = reached <= limit if upper else reached >= limit
    check = {"name": name, "value": value, "limit": limit, "interval": interval, "passed": passed}
    if sure and not passed:
        least = f"{shown(value)}, at {level:.0%} confidence only {reached:.4f}"
        check["detail"] = f"{least} < {shown(limit)}"
    return check


def _failed(name: str, limit: float | None, detail: str) -> Check:
    unusable = {"value": None, "interval": None, "passed": False}
    return {"name": name, "limit": limit, **unusable, "detail": detail}


def _usable(value: Any, largest: float = LARGEST, whole: bool = False) -> bool:
    """Whether a value is a number from 0 to `largest`."""
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return bool(number and 0 <= value <= largest)


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}

"""Whether a model is good enough to leave this machine; fails closed.

The stage writes `gate.json` and exits with 0 either way, so that `dvc repro`
ends and shows the verdict; whoever would publish reads `passed`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.data.dataset import INDEX
from tasks.io import write_json
from tasks.params import LABELS, GateParams
from tasks.scoring.checks import (
    LARGEST,
    Check,
    at_least,
    at_most,
    count_at_least,
    count_at_most,
    mean_interval,
    share_interval,
    shown,
    shown_interval,
    surely_at_least,
)
from tasks.stage import Context, stage_main

DISTURBANCES = ("rotation", "brightness", "blur", "scale", "jpeg")
"""What the model must have been tried under; see `tasks.scoring.robustness`."""

_USUAL_LEVEL = 0.95
"""Confidence of the intervals that are shown where `gate.confidence` is not set."""


class Verdict(BaseModel):
    """The gate's answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passed: bool
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line for each check that failed."""
        return tuple(check.told for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `detail` only where there is one."""
        checks = [
            {key: value for key, value in check.model_dump().items() if key != "detail" or value}
            for check in self.checks
        ]
        return {"passed": self.passed, "checks": checks}


def run(context: Context, item: str | None = None) -> None:
    """Judge `metrics.json` and the dataset's leaks; write and print the verdict."""
    project = context.project
    leaks = _read(project.dataset / INDEX).get("leaks")
    verdict = judge(_read(project.metrics), leaks, context.params.gate)
    write_json(project.gate, verdict.to_json())
    Console().print(verdict_table(verdict))


def judge(metrics: Mapping[str, Any], leaks: Any, limits: GateParams) -> Verdict:
    """Hold metrics against the limits.

    A value that is missing, null, NaN, infinite, not a number (a string, a
    boolean) or out of its range fails its check, and so does the whole when no
    limit is set.

    Args:
        metrics: content of `metrics.json`, see `tasks.scoring.metrics.Scores`.
        leaks: number of test photos with a twin that training still sees.
        limits: the `gate` section of `params.yaml`.

    Returns:
        The verdict, with one check for each limit and class.
    """
    if not isinstance(metrics, Mapping):
        metrics = {}
    checks = [
        *_accuracy(metrics, limits),
        *_recalls(metrics, limits),
        *_robust(metrics, limits),
        *_errors(metrics, limits),
        *_counts(metrics, leaks, limits),
    ]
    if not checks:
        detail = "no limit is set; name at least one under gate in params.yaml"
        checks.append(Check(name="limits", value=None, limit=None, passed=False, detail=detail))
    return Verdict(passed=all(check.passed for check in checks), checks=tuple(checks))


def _accuracy(metrics: Mapping[str, Any], limits: GateParams) -> Iterator[Check]:
    limit, value = limits.min_accuracy, metrics.get("accuracy")
    if limit is None:
        return
    interval = share_interval(value, metrics.get("n"), _level(limits))
    if limits.confidence is None:
        yield at_least("accuracy", value, limit, 1.0, interval)
    else:
        yield surely_at_least("accuracy", value, limit, interval, limits.confidence)


def _recalls(metrics: Mapping[str, Any], limits: GateParams) -> Iterator[Check]:
    if limits.min_recall is None:
        return
    rows = _by_label(metrics.get("per_class"))
    for label in LABELS:
        limit = limits.min_recall
        row = rows.get(label, {})
        value = row.get("recall")
        interval = share_interval(value, row.get("support"), _level(limits))
        least = limit[label] if isinstance(limit, dict) else limit
        yield at_least(f"recall of {label}", value, least, 1.0, interval)


def _robust(metrics: Mapping[str, Any], limits: GateParams) -> Iterator[Check]:
    if limits.min_robust_accuracy is None:
        return
    found = _section(metrics, "robustness")
    accuracy = _section(found, "accuracy")
    for kind in DISTURBANCES:
        value = accuracy.get(kind)
        interval = share_interval(value, found.get("photos"), _level(limits))
        name = f"accuracy under {kind}"
        yield at_least(name, value, limits.min_robust_accuracy, 1.0, interval)


def _errors(metrics: Mapping[str, Any], limits: GateParams) -> Iterator[Check]:
    spread = _section(metrics, "standard_errors")
    if limits.max_loss is not None:
        loss = metrics.get("loss")
        interval = mean_interval(loss, spread.get("loss"), _level(limits))
        yield at_most("loss", loss, limits.max_loss, LARGEST, interval)
    if limits.max_calibration_error is not None:
        ece = metrics.get("ece")
        interval = mean_interval(ece, spread.get("ece"), _level(limits))
        yield at_most("calibration error", ece, limits.max_calibration_error, 1.0, interval)


def _counts(metrics: Mapping[str, Any], leaks: Any, limits: GateParams) -> Iterator[Check]:
    if limits.max_cross_split_duplicates is not None:
        yield count_at_most("leaks", leaks, limits.max_cross_split_duplicates)
    if limits.min_test_photos is not None:
        yield count_at_least("test photos", metrics.get("n"), limits.min_test_photos)


def verdict_table(verdict: Verdict) -> Table:
    """The verdict as a table for a terminal."""
    colour = "green" if verdict.passed else "red"
    title = f"Gate: [bold {colour}]{'passed' if verdict.passed else 'failed'}[/]"
    table = Table("check", title=title, title_justify="left", caption_justify="left")
    for heading in ("value", "limit", "interval"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for check in verdict.checks:
        words = Text("passed", "green") if check.passed else Text("failed", "red")
        words.append(f" {check.detail}" if check.detail else "", "default")
        table.add_row(check.name, *_cells(check), words)
    return table


def _cells(check: Check) -> tuple[str, str, str]:
    return shown(check.value), shown(check.limit), shown_interval(check.interval)


def _level(limits: GateParams) -> float:
    return limits.confidence or _USUAL_LEVEL


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def _by_label(per_class: Any) -> dict[str, Mapping[str, Any]]:
    """Scores by label; a label that stands there twice counts as missing."""
    rows = per_class if isinstance(per_class, list) else []
    rows = [row for row in rows if isinstance(row, Mapping) and isinstance(row.get("label"), str)]
    named = [row["label"] for row in rows]
    return {row["label"]: row for row in rows if named.count(row["label"]) == 1}


def _read(path: Path) -> dict[str, Any]:
    """A file that cannot be read says nothing, and what is missing fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    stage_main(run)

"""Whether a model is good enough to leave this machine; fails closed.

The stage writes `gate.json` and exits with 0 either way, so that `dvc repro`
ends and shows the verdict; whoever would publish reads `passed`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.dataset import INDEX
from tasks.labels import LABELS
from tasks.params import GateParams
from tasks.stage import Context, stage_main
from tasks.whole import write_json

Number = int | float

_LARGEST = 1e12
"""No loss and no count is larger; what is, is broken."""


class Check(BaseModel):
    """One limit and what was found; `value` is null where it is unusable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    value: Number | None
    limit: Number | None
    passed: bool
    detail: str | None = None


class Verdict(BaseModel):
    """The gate's answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passed: bool
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line for each check that failed."""
        return tuple(
            f"{check.name}: {check.detail or _told(check)}"
            for check in self.checks
            if not check.passed
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `detail` only where there is one."""
        checks = [
            {key: value for key, value in check.model_dump().items() if key != "detail" or value}
            for check in self.checks
        ]
        return {"passed": self.passed, "checks": checks}


def run(context: Context, item: str | None = None) -> None:
    """Judge `metrics.json` and the dataset's leaks; write and print the verdict."""
    layout = context.layout
    leaks = _read(layout.dataset / INDEX).get("leaks")
    verdict = judge(_read(layout.metrics), leaks, context.params.gate)
    write_json(layout.gate, verdict.to_json())
    Console().print(verdict_table(verdict))


def judge(metrics: Mapping[str, Any], leaks: Any, limits: GateParams) -> Verdict:
    """Hold metrics against the limits.

    A value that is missing, null, NaN, infinite, not a number (a string, a
    boolean) or out of its range fails its check, and so does the whole when no
    limit is set.

    Args:
        metrics: content of `metrics.json`, see `tasks.metrics.Scores`.
        leaks: number of test photos with a twin that training still sees.
        limits: the `gate` section of `params.yaml`.

    Returns:
        The verdict, with one check for each limit and class.
    """
    if not isinstance(metrics, Mapping):
        metrics = {}
    checks: list[Check] = []
    if limits.min_accuracy is not None:
        checks.append(_at_least("accuracy", metrics.get("accuracy"), limits.min_accuracy, 1.0))
    if limits.min_recall is not None:
        recalls = _recalls(metrics.get("per_class"))
        checks += [
            _at_least(f"recall of {label}", recalls.get(label), limits.min_recall, 1.0)
            for label in LABELS
        ]
    if limits.max_loss is not None:
        checks.append(_at_most("loss", metrics.get("loss"), limits.max_loss, _LARGEST))
    if limits.max_calibration_error is not None:
        ece = metrics.get("ece")
        checks.append(_at_most("calibration error", ece, limits.max_calibration_error, 1.0))
    if limits.max_leaks is not None:
        checks.append(_at_most("leaks", leaks, limits.max_leaks, _LARGEST, whole=True))
    if limits.min_test_photos is not None:
        least = limits.min_test_photos
        checks.append(_at_least("test photos", metrics.get("n"), least, _LARGEST, whole=True))
    if not checks:
        detail = "no limit is set; name at least one under gate in params.yaml"
        checks.append(Check(name="limits", value=None, limit=None, passed=False, detail=detail))
    return Verdict(passed=all(check.passed for check in checks), checks=tuple(checks))


def verdict_table(verdict: Verdict) -> Table:
    """The verdict as a table for a terminal."""
    colour = "green" if verdict.passed else "red"
    title = f"Gate: [bold {colour}]{'passed' if verdict.passed else 'failed'}[/]"
    table = Table("check", title=title, title_justify="left", caption_justify="left")
    for heading in ("value", "limit"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for check in verdict.checks:
        words = Text("passed", "green") if check.passed else Text("failed", "red")
        words.append(f" {check.detail}" if check.detail else "", "default")
        table.add_row(check.name, _shown(check.value), _shown(check.limit), words)
    return table


def _at_least(name: str, value: Any, limit: Number, highest: float, whole: bool = False) -> Check:
    fault = _fault(value, highest, whole)
    if fault:
        return Check(name=name, value=None, limit=limit, passed=False, detail=fault)
    return Check(name=name, value=value, limit=limit, passed=value >= limit)


def _at_most(name: str, value: Any, limit: Number, highest: float, whole: bool = False) -> Check:
    fault = _fault(value, highest, whole)
    if fault:
        return Check(name=name, value=None, limit=limit, passed=False, detail=fault)
    return Check(name=name, value=value, limit=limit, passed=value <= limit)


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


def _recalls(per_class: Any) -> dict[str, Any]:
    """Recall by label; a label that stands there twice counts as missing."""
    rows = per_class if isinstance(per_class, list) else []
    rows = [row for row in rows if isinstance(row, Mapping) and isinstance(row.get("label"), str)]
    named = [row["label"] for row in rows]
    return {row["label"]: row.get("recall") for row in rows if named.count(row["label"]) == 1}


def _read(path: Path) -> dict[str, Any]:
    """A file that cannot be read says nothing, and what is missing fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _told(check: Check) -> str:
    return f"{_shown(check.value)} misses the limit of {_shown(check.limit)}"


def _shown(value: Number | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    stage_main(run)

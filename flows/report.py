"""The report of a run: `artifacts/run.json`, made of what the stages wrote."""

import json
import logging
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from tasks.errors import StageError
from tasks.io import read_json, write_json
from tasks.params import Params
from tasks.project import Project

Status = Literal["promoted", "registered", "rejected", "unchanged", "failed", "cancelled"]

RUNS = "runs.jsonl"

_log = logging.getLogger(__name__)


class DataReport(BaseModel, extra="forbid"):
    version: str = ""
    train: int = 0
    val: int = 0
    test: int = 0
    synthetic: int = 0
    quarantined: int = 0
    duplicates: int = 0
    leaks: int = 0
    changes: dict[str, Any] | None = None

    def describe(self) -> str:
        """The counts in one line."""
        text = f"{self.train} train, {self.val} val, {self.test} test"
        text += f"; {self.synthetic} synthetic hands" if self.synthetic else ""
        if changes := self.changes:
            since = f"version {changes['since']}" if changes["since"] else "the beginning"
            text += f"; {changes['added']} added, {changes['removed']} removed since {since}"
        return text


class TestReport(BaseModel, extra="forbid"):
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    loss: float | None = None
    auc: float | None = None
    ece: float | None = None
    per_class: list[dict[str, Any]] = []
    robustness: dict[str, Any] = {}


class GateReport(BaseModel, extra="forbid"):
    passed: bool = False
    reasons: list[str] = []
    checks: list[dict[str, Any]] = []

    def describe_failures(self, most: int = 5) -> str:
        """Why it rejects the model; with many labels not all of the reasons."""
        more = [f"{len(self.reasons) - most} more"] if len(self.reasons) > most else []
        return "; ".join(self.reasons[:most] + more)


class ModelReport(BaseModel, extra="forbid"):
    name: str
    version: int | None = None
    alias: str | None = None


class RunReport(BaseModel, extra="forbid"):
    """Content of `run.json`; a part that was not reached keeps its empty value."""

    status: Status = "failed"
    reason: str = ""
    data: DataReport = DataReport()
    phases: list[dict[str, Any]] = []
    test: TestReport = TestReport()
    gate: GateReport = GateReport()
    comparison: dict[str, Any] | None = None
    model: ModelReport
    release: dict[str, str | None] = {"id": None, "uri": None}
    features: dict[str, Any] = {"views": 0, "computed": 0, "reused": 0, "images_per_second": 0.0}
    seconds: dict[str, float] = {}

    def headline(self) -> str:
        """The outcome in a few words, such as `v4 promoted: 0.982 -> 0.991, +84 photos`."""
        if self.status in ("unchanged", "cancelled"):
            return self.status
        if self.status == "rejected":
            return f"rejected: {self.gate.describe_failures(2)}"
        if self.status == "failed":
            return f"failed: {self.reason}"
        verb = "promoted" if self.status == "promoted" else "stays challenger"
        facts = []
        if self.comparison:
            before, after = self.comparison["champion"], self.comparison["challenger"]
            facts.append(f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}")
        elif self.test.accuracy is not None:
            facts.append(f"accuracy {self.test.accuracy:.3f}")
        if (changes := self.data.changes) and changes["since"]:
            for sign, number in (("+", changes["added"]), ("-", changes["removed"])):
                facts += [f"{sign}{number} photos"] if number else []
        return f"v{self.model.version} {verb}: {', '.join(facts)}"

    def facts(self) -> dict[str, str]:
        """What happened, how good it is and compared with what, for terminal and UI."""
        facts, test, new = {"why": self.reason}, self.test, self.status != "unchanged"
        if self.phases and new:
            spent = [f"{p['name']} {p['seconds']:.0f} s" for p in self.phases if p["seconds"]]
            facts["photos"] = self.data.describe()
            facts["trained"] = ", ".join(spent) or "restored; nothing changed for training"
        if test.accuracy is not None:
            low, high = test.accuracy_interval or (0.0, 1.0)
            scores = {"loss": test.loss, "AUC": test.auc, "ECE": test.ece}
            more = [f", {name} {value:.4f}" for name, value in scores.items() if value is not None]
            facts["test"] = f"accuracy {test.accuracy:.4f} ({low:.3f} to {high:.3f}){''.join(more)}"
        if self.gate.checks:
            passed = f"passed, {len(self.gate.checks)} checks"
            failed = f"failed: {self.gate.describe_failures()}"
            facts["gate"] = passed if self.gate.passed else failed
        if found := self.comparison:
            before, after = found["champion"], found["challenger"]
            moved = [f"{k} {before[k]:.4f} -> {after[k]:.4f}" for k in ("accuracy", "loss")]
            photos = f"{before['n']} photos, {found['won']} won, {found['lost']} lost"
            facts["champion"] = f"{', '.join(moved)} on the same {photos}"
        if self.model.version is not None:
            alias = f" ({self.model.alias})" if self.model.alias else ""
            facts["model"] = f"{self.model.name} version {self.model.version}{alias}"
        if (uri := self.release["uri"]) and new:
            facts["release"] = uri
        if "total" in self.seconds:
            facts["took"] = f"{self.seconds['total']:.0f} s"
        return facts


def write_report(report: RunReport, project: Project) -> None:
    """Write `run.json`; log, don't raise, so that the first cause is the one reported."""
    try:
        write_json(project.run, report.model_dump(mode="json"))
    except OSError as error:
        _log.warning("artifacts/run.json cannot be written (%s).", error.strerror or error)


def log_run(report: RunReport, project: Project) -> None:
    """Append how a run ended to `.local/runs.jsonl`; log, don't raise."""
    entry = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": report.headline(),
        "status": report.status,
        "reason": report.reason,
    }
    try:
        with (project.local / RUNS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        _log.warning("`handsigns runs` will not show this run (%s).", error.strerror or error)


def logged_runs(project: Project) -> list[dict[str, str]]:
    """How the runs of this checkout ended, oldest first; damaged lines are left out."""
    entries = []
    with suppress(FileNotFoundError), (project.local / RUNS).open(errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def read_output(path: Path) -> Any:
    """Read what a stage wrote."""
    content = read_json(path)
    if content is None:
        raise StageError(f"A stage's output '{path}' cannot be read. Remove it and run again.")
    return content


def quarantined(project: Project) -> int:
    return len((read_json(project.quarantine / "quarantine.json") or {}).get("files", []))


def data_changes(project: Project, former: Any, since: int | None) -> dict[str, Any]:
    """Compare the photos of this run with `former`, the `dataset.json` of champion `since`."""
    index = read_output(project.dataset_index)
    before, now = (
        {photo["name"]: photo["label"] for photo in one["photos"]}
        for one in (former or {"photos": []}, index)
    )
    added, removed = now.keys() - before.keys(), before.keys() - now.keys()
    counts = {
        "before": Counter(before.values()),
        "added": Counter(now[name] for name in added),
        "removed": Counter(before[name] for name in removed),
        "now": Counter(now.values()),
    }
    labels = dict.fromkeys([*index["labels"], *sorted(before.values())])
    return {
        "since": since,
        "added": len(added),
        "removed": len(removed),
        "relabelled": sum(before[name] != now[name] for name in before.keys() & now.keys()),
        "per_class": {k: {name: count[k] for name, count in counts.items()} for k in labels},
    }


def histories(project: Project, params: Params) -> list[dict[str, Any]]:
    """Learning curves of the phases, in order."""
    return [read_output(project.history(name)) for name in params.phases]


def read_stages(
    project: Project, params: Params, report: RunReport, outcomes: dict[str, str]
) -> None:
    """Fill a report with what the stages found; `report.seconds` has their times already."""
    index, data = read_output(project.dataset_index), report.data
    splits = Counter(photo["split"] for photo in index["photos"])
    data.train, data.val, data.test = (splits[name] for name in ("train", "val", "test"))
    data.synthetic = len(index["labels"]) * index["synthetic"]
    data.duplicates, data.leaks = read_output(project.audit)["duplicates"], index["leaks"]
    computed = read_json(project.features_report) if outcomes["features"] == "ran" else None
    report.features |= computed or {"views": params.features.augmented_copies}
    for history in histories(project, params):
        stage = f"train@{history['phase']}"
        phase = {"name": history["phase"], "images": history["images"]}
        phase["epochs"] = len(history["epochs"])
        phase["seconds"] = report.seconds[stage] if outcomes[stage] == "ran" else 0.0
        phase |= {name: history[name] for name in ("val_accuracy", "val_loss")}
        report.phases.append(phase)
    metrics = read_output(project.metrics)
    report.test = TestReport(**{name: metrics[name] for name in TestReport.model_fields})
    report.gate = GateReport(**read_output(project.gate))

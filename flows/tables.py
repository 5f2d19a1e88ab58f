"""What each verb shows a person."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.output import Listing
from tasks.params import LABELS

if TYPE_CHECKING:
    from flows.local.stack import Running
    from flows.report import RunReport
    from tasks.data.importer import ImportReport

MAX_FILES = 20
"""Files named one by one; `--json` names all."""


def import_listing(report: "ImportReport", version: str) -> Listing:
    """Photos by split and sign, and the files that were set aside."""
    rows = []
    for title, counts in (("taken", report.taken), ("already there", report.already_there)):
        for split in sorted({split for split, _ in counts}):
            row = [counts.get((split, label), 0) for label in LABELS]
            rows.append([title, split, *map(str, row), str(sum(row))])
    empty = [""] * len(LABELS)
    if report.removed:
        rows.append(["removed", "", *empty, str(report.removed)])
    rows += [["set aside", kind, *empty, str(n)] for kind, n in report.kinds().items()]
    notes = _first([f"{file.origin}: {file.reason}" for file in report.quarantined])
    if len(report.quarantined) > MAX_FILES:
        notes.append("All of them: artifacts/quarantine/quarantine.json")
    notes.append(f"data/ is version {version}.")
    return Listing("Photos", rows, ("import", "", *LABELS, "all"), notes)


def service_listing(running: "Running", fresh: bool) -> Listing:
    """Where each part of the service answers."""
    parts = {
        "Prefect": (running.prefect or "").removesuffix("/api"),
        "MLflow": running.mlflow,
        "S3": running.s3,
    }
    rows = [(name, address or "as the environment says") for name, address in parts.items()]
    rows += [
        ("database", running.database or "SQLite in .local/"),
        ("logs", ".local/logs/"),
        ("login", "in .local/credentials.json, for what is started here"),
    ]
    notes = ["handsigns status, predict and retrain use it. To stop it: make down"]
    return Listing("Service" if fresh else "Service, already up", rows, notes=notes)


def retrain_listing(report: "RunReport") -> Listing:
    """What happened, how good it is, compared with what, and what to do next."""
    rows = [("why", report.reason)]
    if report.phases and report.status != "unchanged":
        rows += _training_rows(report)
    rows += _result_rows(report)
    if report.release.uri and report.status != "unchanged":
        rows.append(("release", report.release.uri))
    if "total" in report.seconds:
        rows.append(("took", f"{report.seconds['total']:.0f} s"))
    return Listing(f"Retrain: {report.status}", rows, notes=_next_steps(report))


def _training_rows(report: "RunReport") -> list[tuple[str, str]]:
    data, features = report.data, report.features
    counts = f"{data.train} train, {data.val} val, {data.test} test"
    if changes := data.changes:
        since = f"version {changes.since}" if changes.since else "the beginning"
        counts += f"; {changes.added} added, {changes.removed} removed since {since}"
    rows = [("photos", counts)]
    if data.quarantined or data.duplicates:
        aside = f"{data.quarantined} files set aside, {data.duplicates} duplicates"
        rows.append(("", aside))
    if features.computed or features.reused:
        rows.append(("features", f"{features.computed} computed, {features.reused} reused"))
    for phase in report.phases:
        seconds = f"{phase.seconds:.1f} s" if phase.seconds else "restored"
        scores = f"val accuracy {phase.val_accuracy:.4f}, loss {phase.val_loss:.4f}"
        rows.append(
            (phase.name, f"{phase.images} images, {phase.epochs} epochs, {seconds}: {scores}")
        )
    return rows


def _result_rows(report: "RunReport") -> list[tuple[str, str]]:
    rows = []
    test = report.test
    if test.accuracy is not None:
        low, high = test.accuracy_interval or (0.0, 1.0)
        scores = ", ".join(
            f"{name} {_number(value)}"
            for name, value in (("loss", test.loss), ("AUC", test.auc), ("ECE", test.ece))
        )
        rows.append(("test", f"accuracy {test.accuracy:.4f} ({low:.3f} to {high:.3f}), {scores}"))
    if report.gate.checks:
        failed = [failed_check(check) for check in report.gate.checks if not check["passed"]]
        passed = f"passed, {len(report.gate.checks)} checks"
        rows.append(("gate", f"failed: {'; '.join(failed)}" if failed else passed))
    if found := report.comparison:
        before, after = found["champion"], found["challenger"]
        rows.append(
            (
                "champion",
                f"accuracy {before['accuracy']:.4f} -> {after['accuracy']:.4f}, "
                f"loss {before['loss']:.4f} -> {after['loss']:.4f} on the same {before['n']} "
                f"photos; {found['won']} won, {found['lost']} lost",
            )
        )
    if report.model.version is not None:
        alias = f" ({report.model.alias})" if report.model.alias else ""
        rows.append(("model", f"{report.model.name} version {report.model.version}{alias}"))
    return rows


def failed_check(check: Mapping[str, Any]) -> str:
    """A failed check of the gate with its numbers: 'accuracy 0.963 < 0.990'."""
    value, limit, interval = check["value"], check["limit"], check.get("interval")
    if value is None or limit is None:
        return f"{check['name']}: {check.get('detail') or 'no value'}"
    if interval and interval[0] < limit <= value:
        sure = f"surely only {_number(interval[0])} < {_number(limit)}"
        return f"{check['name']} {_number(value)}, {sure}"
    return f"{check['name']} {_number(value)} {'<' if value < limit else '>'} {_number(limit)}"


def _next_steps(report: "RunReport") -> list[str]:
    number = report.model.version
    steps = {
        "promoted": [
            "Try it: handsigns predict PHOTO, or handsigns serve",
            "Plots: artifacts/plots/   Report: artifacts/run.json",
        ],
        "registered": [
            "Plots: artifacts/plots/   Report: artifacts/run.json",
            f"To promote it all the same: handsigns promote {number} --force --reason WHY",
        ],
        "rejected": [
            "Nothing was published. Misread photos: artifacts/plots/mistakes.png",
            "Add photos of the weak signs and run again, or change gate in params.yaml",
        ],
    }
    return steps.get(report.status, [])


def status_listing(found: Mapping[str, Any]) -> Listing:
    """Where the checkout and its services stand."""
    rows = [
        ("data", f"{found['data']['version']} ({found['data']['source']})"),
        ("out of date", ", ".join(found["stale"]) or "nothing"),
    ]
    for role in ("champion", "challenger"):
        held = found[role]
        forced = ", FORCED" if held and held.get("overruled") else ""
        rows.append((role, f"version {held['version']}{forced}, {held['uri']}" if held else "none"))
    rows.append(("signatures", found["signatures"]))
    rows += [("moved", move["told"]) for move in found["history"][-5:]]
    return Listing("Status", rows)


def scores_listing(result: Mapping[str, Any]) -> Listing:
    """Scores on labelled photos, sign by sign."""
    low, high = result["accuracy_interval"]
    title = (
        f"{result['model']}: accuracy {result['accuracy']:.4f} ({low:.3f} to {high:.3f}) on "
        f"{result['n']} photos, loss {result['loss']:.4f}, AUC {_number(result['auc'])}, "
        f"ECE {result['ece']:.4f}"
    )
    rows = [
        [
            row["label"],
            *(_share(row[name]) for name in ("precision", "recall", "f1")),
            str(row["support"]),
        ]
        for row in result["per_class"]
    ]
    notes = _first([f"{file['file']}: {file['error']}" for file in result["unreadable"]])
    return Listing(title, rows, ("sign", "precision", "recall", "F1", "photos"), notes)


def predictions_listing(predictions: Sequence[Mapping[str, Any]], model: str) -> Listing:
    """The sign read in each photo, and the probability of each."""
    rows = []
    for found in predictions:
        if "error" in found:
            rows.append([found["file"], "-", found["error"]])
        else:
            shares = [f"{found['probabilities'][label]:.3f}" for label in LABELS]
            rows.append([found["file"], found["label"], *shares])
    return Listing(model, rows, ("photo", "sign", *LABELS))


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_FILES
    return [*lines[:MAX_FILES], *([f"and {more} more"] if more > 0 else [])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

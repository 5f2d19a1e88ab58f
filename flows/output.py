"""The terminal: results, messages, progress, and no output of libraries."""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tasks.errors import HandsignsError
from tasks.stage import redirect_output

if TYPE_CHECKING:
    from flows.local.stack import Running
    from flows.report import RunReport
    from flows.workspace import Workspace
    from tasks.data.importer import ImportReport
    from tasks.project import Project
    from tasks.releases.comparison import Comparison
    from tasks.stage import Progress

_log = logging.getLogger(__name__)
# In a file each row of a table is one line, for grep.
out = Console(width=None if sys.stdout.isatty() else 100_000)
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

SECONDS_BETWEEN_LINES = 10.0
"""How often a long step writes a line where there is no terminal."""
MAX_COLUMNS = 12
"""Labels that a table has a column for."""
MAX_LABELS = 30
"""Labels that are listed with their photos."""
MAX_FILES = 20
"""Files named one by one; `--json` names all."""


def open_project() -> "Project":
    """The checkout in the working directory; from here on libraries print to its log."""
    from tasks.project import Project

    project = Project(Path.cwd())
    if not (project.root / "dvc.yaml").is_file():
        raise HandsignsError(
            f"'{project.root}' is not a checkout of handsigns: it has no dvc.yaml. "
            "Change to the checkout's root."
        )
    capture_libraries(project.local / "logs" / f"{sys.argv[1]}.log")
    return project


def open_workspace() -> "Workspace":
    """The checkout and its services; none of them is started yet."""
    project = open_project()
    from flows.settings import load_settings
    from flows.workspace import Workspace

    return Workspace(project, load_settings())


def capture_libraries(log: Path) -> None:
    """Send what libraries print to a file from here on; `out` and `err` keep the terminal."""
    for console, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        copy = os.dup(stream.fileno())
        console.file = os.fdopen(copy, "w", 1, stream.encoding, errors="backslashreplace")
    redirect_output(log)


class _MessageHandler(logging.Handler):
    """Prints log messages as plain lines, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
        if record.exc_info:
            traceback.print_exception(record.exc_info[1])  # into the log of this verb


def show_messages() -> None:
    """Print the messages of this project on standard error, and warnings of the web server."""
    for name, level in (("flows", "INFO"), ("tasks", "INFO"), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.addHandler(_MessageHandler())
        logger.setLevel(level)


def say(message: str) -> None:
    """Print a message on one line of standard error."""
    err.print(" ".join(message.split()), highlight=False, markup=False, soft_wrap=True)


@dataclass
class Listing:
    """A titled table, with a header where the columns need one, and notes below."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    notes: Sequence[str] = ()


def echo(as_json: bool, content: Any, shown: str | Listing) -> None:
    """Print a result, for a script or for a person."""
    if as_json:
        out.file.write(json.dumps(content, indent=1) + "\n")
        out.file.flush()
    elif isinstance(shown, str):
        _print_line(shown)
    else:
        out.print(Text(shown.title, "bold"), soft_wrap=True)
        _print_table(shown)
        for note in shown.notes:
            _print_line(note)


def _print_table(listing: Listing) -> None:
    from rich import box
    from rich.table import Column, Table

    columns = listing.header or [""] * max(map(len, listing.rows), default=0)
    table = Table(
        *(Column(title, overflow="fold") for title in columns),
        box=box.SIMPLE_HEAD if listing.header and out.is_terminal else None,
        show_header=bool(listing.header),
    )
    for row in listing.rows:
        table.add_row(*map(Text, row))
    out.print(table)


def _print_line(line: str) -> None:
    out.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def shown_progress() -> Iterator["Progress"]:
    """Show a bar while a step takes long, or a line now and then where there is no terminal."""
    if not err.is_terminal:
        yield progress_lines()
        return
    from rich import progress as rich

    columns = rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()
    # Rich would take what stages print from the log of this verb to the terminal.
    with rich.Progress(
        "{task.description}",
        *columns,
        console=err,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bars:
        bar, shown = bars.add_task("", visible=False), ""

        def progress(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                bars.reset(bar, description=what)
                shown = what
            bars.update(bar, completed=done, total=total, visible=done < total)

        yield progress


def progress_lines() -> "Progress":
    """Log how far a step is every ten seconds, and how long a long one took."""
    steps: dict[str, tuple[float, float]] = {}  # when each began, and was last mentioned

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began, mentioned = steps.setdefault(what, (now, now))
        if done >= total:
            del steps[what]
            if now - began >= 1:
                _log.info("%s: %d/%d in %.0f s", what, done, total, now - began)
        elif now - mentioned >= SECONDS_BETWEEN_LINES:
            steps[what] = began, now
            _log.info("%s: %d/%d", what, done, total)

    return progress


def import_listing(report: "ImportReport", version: str) -> Listing:
    """Photos by split, and the files that were set aside."""
    rows = []
    for title, counts in (("taken", report.imported), ("already there", report.already_there)):
        for split in sorted({split for split, _ in counts}):
            labels = {label: number for (place, label), number in counts.items() if place == split}
            each = ", ".join(f"{label}: {number}" for label, number in sorted(labels.items()))
            if len(labels) > MAX_LABELS:
                each = f"{min(labels.values())} to {max(labels.values())} for {len(labels)} labels"
            rows.append([title, split, str(sum(labels.values())), each])
    rows += [["set aside", kind, str(number), ""] for kind, number in report.kinds().items()]
    rows += [["removed", "", str(report.removed), ""]] if report.removed else []
    notes = [f"{file.origin}: {file.reason}" for file in report.quarantined[:MAX_FILES]]
    if len(report.quarantined) > MAX_FILES:
        notes.append("The others: artifacts/quarantine/quarantine.json")
    notes.append(f"data/ is version {version}.")
    return Listing("Photos", rows, ("import", "", "photos", "by label"), notes)


def service_listing(running: "Running", fresh: bool) -> Listing:
    """Where each part of the service answers."""
    elsewhere = "as the environment says"
    rows = [
        ("Prefect", (running.prefect or elsewhere).removesuffix("/api")),
        ("MLflow", running.mlflow or elsewhere),
        ("S3", running.s3 or elsewhere),
        ("database", running.database or "SQLite in .local/"),
        ("logs", ".local/logs/"),
        ("login", "in .local/credentials.json, for what is started here"),
    ]
    notes = ["handsigns status, predict and retrain use it. To stop it: make down"]
    return Listing("Service" if fresh else "Service, already up", rows, notes=notes)


NEXT_STEPS = {
    "promoted": "Try it: handsigns predict PHOTO, or handsigns serve",
    "registered": "To promote it anyway: handsigns promote {version} --force --reason WHY",
    "rejected": "Nothing was published. Add photos of the weak classes, or change gate in "
    "params.yaml; misread photos are in artifacts/plots/mistakes.png",
}


def retrain_listing(report: "RunReport") -> Listing:
    """What happened, how good it is, compared with what, and what to do next."""
    notes = []
    if step := NEXT_STEPS.get(report.status):
        places = "Plots: artifacts/plots/   Report: artifacts/run.json"
        notes = [step.format(version=report.model.version), places]
    return Listing(f"Retrain: {report.status}", report.facts(), notes=notes)


def status_listing(found: Mapping[str, Any], verbose: bool) -> Listing:
    """Where the checkout and its services stand; hashes only if `verbose`."""
    data = found["data"]["version"] or "no version"
    rows = [
        ("data", f"{data if verbose else data[:8]} ({found['data']['source']})"),
        ("out of date", ", ".join(found["stale"]) or "nothing"),
    ]
    for role in ("champion", "challenger"):
        text = "none"
        if version := found[role]:
            scores = "accuracy {}, loss {}, {} photos, made {}".format(*_scores(version))
            text = f"version {version['version']}: {scores}"
            text += ", FORCED" if version.get("overruled") else ""
            text += f", {version['uri']}" if verbose else ""
        rows.append((role, text))
    if last := found["last_run"]:
        rows.append(("last run", f"{last['status']}: {last['reason']}"))
    up = found["service"] and f"up; Prefect {found['service']['prefect']}"
    rows.append(("service", up or "not up; handsigns up starts it, with the schedule"))
    rows.append(("signatures", found["signatures"]))
    return Listing("Status", [*rows, *(("moved", one["told"]) for one in found["history"][-5:])])


def versions_listing(versions: Sequence[Mapping[str, Any]]) -> Listing:
    """Every registered version, with its scores and its part in the champion's history."""
    rows = []
    for one in versions:
        promoted = [f"promoted {at[:10]}" for at in one["promoted"][-1:]]
        state = [*one["aliases"], *promoted, *(["FORCED"] if one["forced"] else [])]
        rows.append([str(one["version"]), *_scores(one), ", ".join(state)])
    header = ("version", "accuracy", "loss", "photos", "made", "state")
    return Listing("Versions" if rows else "There are no versions yet.", rows, header)


def runs_listing(found: Sequence[Mapping[str, str]]) -> Listing:
    """What happened lately, the newest last."""
    rows = [
        [
            one["at"][:16].replace("T", " "),
            one["what"],
            "" if one["reason"] in one["what"] else one["reason"],
        ]
        for one in found
    ]
    title = "Runs, the newest last" if rows else "There was no run yet."
    return Listing(title, rows, ("at", "what", "why") if rows else ())


def comparison_listing(
    first: str, second: str, found: "Comparison", picture: Path | None
) -> Listing:
    """Two versions on the same photos, label by label."""
    old, new = found.champion, found.challenger
    rows = [
        [name, _shown(getattr(old, name)), _shown(getattr(new, name))]
        for name in ("accuracy", "loss", "auc", "ece")
    ]
    for one in found.recalls:
        recalls = _shown(one["champion"]), _shown(one["challenger"])
        rows.append([f"recall of {one['label']}", *recalls])
    notes = [
        f"Version {second} is right on {found.won} photos that {first} misreads, and wrong on "
        f"{found.lost} others: {found.verdict} (McNemar p = {found.p_value:.3g}).",
        f"Photos that they read differently: {picture}" if picture else "They read all alike.",
    ]
    return Listing(f"{old.n} photos that neither was trained on", rows, ("", first, second), notes)


def _scores(one: Mapping[str, Any]) -> list[str]:
    numbers = [_shown(one.get(name)) for name in ("accuracy", "loss", "photos")]
    return [*numbers, one.get("created", "-")[:16].replace("T", " ")]


def scores_listing(result: Mapping[str, Any]) -> Listing:
    """Scores on labelled photos, label by label."""
    low, high = result["accuracy_interval"]
    more = ", ".join(f"{name} {_shown(result[name])}" for name in ("loss", "auc", "ece"))
    title = (
        f"{result['model']}: accuracy {result['accuracy']:.4f} ({low:.3f} to {high:.3f}) on "
        f"{result['n']} photos, {more}"
    )
    names = ("precision", "recall", "f1", "support")
    rows = [[row["label"], *(_shown(row[name]) for name in names)] for row in result["per_class"]]
    unread = [f"{file['file']}: {file['error']}" for file in result["unreadable"]]
    return Listing(title, rows, ("label", "precision", "recall", "F1", "photos"), unread)


def predictions_listing(predictions: Sequence[Mapping[str, Any]], model: str) -> Listing:
    """The label read in each photo, and the probability of each, or of this one only."""
    read = [found for found in predictions if "error" not in found]
    labels = [*read[0]["probabilities"]] if read else []
    labels = labels if len(labels) <= MAX_COLUMNS else []
    rows = [
        [
            found["file"],
            found["label"] if found["certain"] else "?",
            *(f"{found['probabilities'][label]:.3f}" for label in labels or [found["label"]]),
        ]
        for found in read
    ]
    model += "; ? means that none is clear" if any(row[1] == "?" for row in rows) else ""
    errors = [f"{found['file']}: {found['error']}" for found in predictions if "error" in found]
    return Listing(model, rows, ("photo", "label", *(labels or ["probability"])), errors)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

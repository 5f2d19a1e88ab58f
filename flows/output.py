"""What the terminal shows: messages, tables, progress bars, JSON."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from flows.local.credentials import FILE
from tasks.errors import HandsignsError
from tasks.params import LABELS
from tasks.project import Project
from tasks.stage import Progress

if TYPE_CHECKING:
    from flows.local.stack import Running
    from flows.report import RunReport
    from flows.workspace import Workspace
    from tasks.data.importer import ImportReport
    from tasks.stage import Progress

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Give a `Progress` that draws bars, or prints a line now and then in a log.

    Args:
        console: standard error, so that standard output stays for results.

    Yields:
        The callable to hand to tasks.
    """
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
            bars.update(shown[what], completed=done, total=total)
            if done >= total:
                bars.update(shown.pop(what), visible=False)

        yield progress


class _Lines:
    """A line when something starts to take long, and one when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        last = self._last.setdefault(what, now)
        if done >= total:
            del self._last[what]
        elif now - last < _SECONDS_BETWEEN_LINES:
            return
        else:
            self._last[what] = now
        self._console.print(f"  {what}: {done}/{total}", highlight=False)


out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    str,
    typer.Option(help="champion, challenger, a version's number, or the path of a release."),
]


def _text(words: str) -> str:
    """What a terminal of another encoding sent can be kept nowhere."""
    try:
        words.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"must be UTF-8 (received {words!a})") from None
    return words


Reason = Annotated[str, typer.Option(help="Why; kept in the champion's history.", callback=_text)]


def open_project() -> Project:
    """The checkout in the working directory.

    Raises:
        HandsignsError: it is none.
    """
    project = Project(Path.cwd())
    if not (project.root / "dvc.yaml").is_file():
        raise HandsignsError(
            f"This is not a checkout of handsigns: no dvc.yaml. Received: '{project.root}'. "
            "Change to the checkout's root."
        )
    return project


def open_workspace(project: Project | None = None) -> "Workspace":
    """The checkout and its services, none of them started yet."""
    from flows.settings import load_settings
    from flows.workspace import Workspace

    return Workspace(project or open_project(), load_settings())


@contextmanager
def shown_progress() -> "Iterator[Progress]":
    """Show bars for as long as the block lasts."""

    # Whatever a library prints on the way must not get between a script and its JSON.
    with redirect_stdout(sys.stderr), progress_bars(err) as progress:
        yield progress


def tell(as_json: bool, content: Any, shown: str | Table) -> None:
    """Print a result for a script or for a person."""
    if as_json:
        print_json(content)
    else:
        out.print(shown, highlight=False)


def print_json(content: Any) -> None:
    """Print a result for a script."""
    plain = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=plain) + "\n")


_MOST_FILES = 20


def import_table(report: "ImportReport") -> Table:
    """What was taken, was there already, and was set aside with its reason."""
    table = _table("import", "", *LABELS, "all", title="Photos")
    for title, counts in (("taken", report.taken), ("already there", report.already_there)):
        for split in sorted({split for split, _ in counts}):
            row = [counts.get((split, label), 0) for label in LABELS]
            table.add_row(title, split, *map(str, row), str(sum(row)))
    if report.removed:
        table.add_row("removed", "", *[""] * len(LABELS), str(report.removed))
    for kind, count in report.kinds().items():
        table.add_row("[red]set aside[/]", kind, *[""] * len(LABELS), str(count))
    shown = report.quarantined[:_MOST_FILES]
    lines = [escape(f"{aside.origin}: {aside.reason}") for aside in shown]
    if len(report.quarantined) > len(shown):
        more = len(report.quarantined) - len(shown)
        lines.append(f"and {more} more, in artifacts/quarantine/quarantine.json")
    table.caption = "\n".join(lines) or None
    return table


def service_table(running: "Running", fresh: bool) -> Table:
    """Where each part of the service answers."""
    table = _table("", "", title="Service" if fresh else "Service, up already")
    parts = {
        "Prefect": (running.prefect or "").removesuffix("/api"),
        "MLflow": running.mlflow,
        "S3": running.s3,
        "database": running.database or "SQLite in .local/",
    }
    for name, address in parts.items():
        table.add_row(name, escape(address or "as the environment says"))
    table.add_row("logs", ".local/logs/")
    table.add_row("login", f"in .local/{FILE}, for what is started here")
    table.caption = "handsigns status, predict and retrain use it. To stop it: make down"
    return table


def run_table(report: "RunReport") -> Table:
    """What a retrain did, from photos to release."""
    table = _table("", "", title="Retrain")
    table.add_row("status", escape(f"{report.status}: {report.reason}"))
    if not report.phases:
        return table
    data = report.data
    table.add_row("data", f"{data.version}: {data.train} train, {data.val} val, {data.test} test")
    if changes := data.changes:
        since = f"version {changes.since}" if changes.since else "the beginning"
        table.add_row("photos", f"{changes.added} came, {changes.removed} went since {since}")
    features = report.features
    if features.computed or features.reused:
        speed = f", {features.images_per_second:.0f}/s" if features.computed else ""
        computed = f"{features.computed} computed{speed}, {features.reused} reused"
        table.add_row("features", f"{computed}, {features.views} views a photo")
    for phase in report.phases:
        table.add_row(
            phase.name,
            f"{phase.images} images, {phase.epochs} epochs, {phase.seconds:.1f} s: "
            f"val accuracy {phase.val_accuracy:.4f}, loss {phase.val_loss:.4f}",
        )
    for name, words in _judged(report):
        table.add_row(name, words)
    if report.model.version is not None:
        alias = f" ({report.model.alias})" if report.model.alias else ""
        table.add_row("model", f"{report.model.name} version {report.model.version}{alias}")
    if report.release.uri:
        table.add_row("release", report.release.uri)
    if "total" in report.seconds:
        table.add_row("seconds", f"{report.seconds['total']:.1f}")
    return table


def _judged(report: "RunReport") -> Iterator[tuple[str, str]]:
    """Test scores, the gate's verdict and the comparison with the champion."""
    test = report.test
    if test.accuracy is not None:
        low, high = test.accuracy_interval or (0.0, 1.0)
        scores = f"loss {test.loss}, AUC {test.auc}, calibration error {test.ece}"
        yield "test", f"accuracy {test.accuracy:.4f} ({low:.3f} to {high:.3f}), {scores}"
    if report.gate.checks:
        failed = [check["name"] for check in report.gate.checks if not check["passed"]]
        yield "gate", f"failed: {', '.join(failed)}" if failed else "passed"
    if found := report.comparison:
        before = found["champion"]
        yield (
            "champion",
            f"accuracy {before['accuracy']:.4f} on the same {before['n']} photos; "
            f"{found['won']} won, {found['lost']} lost: {found['verdict']}",
        )


def status_table(found: Mapping[str, Any]) -> Table:
    """Where the checkout and its services stand."""
    table = _table("", "", title="Status")
    table.add_row("data", f"{found['data']['version']} ({found['data']['source']})")
    table.add_row("out of date", ", ".join(found["stale"]) or "nothing")
    for role in ("champion", "challenger"):
        held = found[role]
        force = ", FORCED" if held and held.get("overruled") else ""
        told = f"version {held['version']}{force}, {held['uri']}" if held else "none"
        table.add_row(role, told)
    table.add_row("signatures", escape(found["signatures"]))
    for move in found["history"][-5:]:
        table.add_row("moved", escape(move["told"]))
    return table


def scores_table(result: Mapping[str, Any]) -> Table:
    """Scores on labelled photos, class by class."""
    low, high = result["accuracy_interval"]
    title = escape(
        f"{result['model']}: accuracy {result['accuracy']:.4f} ({low:.3f} to {high:.3f}) on "
        f"{result['n']} photos, loss {result['loss']:.4f}, AUC {result['auc']}, "
        f"calibration error {result['ece']:.4f}"
    )
    table = _table("sign", "precision", "recall", "F1", "photos", title=title)
    for row in result["per_class"]:
        cells = [row["label"], *(_cell(row[name]) for name in ("precision", "recall", "f1"))]
        table.add_row(*cells, str(row["support"]))
    unread = [escape(f"{found['file']}: {found['error']}") for found in result["unreadable"]]
    more = len(unread) - _MOST_FILES
    told = [*unread[:_MOST_FILES], *([f"and {more} more"] if more > 0 else [])]
    table.caption = "\n".join(told) or None
    return table


def predictions_table(predictions: Sequence[Mapping[str, Any]], model: str) -> Table:
    """The sign read in each photo, and the probability of each."""
    table = _table("photo", "sign", *LABELS, title=escape(model))
    for found in predictions:
        if "error" in found:
            table.add_row(escape(found["file"]), f"[red]{escape(found['error'])}[/]")
        else:
            shares = [f"{found['probabilities'][label]:.3f}" for label in LABELS]
            table.add_row(escape(found["file"]), found["label"], *shares)
    return table


def _table(*heads: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

"""The terminal: results, messages, progress, and no output of libraries."""

import json
import logging
import os
import re
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
from tasks.project import Project
from tasks.stage import Progress, redirect_output

if TYPE_CHECKING:
    from flows.report import RunReport
    from flows.workspace import Workspace

_log = logging.getLogger(__name__)
# In a file each row of a table is one line, for grep.
out = Console(width=None if sys.stdout.isatty() else 100_000)
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

SECONDS_BETWEEN_LINES = 10.0  # how often a long step writes a line where there is no terminal
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
MAX_COLUMNS = 12  # labels that a table has a column for
MAX_COUNTS = 30  # counts of labels that are listed one by one
NEXT_STEPS = {
    "promoted": "Try it: handsigns predict PHOTO, or handsigns serve",
    "registered": "To promote it anyway: handsigns promote {version} --force --reason WHY",
    "rejected": "Nothing was published. Add photos of the weak classes, or change gate in "
    "params.yaml; misread photos are in artifacts/plots/mistakes.png",
}


def open_project() -> Project:
    """The checkout in the working directory; from here on libraries print to its log."""
    project = Project(Path.cwd())
    if not (project.root / "dvc.yaml").is_file():
        raise HandsignsError(
            f"'{project.root}' is not a checkout of handsigns: it has no dvc.yaml. "
            "Change to the checkout's root."
        )
    for console, stream in ((out, sys.stdout), (err, sys.stderr)):  # they keep the terminal
        stream.flush()
        copy = os.dup(stream.fileno())
        console.file = os.fdopen(copy, "w", 1, stream.encoding, errors="backslashreplace")
    redirect_output(project.local / "logs" / f"{sys.argv[1]}.log")
    return project


def open_workspace() -> "Workspace":
    """The checkout and its services; none of them is started yet."""
    project = open_project()
    from flows.settings import load_settings
    from flows.workspace import Workspace

    return Workspace(project, load_settings())


class _MessageHandler(logging.Handler):
    """Prints log messages as plain lines, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
        if record.exc_info:
            traceback.print_exception(record.exc_info[1])  # into the log of this verb


def show_messages() -> None:
    """Print the messages of this project on standard error, and warnings of the web server."""
    for name, level in (("flows", "INFO"), ("tasks", "INFO"), ("hypercorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.addHandler(_MessageHandler())
        logger.setLevel(level)


def say(message: str) -> None:
    """Print a message on one line of standard error."""
    err.print(" ".join(message.split()), highlight=False, markup=False, soft_wrap=True)


@dataclass
class Listing:
    """A titled table, of facts or of these columns of rows, and notes below."""

    title: str
    rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    columns: Sequence[str] = ()
    notes: Sequence[str] = ()


def echo(as_json: bool, content: Any, text: str | Listing) -> None:
    """Print a result, for a script or for a person."""
    if as_json:
        out.file.write(json.dumps(content, indent=1) + "\n")
        out.file.flush()
    elif isinstance(text, str):
        _print_line(text)
    else:
        out.print(Text(text.title, "bold"), soft_wrap=True)
        _print_table(text)
        for note in text.notes:
            _print_line(note)


def _print_table(listing: Listing) -> None:
    from rich import box
    from rich.table import Column, Table

    rows, columns = listing.rows, listing.columns
    if isinstance(rows, Mapping):
        columns, rows = ("fact", "value"), [{"fact": k, "value": v} for k, v in rows.items()]
    table = Table(
        *(Column(title, overflow="fold") for title in columns),
        box=box.SIMPLE_HEAD if out.is_terminal and listing.columns else None,
        show_header=bool(listing.columns),
    )
    for row in rows:
        table.add_row(*(Text(shown(row.get(title))) for title in columns))
    out.print(table)


def shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4f}"
        case dict() if len(value) > MAX_COUNTS:
            return f"{min(value.values())} to {max(value.values())} for {len(value)} labels"
        case dict():
            return ", ".join(f"{name}: {one}" for name, one in value.items() if one is not None)
        case list():
            return ", ".join(map(str, value))
        case str() if TIME.fullmatch(value):
            return value[:16].replace("T", " ")
    return str(value)


def _print_line(line: str) -> None:
    out.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show a bar while a step takes long, or a line now and then where there is no terminal."""
    if not err.is_terminal:
        yield progress_lines()
        return
    from rich import progress as rich

    columns = "{task.description}", rich.BarColumn(), rich.MofNCompleteColumn()
    # Rich would take what stages print from the log of this verb to the terminal.
    bars = rich.Progress(
        *columns, console=err, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with bars:
        bar = bars.add_task("", visible=False)

        def progress(what: str, done: int, total: int) -> None:
            rest = total - done
            bars.update(bar, description=what, completed=done, total=total, visible=rest > 0)

        yield progress


def progress_lines() -> Progress:
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


def retrain_listing(report: "RunReport") -> Listing:
    """What happened, how good it is, compared with what, and what to do next."""
    notes: list[str] = []
    if step := NEXT_STEPS.get(report.status):
        places = "Plots: artifacts/plots/   Report: artifacts/run.json"
        notes = [step.format(version=report.model.version), places]
    return Listing(f"Retrain: {report.status}", report.facts(), notes=notes)

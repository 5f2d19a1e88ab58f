"""The terminal: results, messages, progress, and no output of libraries."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from tasks.stage import Progress

out = Console()
err = Console(stderr=True)

SECONDS_BETWEEN_LINES = 10.0
"""How often a long step writes a line where there is no terminal."""


def capture_libraries(log: Path) -> None:
    """Send what libraries print to a file from here on; `out` and `err` keep the terminal.

    TensorFlow and its kin write from C++, so the file takes the place of the process's
    standard output and standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out.file, err.file = _copy(sys.stdout), _copy(sys.stderr)
    try:
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError:  # a read-only checkout, or another user's log
        file = os.open(os.devnull, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _copy(stream: TextIO) -> TextIO:
    number = os.dup(stream.fileno())
    return os.fdopen(number, "w", 1, stream.encoding, errors="backslashreplace")


class _MessageHandler(logging.Handler):
    """Prints log messages as plain lines, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


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
    """A titled list of rows, with a header where the columns need one, and notes below."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    notes: Sequence[str] = ()


def echo(as_json: bool, content: Any, shown: str | Listing) -> None:
    """Print a result, for a script or for a person."""
    if as_json:
        encoding = getattr(out.file, "encoding", None) or ""
        plain = encoding.lower() not in ("utf-8", "utf8")
        out.file.write(json.dumps(content, indent=1, ensure_ascii=plain) + "\n")
        out.file.flush()
    elif isinstance(shown, str):
        _print_line(shown)
    else:
        _print_listing(shown)


def _print_listing(listing: Listing) -> None:
    rows = [tuple(row) for row in listing.rows]
    out.print(Text(listing.title, "bold"), soft_wrap=True)
    if out.is_terminal:
        from rich import box
        from rich.table import Table

        head, style = bool(listing.header), box.SIMPLE_HEAD if listing.header else None
        table = Table(box=style, show_header=head)
        for number in range(max(map(len, rows), default=0)):
            title = listing.header[number] if head else ""
            table.add_column(title, overflow="fold", style="" if number or head else "dim")
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)
    else:  # one line a row, never wrapped, for grep
        rows = [tuple(listing.header), *rows] if listing.header else rows
        widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            _print_line("  " + "  ".join(cells).rstrip())
    for note in listing.notes:
        _print_line(note)


def _print_line(line: str) -> None:
    out.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def shown_progress() -> Iterator["Progress"]:
    """Show a bar while a step takes long, or a line now and then where there is no terminal."""
    if not err.is_terminal:
        yield _ProgressLines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=err, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        bar, shown = bars.add_task("", visible=False), ""

        def progress(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                bars.reset(bar, description=what)
                shown = what
            bars.update(bar, completed=done, total=total, visible=done < total)

        yield progress


class _ProgressLines:
    """Writes a line every ten seconds of a step, and one at the end of a long one."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        last = self._last.setdefault(what, now)
        if done >= total:
            del self._started[what], self._last[what]
            if now - started >= 1:
                say(f"{what}: {done}/{total} in {now - started:.0f} s")
        elif now - last >= SECONDS_BETWEEN_LINES:
            self._last[what] = now
            say(f"{what}: {done}/{total}")

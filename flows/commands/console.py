"""What a person sees on the terminal while something long runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from tasks.progress import Progress

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

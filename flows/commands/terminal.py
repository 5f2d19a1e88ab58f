"""What the verbs of the command line share: options, the checkout, what is printed.

Results go to standard output, everything else to standard error.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tasks.errors import HandsignsError
from tasks.layout import Layout

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from tasks.progress import Progress

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


def open_layout() -> Layout:
    """The checkout in the working directory.

    Raises:
        HandsignsError: it is none.
    """
    layout = Layout(Path.cwd())
    if not (layout.root / "dvc.yaml").is_file():
        raise HandsignsError(
            f"This is not a checkout of handsigns: no dvc.yaml. Received: '{layout.root}'. "
            "Change to the checkout's root."
        )
    return layout


def open_workspace(layout: Layout | None = None) -> "Workspace":
    """The checkout and its services, none of them started yet."""
    from flows.settings import load_settings
    from flows.workspace import Workspace

    return Workspace(layout or open_layout(), load_settings())


@contextmanager
def shown_progress() -> "Iterator[Progress]":
    """Show bars for as long as the block lasts."""
    from flows.commands.console import progress_bars

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

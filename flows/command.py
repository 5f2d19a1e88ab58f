"""What the verbs share: options, and the checkout that they work on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.output import capture_libraries
from tasks.errors import HandsignsError

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from tasks.project import Project


def _utf_8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"must be UTF-8 (received {text!a})") from None
    return text


def _version_number(text: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a number. `handsigns versions` lists them.")
    return int(text)


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    str,
    typer.Option(help="champion, challenger, a version's number, or the path of a release."),
]
Named = Annotated[str, typer.Argument(help="champion, challenger, or a version's number.")]
Number = Annotated[int, typer.Argument(help="A version's number.", parser=_version_number)]
Reason = Annotated[str, typer.Option(help="Why; kept in the champion's history.", callback=_utf_8)]


def open_project() -> "Project":
    """The checkout in the working directory; from here on libraries print to its log.

    Raises:
        HandsignsError: it is none.
    """
    from tasks.project import Project

    project = Project(Path.cwd())
    if not (project.root / "dvc.yaml").is_file():
        raise HandsignsError(
            f"'{project.root}' is not a checkout of handsigns: it has no dvc.yaml. "
            "Change to the checkout's root."
        )
    capture_libraries(project.local / "logs" / f"{sys.argv[1]}.log")
    return project


def open_workspace(project: "Project | None" = None) -> "Workspace":
    """The checkout and its services; none of them is started yet."""
    project = project or open_project()
    from flows.settings import load_settings
    from flows.workspace import Workspace

    return Workspace(project, load_settings())

"""Moving the champion by hand, as flows: for the Prefect UI and for the command line."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.champions.champion_artifacts import show_history_of
from flows.settings import load_settings
from flows.workspace import Workspace
from tasks.errors import HandsignsError
from tasks.layout import Layout
from tasks.releases.pointer import Move


@dataclass
class Course:
    """What came of a move, for whoever started the flow and must know it without Prefect.

    Args:
        begun: it may have been made.
        made: the move.
        refused: why there was none.
    """

    begun: bool = False
    made: Move | None = None
    refused: HandsignsError | None = None


course: ContextVar[Course] = ContextVar("course")
"""Takes what comes of the flow that this process runs; the command line sets it."""


@flow(name="promote", flow_run_name="promote version {version}")
def promote(version: int, reason: str, force: bool = False, by: str = "") -> State[Any]:
    """Make a registered version the champion.

    Args:
        version: Number of the version in the registry.
        reason: Why; kept in the champion's history.
        force: Overrule the gate or a lost comparison; what was overruled is kept too.
        by: Who decides; the worker's user when left empty.

    Returns:
        Completed, with the move in words; failed, with the reason.
    """
    return _move(
        "Promoted", lambda workspace: workspace.promote(version, reason, force, by or None)
    )


@flow(name="rollback", flow_run_name="rollback")
def rollback(reason: str, by: str = "") -> State[Any]:
    """Give the champion's place back to the version that had it before.

    Args:
        reason: Why; kept in the champion's history.
        by: Who decides; the worker's user when left empty.

    Returns:
        Completed, with the move in words; failed, with the reason.
    """
    return _move("Rolled back", lambda workspace: workspace.rollback(reason, by or None))


def _move(done: str, move: Callable[[Workspace], Move]) -> State[Any]:
    watched = course.get(Course())
    watched.begun = True
    try:
        with Workspace(Layout(Path.cwd()), load_settings()) as workspace:
            watched.made = made = move(workspace)
            show_history_of(workspace.storage)
    except HandsignsError as error:
        watched.refused = error
        return Failed(name="Refused", message=str(error))
    return Completed(name=done, message=made.told(), data=made.model_dump(mode="json"))

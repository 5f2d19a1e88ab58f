"""The promote and rollback flows, and the approval that a retrain may wait for."""

import asyncio
import logging
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from flows import ui
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.releases.champion import Move
from tasks.releases.comparison import PromotionDecision
from tasks.services.mlflow import Version

GRACE = 600  # seconds that Prefect waits longer than we do: a run that Prefect times out has failed

_log = logging.getLogger(__name__)


class Approval(RunInput):
    """The form in the Prefect UI; with defaults, resuming with nothing filled in would approve."""

    name: str = Field(
        title="Your name", description="Kept in the champion's history.", min_length=1
    )
    decision: Literal["approve", "reject"] = Field(
        title="Decision", description="Shall the challenger become champion?"
    )
    comment: str = Field(default="", title="Comment", description="Why; kept in the history.")


def ask(
    settings: Settings, version: Version, decision: PromotionDecision
) -> tuple[bool, str | None, str]:
    """Ask whether to promote, if the settings say so; also who answers, and why."""
    if settings.promotion == "auto":
        return True, None, ""
    seconds = settings.approval_seconds
    title = f"Version {version.number} of {settings.model_name} may become champion"
    # No longer than this: the fields of the form have to be in view below it.
    question = f"{title}: {decision.reason}.\n\nThe run's artifact `comparison` shows each photo."
    _log.info("Waiting for approval at %s, %d s at most.", ui.run_address(), seconds)
    ui.rename_run(f"v{version.number} waits for approval")
    ui.notify_people(settings, f"handsigns: {title}", "It waits for approval.", ui.run_address())
    form = Approval.with_initial_data(description=question)
    poll = min(5, max(1, seconds // 10))
    answer = apause_flow_run(wait_for_input=form, timeout=seconds + GRACE, poll_interval=poll)
    try:
        given = asyncio.run(asyncio.wait_for(answer, seconds))
    except TimeoutError:
        return False, None, f"nobody approved it within {seconds} s"
    comment = f": {given.comment}" if given.comment else ""
    verb = "approved" if given.decision == "approve" else "rejected"
    return verb == "approved", given.name, f"{verb} by {given.name}{comment}"


@flow(name="promote", flow_run_name="promote version {version}")
def promote(version: int, reason: str, force: bool = False, by: str = "") -> State[Any]:
    """Make a registered version the champion.

    Args:
        version: Number of the version in the registry.
        reason: Why; kept in the champion's history.
        force: Promote it against the gate or a lost comparison; that is kept too.
        by: Who decides; the worker's user when left empty.
    """
    return ui.state_of(lambda w: _moved(w, w.promote(version, reason, force, by or None)))


@flow(name="rollback", flow_run_name="rollback")
def rollback(reason: str, by: str = "", expected: str = "") -> State[Any]:
    """Return to the champion before the present one.

    Args:
        reason: Why; kept in the champion's history.
        by: Who decides; the worker's user when left empty.
        expected: Version or release to roll back from; any other champion stays.
    """
    return ui.state_of(lambda w: _moved(w, w.rollback(reason, by or None, expected or None)))


def _moved(workspace: Workspace, move: Move) -> State[Any]:
    ui.show_history(workspace)
    name = "Promoted" if move.action == "promote" else "Rolled back"
    return Completed(name=name, message=move.describe())


def record_move(workspace: Workspace, move: Move) -> None:
    """Run a flow that shows a move which a command made."""

    @flow(name=move.action, flow_run_name=f"{move.action} version {move.version}")
    def record() -> State[Any]:
        return _moved(workspace, move)

    record(return_state=True)

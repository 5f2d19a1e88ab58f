"""The promote and rollback flows, approval, and what moves the champion in a retrain."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from uuid import UUID

from httpx import HTTPError
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows import ui as artifacts
from flows.report import DataChanges, RunReport, Status, data_changes
from flows.settings import load_settings
from flows.ui import show_history_of
from flows.workspace import Workspace
from tasks.errors import HandsignsError, OvertakenError, PromotionError, ReleaseError
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.challenger import PromotionDecision, compare_with_champion, record_comparison
from tasks.releases.champion import METRICS, set_champion
from tasks.releases.pointer import Champion, Move, read_champion, sync_alias
from tasks.releases.release import DATASET_INDEX, Release, fetch
from tasks.services.mlflow import CHAMPION, Version
from tasks.stage import Progress

GRACE = 600
"""Seconds that Prefect waits longer than we do: what it ends by itself, it calls failed."""
AGAIN = 2.0
"""Seconds between two tries to end the wait."""

_log = logging.getLogger(__name__)


class Approval(RunInput):
    """What the Prefect UI asks for.

    Neither field has a default: else resuming with nothing filled in would approve.
    """

    name: str = Field(
        title="Your name", description="Kept in the champion's history.", min_length=1
    )
    decision: Literal["approve", "reject"] = Field(
        title="Decision", description="Shall the challenger become champion?"
    )
    comment: str = Field(default="", title="Comment", description="Why; kept in the history.")


@dataclass(frozen=True)
class Answer:
    """What came of the question.

    Args:
        approved: whether the challenger may become champion.
        by: who said so; None where nobody did.
        told: the answer in words.
    """

    approved: bool
    by: str | None
    told: str


def ask(question: str, seconds: int) -> Answer:
    """Pause the flow run that this is called from until a person answers.

    Args:
        question: Markdown; stands above the form.
        seconds: longest wait; then the answer is no.

    Returns:
        The answer.
    """
    ended, expired = threading.Event(), threading.Event()
    end = threading.Thread(
        target=_give_up, args=(UUID(str(flow_run.id)), seconds, ended, expired), daemon=True
    )
    end.start()
    _log.info("Waiting for approval in the Prefect UI, %d s at most.", seconds)
    try:
        given = pause_flow_run(
            wait_for_input=Approval.with_initial_data(description=question),
            timeout=seconds + GRACE,
            poll_interval=min(5, max(1, seconds // 10)),
        )
    except FlowPauseTimeout:
        given = None
    finally:
        ended.set()
        end.join(AGAIN)  # it may be about to say that it answered
    if given is None or expired.is_set():
        return Answer(False, None, f"nobody approved it within {seconds} s")
    approved = given.decision == "approve"
    comment = f": {given.comment}" if given.comment else ""
    return Answer(
        approved, given.name, f"{'approved' if approved else 'rejected'} by {given.name}{comment}"
    )


def _give_up(run: UUID, seconds: int, ended: threading.Event, expired: threading.Event) -> None:
    """Answer in nobody's name, so that the run goes on and ends as what it is.

    A server that does not hear it, or not yet, is asked again until the wait is over.
    """
    comment = f"no answer within {seconds} s"
    answer = {"name": "nobody", "decision": "reject", "comment": comment}
    pause: float = seconds
    while not expired.is_set() and not ended.wait(pause):
        pause = AGAIN
        with suppress(HTTPError), get_client(sync_client=True) as client:
            if client.resume_flow_run(run, run_input=answer).status == "ACCEPT":
                expired.set()


_Result = TypeVar("_Result")


class Run(Protocol):
    """Runs one thing as a named Prefect task."""

    def __call__(
        self, name: str, call: Callable[[], _Result], network: bool = False
    ) -> _Result: ...


class Succession:
    """Who is champion before a retrain and after it.

    Args:
        workspace: the checkout and its services.
        report: takes what was compared.
        run: runs one thing as a task.
        progress: told how far scoring is.
    """

    def __init__(
        self, workspace: Workspace, report: RunReport, run: Run, progress: Progress
    ) -> None:
        self._workspace = workspace
        self._report = report
        self._run = run
        self._progress = progress
        self._former: Any = None
        self._since: int | None = None
        self.changes: DataChanges | None = None

    def begin(self) -> None:
        """Mend what a crash between pointer and alias left, and note what the champion saw."""
        champion = self._run("champion", self._look, network=True)
        if champion is None:
            return
        self._since = champion.pointer.version
        try:
            project, release = self._workspace.project, champion.pointer.release
            folder = fetch(self._workspace.storage, release, project.releases)
            self._former = read_json(folder / DATASET_INDEX)
        except ReleaseError as error:
            _log.warning("What changed since the champion cannot be told: %s", error)

    def show_changes(self) -> None:
        """Tell which photos came and went since the champion was trained."""
        self.changes = data_changes(self._workspace.project, self._former, self._since)
        artifacts.show_changes(self.changes)

    def settle(self, release: Release, version: Version) -> tuple[Status, str]:
        """Let a registered version become champion if it may.

        Returns:
            What came of it, and why.
        """
        number = version.number
        champion, decision = self._run(
            "compare", lambda: self._compare(release, version), network=True
        )
        if decision is None:
            return "unchanged", f"Version {number} is champion already."
        if not decision.won:
            return "registered", f"Version {number} stays challenger: {decision.reason}."
        answer = self._ask(decision, release, version)
        if not answer.approved:
            return "registered", f"Version {number} stays challenger: {answer.told}."
        reason = "; ".join(filter(None, (decision.reason, answer.told)))
        try:
            self._run(
                "promote", lambda: self._promote(version, champion, reason, answer.by), network=True
            )
        except OvertakenError as error:
            return "registered", f"Version {number} stays challenger: {error}"
        self._report.model.alias = CHAMPION
        return "promoted", f"Version {number} is champion: {reason}."

    def _look(self) -> Champion | None:
        champion = read_champion(self._workspace.storage)
        if said := sync_alias(self._workspace.storage, self._workspace.registry):
            _log.warning(said)
        return champion

    def _compare(
        self, release: Release, version: Version
    ) -> tuple[Champion | None, PromotionDecision | None]:
        workspace = self._workspace
        champion = read_champion(workspace.storage)
        if champion and champion.pointer.release == release.id:
            self._report.model.alias = CHAMPION
            return champion, None
        try:
            decision = compare_with_champion(
                workspace.project, workspace.storage, champion, self._progress
            )
        except PromotionError as error:
            decision = PromotionDecision(False, str(error).rstrip("."))
        record_comparison(workspace.registry, version.number, champion, decision)
        if decision.comparison:
            self._report.comparison = decision.comparison.to_json()
        artifacts.show_comparison(decision)
        return champion, decision

    def _ask(self, decision: PromotionDecision, release: Release, version: Version) -> Answer:
        settings = self._workspace.settings
        if settings.promotion == "auto":
            return Answer(True, None, "")
        question = (
            f"Version {version.number} of {settings.model_name} may become champion. "
            f"Release `{release.id}`.\n\n{artifacts.comparison_text(decision)}"
        )
        return ask(question, settings.approval_seconds)

    def _promote(
        self, version: Version, champion: Champion | None, reason: str, by: str | None
    ) -> None:
        storage, registry = self._workspace.storage, self._workspace.registry
        scores = self._report.test.model_dump(include=set(METRICS))
        set_champion(storage, registry, version, champion, reason, scores, by=by)
        artifacts.show_history_of(storage)


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
def rollback(reason: str, by: str = "", expected: str = "") -> State[Any]:
    """Give the champion's place back to the version that had it before.

    Args:
        reason: Why; kept in the champion's history.
        by: Who decides; the worker's user when left empty.
        expected: Version or release to roll back from; any other champion stays.

    Returns:
        Completed, with the move in words; failed, with the reason.
    """
    return _move(
        "Rolled back",
        lambda workspace: workspace.rollback(reason, by or None, expected or None),
    )


def _move(done: str, move: Callable[[Workspace], Move]) -> State[Any]:
    watched = course.get(Course())
    watched.begun = True
    try:
        with Workspace(Project(Path.cwd()), load_settings()) as workspace:
            watched.made = made = move(workspace)
            show_history_of(workspace.storage)
    except HandsignsError as error:
        watched.refused = error
        return Failed(name="Refused", message=str(error))
    return Completed(name=done, message=made.describe(), data=made.model_dump(mode="json"))

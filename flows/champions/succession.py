"""From a registered version to the champion: compare, ask if need be, promote.

Only the checkout's next retrain waits while a person is asked: stages are done, and the
champion is moved by compare-and-set against the one that was compared with.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from flows.champions import champion_artifacts as artifacts
from flows.champions.approval import Answer, ask
from flows.reports import findings
from flows.reports.report import DataChanges, RunReport, Status
from flows.workspace import Workspace
from tasks.errors import OlderError, OvertakenError, PromotionError, ReleaseError
from tasks.progress import Progress
from tasks.releases.alias import following, mend_alias
from tasks.releases.challenge import Challenge, challenge
from tasks.releases.champion import METRICS, crown
from tasks.releases.manifest import DATASET_INDEX
from tasks.releases.objections import comparison_tags
from tasks.releases.pointer import Champion, read_champion
from tasks.releases.release import Release, fetch
from tasks.services.registry import CHAMPION, Version
from tasks.whole import read_json

_log = logging.getLogger(__name__)
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
            layout, release = self._workspace.layout, champion.pointer.release
            folder = fetch(self._workspace.storage, release, layout.releases)
            self._former = read_json(folder / DATASET_INDEX)
        except ReleaseError as error:
            _log.warning("What changed since the champion cannot be told: %s", error)

    def show_changes(self) -> None:
        """Tell which photos came and went since the champion was trained."""
        self.changes = findings.data_changes(self._workspace.layout, self._former, self._since)
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
        except (OvertakenError, OlderError) as error:
            return "registered", f"Version {number} stays challenger: {error}"
        self._report.model.alias = CHAMPION
        return "promoted", f"Version {number} is champion: {reason}."

    def _look(self) -> Champion | None:
        champion = read_champion(self._workspace.storage)
        if champion and (said := mend_alias(self._workspace.registry, champion)):
            _log.warning(said)
        return champion

    def _compare(
        self, release: Release, version: Version
    ) -> tuple[Champion | None, Challenge | None]:
        workspace = self._workspace
        champion = read_champion(workspace.storage)
        if champion and champion.pointer.release == release.id:
            self._report.model.alias = CHAMPION
            return champion, None
        try:
            decision = challenge(workspace.layout, workspace.storage, champion, self._progress)
        except PromotionError as error:
            decision = Challenge(False, str(error).rstrip("."))
        tags = comparison_tags(champion, decision.won, decision.reason)
        workspace.registry.set_tags(version.number, tags)
        if decision.comparison:
            self._report.comparison = decision.comparison.to_json()
        artifacts.show_comparison(decision)
        return champion, decision

    def _ask(self, decision: Challenge, release: Release, version: Version) -> Answer:
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
        present = read_champion(storage)
        if present is None or present.pointer.release != version.content_id:
            scores = self._report.test.model_dump(include=set(METRICS))
            crown(storage, registry, version, champion, reason, scores, by=by)
        else:
            _log.info("It moved at the first try, whose answer was lost.")
        with following(version.number):  # once more, where it could not be told at once
            if moved := read_champion(storage):
                mend_alias(registry, moved)
        artifacts.show_history_of(storage)

"""The retrain flow: fetch, version, run the stages, publish, register, compare, promote."""

import logging
import time
from collections.abc import Callable
from datetime import date
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import exponential_backoff

from flows import ui
from flows.dask import shard_runner
from flows.notify import tell_bad_end
from flows.preflight import (
    another_runs,
    find_unchanged,
    open_inbox,
    preflight,
    retrain_lock,
    save_last_run,
)
from flows.promotion import ask
from flows.publish import check_versions, commit_versions, publish_release, record_run
from flows.report import (
    ModelReport,
    ReleaseReport,
    RunReport,
    Status,
    data_changes,
    quarantined,
    read_stages,
    recorded_version,
)
from flows.run import session, write_report
from flows.settings import load_settings
from flows.workspace import Workspace
from tasks.data.directory import data_lock, fetch_data
from tasks.data.importer import ImportReport
from tasks.data.inbox import Inbox
from tasks.errors import HandsignsError, OvertakenError, PromotionError, ServiceError
from tasks.io import read_json
from tasks.model.shards import runner
from tasks.params import load_params
from tasks.project import Project
from tasks.releases.challenger import PromotionDecision, compare_with_champion, record_comparison
from tasks.releases.champion import METRICS, set_champion
from tasks.releases.pointer import Champion
from tasks.releases.release import DATASET_INDEX, Release, fetch
from tasks.services.mlflow import CHALLENGER, CHAMPION, Version
from tasks.stage import Progress, silent

LOCK_SECONDS = 600.0
"""Longest wait for an import that is running."""

Candidate = tuple[Version, Champion | None, PromotionDecision | None]
"""A registered version, the champion it was compared with, and the decision."""

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class Run:
    """State of one retrain, shared by its tasks."""

    def __init__(self, workspace: Workspace, force: bool, progress: Progress) -> None:
        self.workspace = workspace
        self.project = workspace.project
        self.force = force
        self.progress = ui.ProgressArtifacts(progress)
        self.report = RunReport(model=ModelReport(name=workspace.settings.model_name))
        self.inbox: Inbox | None = None
        self.outcomes: dict[str, str] = {}

    def end(self, status: Status, reason: str) -> None:
        """Set the outcome."""
        self.report.status, self.report.reason = status, reason


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Retry only the failure of a service."""
    return isinstance(state.data, ServiceError)


def step(
    name: str, network: bool = False
) -> Callable[[Callable[Concatenate[Run, P], T]], Callable[Concatenate[Run, P], T]]:
    """Make a function a Prefect task of this name whose time goes into the report.

    Args:
        name: Shown in the UI, and a key of `seconds` in `run.json`.
        network: Retry it if a service fails.
    """

    def decorate(function: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
        made = Task(
            function,
            name=name,
            task_run_name=name,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=2 if network else 0,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_may_pass,
        )

        @wraps(function)
        def timed(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
            began = time.monotonic()
            try:
                return made(run, *args, **kwargs)
            finally:
                run.report.seconds[name] = time.monotonic() - began

        return timed

    return decorate


def _run_name() -> str:
    version = recorded_version(Project(Path.cwd()))
    return f"retrain {date.today().isoformat()} data {version}"


@flow(
    name="retrain",
    flow_run_name=_run_name,
    on_failure=[tell_bad_end],
    on_crashed=[tell_bad_end],
)
def retrain(force: bool = False) -> State[Any]:
    """Bring the model up to date and promote it if it is sound and no worse.

    Args:
        force: Run every stage, also those whose inputs did not change.

    Returns:
        A state named after the report's status; its data is the report, or None.
    """
    ui.log_to_prefect()
    if current := session.get():
        report = current.report = _conduct(Run(current.workspace, force, current.progress))
        return _state(report)
    project = Project(Path.cwd())
    with retrain_lock(project) as alone:
        if not alone:
            reason = another_runs(project)
            ui.rename_run(f"cancelled: {reason}")
            return Cancelled(message=reason)
        project.run.unlink(missing_ok=True)
        with Workspace(project, load_settings()) as workspace:
            return _state(_conduct(Run(workspace, force, silent)))


def _state(report: RunReport) -> State[Any]:
    ui.rename_run(report.headline())
    name, reason = report.status.capitalize(), report.reason
    if report.status == "cancelled":
        return Cancelled(message=reason)
    if report.status in ("failed", "rejected"):
        return Failed(name=name, message=reason, data=None)
    return Completed(name=name, message=reason, data=report.model_dump(mode="json"))


def _conduct(run: Run) -> RunReport:
    """Run everything and leave `run.json`, whatever happens."""
    began = time.monotonic()
    try:
        _retrain(run)
    except HandsignsError as error:
        run.end("failed", str(error))
    except OSError as error:
        place = error.filename or run.project.artifacts
        run.end(
            "failed",
            f"The system refused an operation on '{place}' ({error.strerror or error}). "
            "Make room or give permission, and run again.",
        )
    except (TerminationSignal, KeyboardInterrupt):
        run.end("cancelled", "Interrupted. Nothing was lost; run again to continue.")
    except BaseException as error:
        run.end("failed", f"{type(error).__name__}: {error}".strip(": "))
        raise
    finally:
        report = run.report
        report.seconds["total"] = time.monotonic() - began
        write_report(report, run.project)
        level = logging.ERROR if report.status in ("failed", "rejected") else logging.INFO
        _log.log(level, "%s: %s", report.status, report.reason)
        run.progress.close()
        ui.show_summary(run.project, report)
    return run.report


def _retrain(run: Run) -> None:
    workspace = run.workspace
    check(run)
    _log.info(workspace.trust.describe())
    workspace.services.start_s3()
    if workspace.settings.inbox:
        import_inbox(run)
    fetch_photos(run)
    # One version of data/ from here until the champion was scored on it: an import waits.
    with data_lock(run.project, LOCK_SECONDS):
        version_photos(run)
        if not run.force and (found := find_unchanged(workspace)):
            run.report = found
            return
        candidate = _train_and_compare(run)
    if candidate:
        _promote_if_better(run, *candidate)
    save_last_run(workspace, run.report)


def _train_and_compare(
    run: Run,
) -> tuple[Version, Champion | None, PromotionDecision | None] | None:
    """Train, judge, publish and register; None if that was the end of it."""
    workspace, report = run.workspace, run.report
    former, since = read_former(run)
    for name in workspace.pipeline.stages():
        run.outcomes[name] = step(name)(run_stage)(run, name)
        if name == "audit":
            ui.show_audit(run.project)
        if name == "preprocess":
            report.data.changes = data_changes(run.project, former, since)
            ui.show_changes(report.data.changes)
    read_stages(
        run.project,
        load_params(run.project.params),
        report,
        features_ran=run.outcomes.get("features") == "ran",
    )
    ui.show_results(run.project, report)
    check_versions(run.project, report.data.version)
    if branch := workspace.settings.git_push:
        commit(run, branch)
    if not report.gate.passed:
        run.end("rejected", f"The gate rejected the model: {'; '.join(report.gate.failures())}.")
        return None
    release = publish(run)
    version = register(run, release)
    return version, *compare(run, release, version)


@step("services", network=True)
def check(run: Run) -> None:
    """Check everything that a run needs; the command did so before it started Prefect."""
    if session.get() is None:
        preflight(run.workspace)


@step("inbox", network=True)
def import_inbox(run: Run) -> None:
    """Import what is new in the inbox."""
    inbox = run.inbox = open_inbox(run.workspace)
    if inbox and inbox.new:
        ui.show_inbox(inbox.name, import_new(run.workspace, inbox, run.progress))


def import_new(workspace: Workspace, inbox: Inbox, progress: Progress) -> ImportReport:
    """Import what is new into `data/`; photos replace the rendered sample.

    Versioning is the caller's part.
    """
    project, pipeline = workspace.project, workspace.pipeline
    source = pipeline.data_source()
    if source == "photos":
        fetch_data(project, pipeline, progress)
    # What a person put beside the rendered photos must not be removed.
    untouched = not project.data.is_dir() or not pipeline.data_changed()
    report = inbox.import_new(source == "sample" and untouched, progress)
    if source == "sample" and report.usable and untouched:
        _log.info("Photos from the inbox replace the rendered sample.")
    _log.info(
        "Inbox %s: %d photos imported, %d known already, %d quarantined.",
        inbox.name,
        sum(report.imported.values()),
        sum(report.already_there.values()),
        len(report.quarantined),
    )
    return report


@step("fetch", network=True)
def fetch_photos(run: Run) -> None:
    """Bring the photos that `data.dvc` names."""
    _log.info(fetch_data(run.project, run.workspace.pipeline, run.progress))


@step("version", network=True)
def version_photos(run: Run) -> None:
    """Make a version of `data/` if it changed, and push it."""
    pipeline = run.workspace.pipeline
    version = pipeline.data_version()
    if version is None or pipeline.data_changed():
        version = pipeline.version_data("photos")
        _log.info("data/ changed; it is version %s now.", version)
    if run.inbox:
        run.inbox.remember(version)
    run.report.data.version = version
    run.report.data.quarantined = quarantined(run.project)
    if pipeline.has_remote():
        _log.info("%d files pushed to the DVC remote.", pipeline.push_data())
    ui.rename_run(_run_name())


@step("champion", network=True)
def read_former(run: Run) -> tuple[Any, int | None]:
    """The photos that the champion was made of, and its version; None without a champion."""
    workspace = run.workspace
    champion = workspace.champion()
    if champion is None:
        return None, None
    workspace.repair_alias()
    try:
        folder = fetch(workspace.storage, champion.pointer.release, run.project.releases)
        return read_json(folder / DATASET_INDEX), champion.pointer.version
    except HandsignsError as error:
        _log.warning("What changed since the champion is not known: %s", error)
        return None, None


def run_stage(run: Run, name: str) -> str:
    """Bring one stage up to date."""
    token = runner.set(shard_runner(run.workspace.settings.dask_address))
    try:
        outcome = run.workspace.pipeline.run(name, run.force, run.progress)
    finally:
        runner.reset(token)
    _log.info("Stage %s: %s.", name, outcome)
    return outcome


@step("git", network=True)
def commit(run: Run, branch: str) -> None:
    """Commit the versions of photos and results to a branch."""
    _log.info("Branch %s: %s.", branch, commit_versions(run.project, branch, run.report))


@step("publish", network=True)
def publish(run: Run) -> Release:
    """Upload the release, or find it there."""
    release = publish_release(run.workspace, run.report)
    run.report.release = ReleaseReport(id=release.id, uri=release.uri)
    ui.show_release(release.uri, run.workspace.storage.address.endpoint_url)
    return release


@step("register", network=True)
def register(run: Run, release: Release) -> Version:
    """Record the run in MLflow and register its model as challenger."""
    registry = run.workspace.registry
    recorded = record_run(run.workspace, run.report, release)
    version = registry.register(recorded, release.id, {"release_uri": release.uri})
    registry.set_alias(CHALLENGER, version.number)
    run.report.model = ModelReport(
        name=registry.model_name, version=version.number, alias=CHALLENGER
    )
    return version


@step("compare", network=True)
def compare(
    run: Run, release: Release, version: Version
) -> tuple[Champion | None, PromotionDecision | None]:
    """Compare with the champion on the same photos; no decision if it is this release."""
    workspace = run.workspace
    champion = workspace.champion()
    if champion and champion.pointer.release == release.id:
        return champion, None
    try:
        decision = compare_with_champion(run.project, workspace.storage, champion, run.progress)
    except PromotionError as error:
        decision = PromotionDecision(False, str(error).rstrip("."))
    record_comparison(workspace.registry, version.number, champion, decision)
    if decision.comparison:
        run.report.comparison = decision.comparison.to_json()
    ui.show_comparison(decision)
    return champion, decision


def _promote_if_better(
    run: Run, version: Version, champion: Champion | None, decision: PromotionDecision | None
) -> None:
    number = version.number
    if decision is None:
        run.report.model.alias = CHAMPION
        run.end("unchanged", f"Version {number} is champion already.")
        return
    if not decision.won:
        run.end("registered", f"Version {number} stays challenger: {decision.reason}.")
        return
    answer = ask(run.workspace.settings, version, decision)
    if not answer.approved:
        run.end("registered", f"Version {number} stays challenger: {answer.description}.")
        return
    reason = "; ".join(filter(None, (decision.reason, answer.description)))
    try:
        promote(run, version, champion, reason, answer.by)
    except OvertakenError as error:
        run.end("registered", f"Version {number} stays challenger: {error}")
        return
    run.report.model.alias = CHAMPION
    run.end("promoted", f"Version {number} is champion: {reason}.")
    ui.show_history(run.workspace)


@step("promote", network=True)
def promote(
    run: Run, version: Version, champion: Champion | None, reason: str, by: str | None
) -> None:
    """Move the champion."""
    workspace = run.workspace
    scores = run.report.test.model_dump(include=set(METRICS))
    with workspace.alias_follows():
        set_champion(
            workspace.storage, workspace.registry, version, champion, reason, scores, by=by
        )

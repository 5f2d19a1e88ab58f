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

from flows import preflight, publish, ui
from flows.dask import shard_runner
from flows.notify import notify_bad_end
from flows.promotion import ask
from flows.report import (
    data_changes,
    quarantined,
    read_stages,
    recorded_version,
    write_report,
)
from flows.run import Run, command
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
from tasks.services.mlflow import CHAMPION, Version
from tasks.stage import Progress, silent

LOCK_SECONDS = 600.0
"""Longest wait for an import that is running."""

Candidate = tuple[Version, Champion | None, PromotionDecision | None]
"""A registered version, the champion it was compared with, and the decision."""

P = ParamSpec("P")
T = TypeVar("T")
Step = Callable[Concatenate[Run, P], T]

_log = logging.getLogger(__name__)


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Retry only the failure of a service."""
    return isinstance(state.data, ServiceError)


def step(name: str, network: bool = False) -> Callable[[Step[P, T]], Step[P, T]]:
    """Make a function a Prefect task, timed in the report; retried if a service fails."""

    def decorate(function: Step[P, T]) -> Step[P, T]:
        task = Task(
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
                return task(run, *args, **kwargs)
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
    on_failure=[notify_bad_end],
    on_crashed=[notify_bad_end],
)
def retrain(force: bool = False) -> State[Any]:
    """Bring the model up to date and promote it if it is sound and no worse.

    Args:
        force: Run every stage, also those whose inputs did not change.
    """
    ui.log_to_prefect()
    if run := command.get():
        return _conduct(run)
    project = Project(Path.cwd())
    with preflight.retrain_lock(project) as alone:
        if not alone:
            reason = preflight.another_runs(project)
            ui.rename_run(f"cancelled: {reason}")
            return Cancelled(message=reason)
        project.run.unlink(missing_ok=True)
        with Workspace(project, load_settings()) as workspace:
            return _conduct(Run(workspace, force, silent))


def _conduct(run: Run) -> State[Any]:
    """Run everything and leave `run.json`, whatever happens; the state is the outcome."""
    began, project = time.monotonic(), run.workspace.project
    bars = run.progress = ui.ProgressArtifacts(run.progress)
    try:
        _retrain(run)
    except HandsignsError as error:
        run.end("failed", str(error))
    except OSError as error:
        place = error.filename or project.artifacts
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
        write_report(report, project)
        level = logging.ERROR if report.status in ("failed", "rejected") else logging.INFO
        _log.log(level, "%s: %s", report.status, report.reason)
        bars.close()
        ui.show_summary(project, report)
        ui.rename_run(report.headline())
    name = report.status.capitalize()
    if report.status == "cancelled":
        return Cancelled(message=report.reason)
    if report.status in ("failed", "rejected"):
        return Failed(name=name, message=report.reason, data=None)
    return Completed(name=name, message=report.reason, data=report.model_dump(mode="json"))


def _retrain(run: Run) -> None:
    workspace = run.workspace
    check(run)
    _log.info(workspace.trust.describe())
    workspace.services.start_s3()
    inbox = import_inbox(run) if workspace.settings.inbox else None
    fetch_photos(run)
    # One version of data/ from here until the champion was scored on it: an import waits.
    with data_lock(workspace.project, LOCK_SECONDS):
        version_photos(run, inbox)
        if not run.force and (found := preflight.find_unchanged(workspace)):
            run.report = found
            run.ended = True
            return
        candidate = _train_and_compare(run)
    if candidate:
        _promote_if_better(run, *candidate)
    preflight.save_last_run(workspace, run.report)


def _train_and_compare(run: Run) -> Candidate | None:
    """Train, judge, publish and register; None if the gate rejected the model."""
    workspace, report = run.workspace, run.report
    project = workspace.project
    former, since = read_former(run)
    outcomes = {}
    for name in workspace.pipeline.stages():
        outcomes[name] = step(name)(run_stage)(run, name)
        if name == "audit":
            ui.show_audit(project)
        if name == "preprocess":
            report.data.changes = data_changes(project, former, since)
            ui.show_changes(report.data.changes)
    read_stages(project, load_params(project.params), report, outcomes.get("features") == "ran")
    ui.show_gate(report)
    publish.check_versions(project, report.data.version)
    if branch := workspace.settings.git_push:
        commit_versions(run, branch)
    if not report.gate.passed:
        run.end("rejected", f"The gate rejected the model: {'; '.join(report.gate.failures())}.")
        return None
    release = publish_release(run)
    version = register_release(run, release)
    return version, *compare(run, release, version)


@step("services", network=True)
def check(run: Run) -> None:
    """Check everything that a run needs; a command did so before it started Prefect."""
    if command.get() is None:
        preflight.preflight(run.workspace)


@step("inbox", network=True)
def import_inbox(run: Run) -> Inbox | None:
    """Import what is new in the inbox."""
    inbox = preflight.open_inbox(run.workspace)
    if inbox and inbox.new:
        ui.show_inbox(inbox.name, import_new(run.workspace, inbox, run.progress))
    return inbox


def import_new(workspace: Workspace, inbox: Inbox, progress: Progress) -> ImportReport:
    """Import what is new into `data/`, not yet as a version; it replaces the rendered sample."""
    project, pipeline = workspace.project, workspace.pipeline
    source = pipeline.data_source()
    if source == "photos":
        fetch_data(project, pipeline, progress)
    # What a person put beside the rendered photos must not be removed.
    replace = source == "sample" and not (project.data.is_dir() and pipeline.data_changed())
    report = inbox.import_new(replace, progress)
    if replace and report.usable:
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
    _log.info(fetch_data(run.workspace.project, run.workspace.pipeline, run.progress))


@step("version", network=True)
def version_photos(run: Run, inbox: Inbox | None) -> None:
    """Make a version of `data/` if it changed, and push it."""
    pipeline = run.workspace.pipeline
    version = pipeline.data_version()
    if version is None or pipeline.data_changed():
        version = pipeline.version_data("photos")
        _log.info("data/ changed; it is version %s now.", version)
    if inbox:
        inbox.remember(version)
    run.report.data.version = version
    run.report.data.quarantined = quarantined(run.workspace.project)
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
        folder = fetch(workspace.storage, champion.pointer.release, workspace.project.releases)
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


commit_versions = step("git", network=True)(publish.commit_versions)
publish_release = step("publish", network=True)(publish.publish_release)
register_release = step("register", network=True)(publish.register_release)


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
        decision = compare_with_champion(
            workspace.project, workspace.storage, champion, run.progress
        )
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
    name = f"Version {version.number}"
    if decision is None:
        run.report.model.alias = CHAMPION
        run.end("unchanged", f"{name} is champion already.")
        return
    answer = ask(run.workspace.settings, version, decision) if decision.won else None
    if answer is None or not answer.approved:
        reason = answer.description if answer else decision.reason
        run.end("registered", f"{name} stays challenger: {reason}.")
        return
    reason = "; ".join(filter(None, (decision.reason, answer.description)))
    try:
        promote(run, version, champion, reason, answer.by)
    except OvertakenError as error:
        run.end("registered", f"{name} stays challenger: {error}")
        return
    run.report.model.alias = CHAMPION
    run.end("promoted", f"{name} is champion: {reason}.")
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

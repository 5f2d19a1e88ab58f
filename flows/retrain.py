"""The retrain flow: fetch, version, run the stages, publish, register, compare, promote."""

import logging
import time
from collections.abc import Callable
from datetime import date
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import task_run
from prefect.states import Cancelled, Completed, Failed

from flows import publish, ui
from flows.dask import shard_runner
from flows.output import progress_lines
from flows.promotion import ask
from flows.report import data_changes, log_run, quarantined, read_stages, write_report
from flows.run import Run, command, find_unchanged, preflight, retrain_lock, save_last_run
from flows.settings import load_settings
from flows.workspace import Workspace
from tasks.data.directory import data_lock, fetch_data
from tasks.data.importer import Inbox
from tasks.errors import BusyError, HandsignsError, OvertakenError, PromotionError
from tasks.features import runner
from tasks.io import read_json
from tasks.params import load_params
from tasks.project import Project
from tasks.releases.champion import METRICS, PHOTOS, Champion, set_champion
from tasks.releases.comparison import PromotionDecision, compare_with_champion, record_comparison
from tasks.releases.release import DATASET_INDEX, Release, fetch
from tasks.services.dvc import check_trained_on
from tasks.services.git import push_to_branch
from tasks.services.mlflow import CHAMPION, Version

LOCK_SECONDS = 600.0
"""Longest wait for an import that is running."""

P = ParamSpec("P")
T = TypeVar("T")
Step = Callable[Concatenate[Run, P], T]

_log = logging.getLogger(__name__)


def step(name: str) -> Callable[[Step[P, T]], Task[Concatenate[Run, P], T]]:
    """Make a function of a run a Prefect task, timed in the report."""

    def decorate(function: Step[P, T]) -> Task[Concatenate[Run, P], T]:
        # The clients of services retry by themselves. Of an error that is not retried although
        # others would be, Prefect logs no traceback: the flow says in one line what failed.
        @task(
            name=name,
            task_run_name=name,
            cache_policy=NO_CACHE,
            retries=1,
            retry_condition_fn=lambda *_: False,
        )
        @wraps(function)
        def timed(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
            began = time.monotonic()
            try:
                return function(run, *args, **kwargs)
            finally:
                run.report.seconds[str(task_run.name)] = time.monotonic() - began

        return timed

    return decorate


@flow(
    name="retrain",
    flow_run_name=lambda: f"retrain {date.today().isoformat()}",
    on_failure=[ui.notify_bad_end],
    on_crashed=[ui.notify_bad_end],
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
    try:
        with retrain_lock(project), Workspace(project, load_settings()) as workspace:
            project.run.unlink(missing_ok=True)
            return _conduct(Run(workspace, force, progress_lines()))
    except BusyError as error:
        ui.rename_run(f"cancelled: {error}")
        return Cancelled(message=str(error))
    except HandsignsError as error:
        return Failed(name="Refused", message=str(error))


def _conduct(run: Run) -> State[Any]:
    """Run everything and leave `run.json`, whatever happens; the state is the outcome."""
    began, project = time.monotonic(), run.workspace.project
    try:
        _retrain(run)
    except HandsignsError as error:
        run.end("failed", str(error))
    except OSError as error:
        place = f"'{error.filename or project.artifacts}' ({error.strerror or error})"
        advice = "Make room or give permission, and run again."
        run.end("failed", f"The system refused an operation on {place}. {advice}")
    except (TerminationSignal, KeyboardInterrupt):
        run.end("cancelled", "Interrupted. Nothing was lost; run again to continue.")
    except BaseException as error:
        name = type(error).__name__
        if type(error).__module__.startswith(("httpx", "prefect")):
            run.end("failed", f"Prefect failed ({name}). Look at its log, then run again.")
        else:
            run.end("failed", f"{name}: {error}")
            raise
    finally:
        report = run.report
        report.seconds["total"] = time.monotonic() - began
        write_report(report, project)
        if command.get() is None:
            log_run(report, project)
        bad = report.status in ("failed", "rejected")
        _log.log(logging.ERROR if bad else logging.INFO, "%s: %s", report.status, report.reason)
        ui.show_summary(project, report, publish.name_record(run))
        ui.rename_run(report.headline())
    if report.status == "cancelled":
        return Cancelled(message=report.reason)
    outcome = Failed if bad else Completed
    return outcome(name=report.status.capitalize(), message=report.reason)


def _retrain(run: Run) -> None:
    workspace = run.workspace
    if command.get() is None:  # a command did so before it started Prefect
        check(run)
    _log.info(workspace.trust.describe())
    workspace.services.s3(wait=False)
    inbox = import_inbox(run) if workspace.settings.inbox else None
    fetch_photos(run)
    # One version of data/ from here until the champion was scored on it: an import waits.
    with data_lock(workspace.project, LOCK_SECONDS):
        version_photos(run, inbox)
        if not run.force and (found := find_unchanged(workspace)):
            run.report = found
            return
        _train(run)
        if not run.report.gate.passed:
            failures = run.report.gate.describe_failures()
            run.end("rejected", f"The gate rejected the model: {failures}.")
            record_rejected(run)
        else:
            release = publish_release(run)
            version = register_release(run, release)
            champion, decision = compare(run, release, version)
    if run.report.gate.passed:
        _promote_if_better(run, version, champion, decision)
    save_last_run(workspace, run.report)


def _train(run: Run) -> None:
    """Run every stage, and read what they found."""
    workspace, report = run.workspace, run.report
    project = workspace.project
    former, since = read_former(run)
    outcomes = {}
    for name in workspace.pipeline.stages():
        stage = run_stage.with_options(name=name, task_run_name=name)
        outcomes[name] = stage(run, name)
        if name == "preprocess":
            report.data.changes = data_changes(project, former, since)
    read_stages(project, load_params(project.params), report, outcomes)
    check_trained_on(project, report.data.version)
    if branch := workspace.settings.git_push:
        commit_versions(run, branch)


@step("services")
def check(run: Run) -> None:
    """Check everything that a run needs."""
    preflight(run.workspace)


@step("inbox")
def import_inbox(run: Run) -> Inbox | None:
    """Import what is new in the inbox."""
    inbox = run.workspace.inbox()
    if inbox and inbox.new:
        run.workspace.import_new(inbox, run.progress)
    return inbox


@step("fetch")
def fetch_photos(run: Run) -> None:
    """Bring the photos that `data.dvc` names."""
    _log.info(fetch_data(run.workspace.project, run.workspace.pipeline, run.progress))


@step("version")
def version_photos(run: Run, inbox: Inbox | None) -> None:
    """Make a version of `data/` if it changed, and push it."""
    pipeline = run.workspace.pipeline
    version = pipeline.data_version()
    if version is None or pipeline.data_state() == "edited":
        version = pipeline.version_data("photos")
        _log.info("data/ changed; it is version %s now.", version)
    if inbox:
        inbox.remember(version)
    run.report.data.version = version
    run.report.data.quarantined = quarantined(run.workspace.project)
    if pipeline.remote_url():
        _log.info("%d files pushed to the DVC remote.", pipeline.push_data())


@step("champion")
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


@step("stage")
def run_stage(run: Run, name: str) -> str:
    """Bring one stage up to date."""
    token = runner.set(shard_runner(run.workspace.settings.dask_address))
    try:
        outcome = run.workspace.pipeline.run(name, run.force, run.progress)
    finally:
        runner.reset(token)
    _log.info("Stage %s: %s.", name, outcome)
    return outcome


@step("git")
def commit_versions(run: Run, branch: str) -> None:
    """Commit `data.dvc` and `dvc.lock` to a branch of `origin`, unless it has them already."""
    project, report = run.workspace.project, run.report
    verdict = "passed" if report.gate.passed else "rejected"
    subject = f"Retrain on data {report.data.version[:8]}"
    body = f"Test accuracy {report.test.accuracy or 0.0:.1%}; the gate {verdict} the model."
    files = [project.data_file, project.lock]
    commit = push_to_branch(project.root, branch, files, f"{subject}\n\n{body}")
    _log.info("Branch %s: %s.", branch, f"commit {commit} is pushed" if commit else "up to date")


publish_release = step("publish")(publish.publish_release)
register_release = step("register")(publish.register_release)
record_rejected = step("register")(publish.record_rejected)


@step("compare")
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
    else:
        run.report.model.alias = CHAMPION
        run.end("promoted", f"{name} is champion: {reason}.")
        ui.show_history(run.workspace)


@step("promote")
def promote(
    run: Run, version: Version, champion: Champion | None, reason: str, by: str | None
) -> None:
    """Move the champion."""
    workspace = run.workspace
    scores = run.report.test.model_dump(include=set(METRICS))
    scores[PHOTOS] = run.report.data.train
    with workspace.alias_follows():
        set_champion(workspace.storage, version, champion, reason, scores, by=by)

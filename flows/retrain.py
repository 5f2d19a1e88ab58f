"""The retrain flow: fetch, version, run the stages, publish, register, compare, promote."""

import logging
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Cancelled, Completed, Failed

from flows import ui
from flows.dask import shard_runner
from flows.output import progress_lines
from flows.promotion import ask
from flows.report import data_changes, histories, quarantined, read_stages
from flows.run import Run, command, find_unchanged, preflight, reported, retrain_lock, save_last_run
from flows.workspace import Workspace
from tasks.data.dataset import open_dataset
from tasks.data.directory import data_lock, fetch_data
from tasks.data.importer import Inbox
from tasks.errors import BusyError, HandsignsError, OvertakenError, PromotionError
from tasks.features import runner
from tasks.io import read_json, write_json
from tasks.model.augment import enlarge
from tasks.params import load_params
from tasks.releases.champion import METRICS, PHOTOS, Champion, record_comparison, set_champion
from tasks.releases.comparison import PromotionDecision, compare_with_champion
from tasks.releases.provenance import model_card, release_facts, write_bill
from tasks.releases.release import DATASET_INDEX, Release, fetch, publish, release_uri
from tasks.services.dvc import check_trained_on
from tasks.services.git import push_to_branch, read_revision
from tasks.services.mlflow import CHALLENGER, CHAMPION, RunRecord, Version

SPLITS = {"train", "val", "test", "synthetic"}

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


def step(name: str) -> Callable[[Callable[P, T]], Task[P, T]]:
    """Make a function of a run a Prefect task, timed in the report."""

    def decorate(function: Callable[P, T]) -> Task[P, T]:
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
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            run, began = cast(Run, args[0]), time.monotonic()
            try:
                return function(*args, **kwargs)
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
    run = command.get()
    return _conduct(run) if run else ui.state_of(partial(_retrain_alone, force))


def _retrain_alone(force: bool, workspace: Workspace) -> State[Any]:
    try:
        with retrain_lock(workspace.project):
            return _conduct(Run(workspace, force, progress_lines()))
    except BusyError as error:
        ui.rename_run(f"cancelled: {error}")
        return Cancelled(message=str(error))


def _conduct(run: Run) -> State[Any]:
    """Run everything and show how it ended; the state is the outcome."""
    with reported(run):
        _retrain(run)
    report = run.report
    bad = report.status in ("failed", "rejected")
    _log.log(logging.ERROR if bad else logging.INFO, "%s: %s", report.status, report.reason)
    ui.show_summary(run.workspace.project, report, name_record(run))
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
    with data_lock(workspace.project):
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
    workspace, report = run.workspace, run.report
    project = workspace.project
    former, since = read_former(run)
    outcomes = {}
    for name in workspace.pipeline.stages():
        stage = run_stage.with_options(name=name, task_run_name=name)
        outcomes[name] = stage(run, name)
        if name == "preprocess":
            report.data.changes = data_changes(project, former, since)
    report_stages(run, outcomes)
    check_trained_on(project, report.data.version)
    if branch := workspace.settings.git_push:
        commit_versions(run, branch)


@step("services")
def check(run: Run) -> None:
    preflight(run.workspace)


@step("inbox")
def import_inbox(run: Run) -> Inbox | None:
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
    runner.set(shard_runner(run.workspace.settings.dask_address))
    outcome = run.workspace.pipeline.run(name, run.force, run.progress)
    _log.info("Stage %s: %s.", name, outcome)
    return outcome


@step("report")
def report_stages(run: Run, outcomes: dict[str, str]) -> None:
    """Read and show what the stages found."""
    project = run.workspace.project
    read_stages(project, load_params(project.params), run.report, outcomes)
    ui.show_stages(project, run.report)


@step("git")
def commit_versions(run: Run, branch: str) -> None:
    """Commit `data.dvc` and `dvc.lock` to a branch of `origin`, unless it has them already."""
    project, report = run.workspace.project, run.report
    verdict = "passed" if report.gate.passed else "rejected"
    subject = f"Retrain on data {report.data.version[:8]}"
    body = f"Test accuracy {report.test.accuracy or 0.0:.1%}; the gate {verdict} the model."
    files, message = [project.data_file, project.lock], f"{subject}\n\n{body}"
    commit = push_to_branch(project.root, branch, files, message)
    _log.info("Branch %s: %s.", branch, f"commit {commit} is pushed" if commit else "up to date")


@step("publish")
def publish_release(run: Run) -> Release:
    """Upload the release of what the stages made, or find it there."""
    workspace, report = run.workspace, run.report
    project, source = workspace.project, workspace.pipeline.data_source()
    root = project.root
    sample = "The photos are the rendered sample set: drawn hands, not photographs."
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "labels.json", open_dataset(project.dataset).classes)
        counts = report.data.model_dump(include=SPLITS)
        note = sample if source == "sample" else "The photos were imported."
        card = model_card(project, counts, report.data.version, note)
        (folder / "model_card.md").write_text(card, encoding="utf-8")
        write_bill(root / "requirements.lock", root / "pyproject.toml", folder / "sbom.cdx.json")
        made = [project.model, project.graph, project.metrics, project.gate, project.predictions]
        made += [project.params, project.lock, project.data_file, project.reference]
        made += folder.iterdir()
        files = {DATASET_INDEX: project.dataset_index, **{path.name: path for path in made}}
        facts = release_facts(root, report.data.version, workspace.champion())
        release = publish(workspace.storage, files, facts)
    report.release = {"id": release.id, "uri": release_uri(workspace.storage, release.id)}
    return release


@step("register")
def register_release(run: Run, release: Release) -> Version:
    """Record the run in MLflow and register the model of its release as challenger."""
    from keras.saving import load_model

    registry, model = run.workspace.registry, run.workspace.project.model
    record, dataset = _record(run, release), open_dataset(run.workspace.project.dataset)
    example = enlarge(dataset.images[dataset.rows("test")[:1]]).astype("float32")
    recorded = registry.record_run(record, model, lambda: load_model(model, compile=False), example)
    tags = {"release_uri": record.tags["release_uri"]}
    version = registry.register(recorded, release.id, tags, record.description)
    registry.set_alias(CHALLENGER, version.number)
    run.report.model.version, run.report.model.alias = version.number, CHALLENGER
    run.record = recorded.run_id
    return version


@step("register")
def record_rejected(run: Run) -> None:
    """Record in MLflow what the gate rejected; log, don't raise, if that fails."""
    try:
        run.record = run.workspace.registry.record_rejected(_record(run, None))
    except HandsignsError as error:
        _log.warning("The rejected run is not in MLflow: %s", error)


def _record(run: Run, release: Release | None) -> RunRecord:
    report, project = run.report, run.workspace.project
    params, failed = load_params(project.params), report.gate.describe_failures()
    scores = f"Accuracy {report.test.accuracy}, loss {report.test.loss}, {report.data.describe()}."
    tags = {
        "data_version": report.data.version,
        "git_revision": read_revision(project.root).commit,
        "gate": f"rejected: {failed}" if failed else "passed",
        "release_uri": report.release["uri"],
        "prefect_run": ui.run_address(),
    }
    return RunRecord(
        content_id=release.id if release else None,
        params=params.model_dump(),
        name=f"retrain on data {report.data.version[:8]}",
        description=scores if release else f"Rejected: {failed}. {scores}",
        data_version=report.data.version,
        photos=report.data.model_dump(include=SPLITS),
        started=run.started,
        histories=histories(project, params),
        metrics={"test": read_json(project.metrics)},
        pictures=sorted(project.plots.glob("*.png")),
        files=[project.lock, project.params, project.data_file],
        tags={name: text for name, text in tags.items() if text},
    )


def name_record(run: Run) -> str | None:
    """Name the run in MLflow by its outcome, and return its address; log, don't raise."""
    project, report = run.workspace.project, run.report
    drawn = [project.changed] if report.comparison else []
    drawn += [project.quality] if report.status == "promoted" else []
    drawn = [picture for picture in drawn if picture.is_file()]
    try:
        if run.record:
            return run.workspace.registry.name_run(run.record, report.headline(), drawn)
    except HandsignsError as error:
        _log.warning("The run in MLflow is not named by its outcome: %s", error)
    return None


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
    record_comparison(workspace.registry, version.number, champion, decision.won, decision.reason)
    if decision.comparison:
        run.report.comparison = decision.comparison.to_json()
    ui.show_text("comparison", "Champion and challenger.", ui.comparison_text(decision))
    return champion, decision


def _promote_if_better(
    run: Run, version: Version, champion: Champion | None, decision: PromotionDecision | None
) -> None:
    name = f"Version {version.number}"
    if decision is None:
        run.report.model.alias = CHAMPION
        run.end("unchanged", f"{name} is champion already.")
        return
    approved, by, why = False, None, decision.reason
    if decision.won:
        approved, by, why = ask(run.workspace.settings, version, decision)
    if not approved:
        run.end("registered", f"{name} stays challenger: {why}.")
        return
    reason = "; ".join(filter(None, (decision.reason, why)))
    try:
        promote(run, version, champion, reason, by)
    except OvertakenError as error:
        run.end("registered", f"{name} stays challenger: {error}")
    else:
        run.report.model.alias = CHAMPION
        run.end("promoted", f"{name} is champion: {reason}.")


@step("promote")
def promote(
    run: Run, version: Version, champion: Champion | None, reason: str, by: str | None
) -> None:
    workspace = run.workspace
    scores = run.report.test.model_dump(include=set(METRICS))
    scores[PHOTOS] = run.report.data.train
    with workspace.alias_follows():
        set_champion(workspace.storage, version, champion, reason, scores, by=by)
    ui.show_history(workspace)

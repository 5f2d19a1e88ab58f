"""The retrain flow."""

import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from filelock import FileLock, Timeout
from httpx import HTTPError
from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import exponential_backoff

from flows import ui
from flows.dask import shard_runner
from flows.local.stack import Services, check_reachable, find_running
from flows.notify import tell_bad_end
from flows.promotion import Succession
from flows.report import (
    ModelReport,
    ReleaseReport,
    RunReport,
    commit_versions,
    data_report,
    features_report,
    gate_report,
    phase_reports,
    publish_release,
    quarantined,
    record_run,
    recorded_version,
    remember,
    test_report,
    unchanged_since,
    version_files,
)
from flows.settings import load_settings
from flows.ui import ShownProgress
from flows.workspace import Workspace
from tasks.data.importer import ImportReport
from tasks.data.inbox import Inbox, list_bucket, list_folder
from tasks.data.sources import fetch_data
from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.model.shards import runner
from tasks.params import Params, load_params
from tasks.project import Project
from tasks.releases.release import Release
from tasks.services.mlflow import CHALLENGER, Version
from tasks.services.s3 import Storage
from tasks.stage import Progress, silent
from tasks.training.end_to_end import named_workers

_held: ContextVar[Path | None] = ContextVar("held", default=None)
"""The lock that what runs here has already."""


@contextmanager
def retrain_lock(project: Project) -> Iterator[bool]:
    """Be the checkout's only retrain for as long as the block lasts.

    What runs within the block is part of that retrain, and may enter another one: the
    command holds the checkout from its first look at it, before Prefect runs the flow.

    Args:
        project: the checkout.

    Yields:
        Whether that is so; False at once where another one runs.
    """
    if _held.get() == project.retrain_lock:
        yield True
        return
    project.local.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(project.retrain_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    token = _held.set(project.retrain_lock)
    try:
        _holder_file(project).write_text(f"process {os.getpid()}\n", encoding="utf-8")
        yield True
    finally:
        _held.reset(token)
        lock.release()


def holder(project: Project) -> str:
    """Name the process that runs a retrain."""
    try:
        return _holder_file(project).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown process"


def _holder_file(project: Project) -> Path:
    return project.retrain_lock.with_suffix(".pid")


def check_policy(services: Services) -> None:
    """Refuse to wait for a person where nobody could see the question.

    Servers that a run starts for itself end with it, and keep others out meanwhile.

    Raises:
        SettingsError: approval is asked for without services that outlive the run.
    """
    settings = services.settings
    if settings.promotion != "approval":
        return
    running = find_running(services.folder)
    missing = [
        name
        for name, known in {
            "PREFECT_API_URL": services.prefect_named(),
            "HANDSIGNS_S3_ENDPOINT_URL": settings.s3_endpoint_url or (running and running.s3),
        }.items()
        if known is None
    ]
    if missing:
        raise SettingsError(
            "A run that waits for approval needs services that others can reach meanwhile. "
            f"Received: HANDSIGNS_PROMOTION=approval without {' and '.join(missing)}. Set "
            "them, start the service with `handsigns up`, or use HANDSIGNS_PROMOTION=auto."
        )


S3 = "s3://"

_log = logging.getLogger(__name__)


def look(workspace: Workspace, services: Services) -> Inbox | None:
    """See what lies in the inbox; None where there is none.

    Args:
        workspace: the checkout.
        services: give the S3 service, if the inbox is there.

    Raises:
        SourceError: the folder is missing, or holds no class folder.
        ServiceError: S3 does not answer, or has no such bucket.
    """
    where = workspace.settings.inbox
    if where is None:
        return None
    if where.startswith(S3):
        bucket, _, prefix = where.removeprefix(S3).partition("/")
        listing = list_bucket(Storage(replace(services.s3(), bucket=bucket)), prefix)
    else:
        listing = list_folder(Path(where))
    return Inbox(workspace.project, where, listing, workspace.pipeline.data_version())


def take(workspace: Workspace, inbox: Inbox, progress: Progress) -> ImportReport:
    """Bring what is new into `data/`; photos take the place of the rendered sample.

    Versioning is the caller's part.

    Args:
        workspace: the checkout.
        inbox: has something new.
        progress: told about each file.

    Returns:
        What became of each file.
    """
    project, pipeline = workspace.project, workspace.pipeline
    source = pipeline.data_source()
    if source == "photos":
        fetch_data(project, pipeline, progress)
    # What a person put beside the rendered photos is not ours to remove.
    untouched = not project.data.is_dir() or not pipeline.data_changed()
    report = inbox.take(source == "sample" and untouched, progress)
    if source == "sample" and report.usable and untouched:
        _log.info("Photos from the inbox take the place of the rendered sample.")
    _log.info(
        "Inbox %s: %d photos taken, %d there already, %d set aside.",
        inbox.name,
        sum(report.taken.values()),
        sum(report.already_there.values()),
        len(report.quarantined),
    )
    return report


listener: ContextVar[Progress] = ContextVar("listener", default=silent)
"""Whom a flow in this process tells how far it is; the command line sets it."""

_Result = TypeVar("_Result")


def _name() -> str:
    version = recorded_version(Project(Path.cwd()).data_file)
    return f"retrain {datetime.date.today().isoformat()} data {version}"


def _name_again() -> None:
    """Call the run after the photos that it found, where they are not those of its start."""
    run = flow_run.get_id()
    if run and flow_run.get_name() != _name():
        with suppress(HTTPError), get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run), name=_name())


@flow(
    name="retrain",
    flow_run_name=_name,
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
    project = Project(Path.cwd())
    with retrain_lock(project) as alone:
        if not alone:
            return Cancelled(message=f"Another retrain of this checkout runs: {holder(project)}.")
        # Until this run writes its own: a report of an earlier one must not pass for it.
        project.run.unlink(missing_ok=True)
        with Workspace(project, load_settings()) as workspace:
            report = Retrain(workspace, force, listener.get()).conduct()
    result = report.model_dump(mode="json")
    if report.status in ("failed", "rejected"):
        return Failed(name=report.status.capitalize(), message=report.reason, data=None)
    return Completed(name=report.status.capitalize(), message=report.reason, data=result)


class Retrain:
    """One retrain; each method that the flow shows as a task does one thing.

    Args:
        workspace: the checkout and its services.
        force: run every stage.
        progress: told how far long stages are.
    """

    def __init__(self, workspace: Workspace, force: bool, progress: Progress) -> None:
        self._workspace = workspace
        self._project = workspace.project
        self._force = force
        self._progress = progress
        self._shown = ShownProgress(progress)
        self._seconds: dict[str, float] = {}
        self._outcomes: dict[str, str] = {}
        self._inbox: Inbox | None = None
        self._report = RunReport(
            status="failed", reason="", model=ModelReport(name=workspace.settings.model_name)
        )
        self._succession = Succession(workspace, self._report, self._task, progress)

    def conduct(self) -> RunReport:
        """Run everything and leave `run.json`, whatever happens."""
        began = time.monotonic()
        try:
            self._run()
        except HandsignsError as error:
            self._conclude("failed", str(error))
        except OSError as error:
            place = error.filename or self._project.artifacts
            self._conclude(
                "failed",
                f"The system refused something ({error.strerror or error}). Received: '{place}'. "
                "Make room or give permission, and run again.",
            )
        except (TerminationSignal, KeyboardInterrupt):
            self._conclude("failed", "Stopped from outside. What was there before is whole.")
            raise
        except BaseException as error:
            self._conclude("failed", f"{type(error).__name__}: {error}".strip(": "))
            raise
        finally:
            self._report.seconds = {**self._seconds, "total": time.monotonic() - began}
            self._report.write(self._project)
        return self._report

    def _run(self) -> None:
        self._task("services", lambda: check_reachable(self._workspace.settings), network=True)
        _check_alone(load_params(self._project.params))
        self._workspace.trust.check_signer()
        check_policy(self._workspace.services)
        _log.info(self._workspace.trust.describe())
        self._workspace.services.start_s3()
        if self._workspace.settings.inbox:
            self._inbox = self._task("inbox", self._take_in, network=True)
        self._task("fetch", self._fetch, network=True)
        version = self._task("version", self._version, network=True)
        _name_again()
        if not self._force and (found := unchanged_since(self._workspace)):
            self._report = found
            return
        self._succession.begin()
        params = load_params(self._project.params)
        for name in self._workspace.pipeline.stages():
            self._stage(name)
        self._describe(params, version)
        self._keep_versions()
        if not self._report.gate.passed:
            failed = [check["name"] for check in self._report.gate.checks if not check["passed"]]
            self._conclude("rejected", f"The gate refused the model: {', '.join(failed)}.")
            return
        release = self._task("publish", lambda: self._publish(params), network=True)
        registered = self._task("register", lambda: self._register(params, release), network=True)
        self._conclude(*self._succession.settle(release, registered))
        remember(self._workspace, self._report)

    def _task(self, name: str, call: Callable[[], _Result], network: bool = False) -> _Result:
        """Run one thing as a named Prefect task and keep its time."""
        began = time.monotonic()
        wrapped = Task(
            call,
            name=name,
            task_run_name=name,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=2 if network else 0,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_is_passing,
        )
        try:
            return wrapped()
        finally:
            self._seconds[name] = time.monotonic() - began

    def _take_in(self) -> Inbox | None:
        inbox = look(self._workspace, self._workspace.services)
        if inbox and inbox.new:
            ui.show_inbox(inbox.name, take(self._workspace, inbox, self._progress))
        return inbox

    def _fetch(self) -> None:
        said = fetch_data(self._project, self._workspace.pipeline, self._progress)
        _log.info(said)

    def _version(self) -> str:
        pipeline = self._workspace.pipeline
        version = pipeline.data_version()
        if version is None or pipeline.data_changed():
            version = pipeline.version_data("photos")
            _log.info("data/ changed; it is version %s now.", version)
        if self._inbox:
            self._inbox.remember(version)
        self._report.data.version = version
        self._report.data.quarantined = quarantined(self._project)
        if pipeline.has_remote():
            _log.info("%d files pushed to the DVC remote.", pipeline.push_data())
        return version

    def _stage(self, name: str) -> None:
        def run() -> str:
            token = runner.set(shard_runner(self._workspace.settings.dask_address))
            try:
                outcome = self._workspace.pipeline.run(name, self._force, self._shown)
            finally:
                runner.reset(token)
            _log.info("Stage %s: %s.", name, outcome)
            return outcome

        self._outcomes[name] = self._task(name, run)
        if name == "audit":
            ui.show_audit(self._project)
        elif name == "preprocess":
            self._succession.show_changes()

    def _describe(self, params: Params, version: str) -> None:
        """Read what the stages found into the report and show it."""
        project, report = self._project, self._report
        report.data = data_report(project, version)
        report.data.changes = self._succession.changes
        report.features = features_report(project, params, ran=self._outcomes["features"] == "ran")
        report.phases = phase_reports(project, params, self._seconds)
        report.test = test_report(project)
        report.gate = gate_report(project)
        ui.show_phases(project, report.phases)
        ui.show_evaluation(project, report.test)
        ui.show_gate(report.gate)

    def _keep_versions(self) -> None:
        ui.show_versions(version_files(self._project))
        if branch := self._workspace.settings.git_push:
            commit = partial(commit_versions, self._project, branch, self._report)
            _log.info("Branch %s: %s.", branch, self._task("git", commit, network=True))

    def _publish(self, params: Params) -> Release:
        release = publish_release(self._workspace, params, self._report)
        self._report.release = ReleaseReport(id=release.id, uri=release.uri)
        ui.show_release(release.uri, self._workspace.storage.address.endpoint_url)
        return release

    def _register(self, params: Params, release: Release) -> Version:
        registry = self._workspace.registry
        run = record_run(self._workspace, params, self._report, release)
        version = registry.register(run, release.id, {"release_uri": release.uri})
        registry.set_alias(CHALLENGER, version.number)
        self._report.model = ModelReport(
            name=registry.model_name, version=version.number, alias=CHALLENGER
        )
        return version

    def _conclude(self, status: Any, reason: str) -> None:
        self._report.status, self._report.reason = status, reason
        level = _log.error if status in ("failed", "rejected") else _log.info
        level("%s: %s", status, reason)


def _check_alone(params: Params) -> None:
    """Refuse what would wait for others that never come: no two retrains train together."""
    workers = named_workers()
    if params.training.mode == "end_to_end" and len(workers) > 1:
        raise SettingsError(
            f"A retrain trains in one process, and TF_CONFIG names {len(workers)} workers "
            f"({', '.join(workers)}). Run `dvc repro` on each of them, then unset TF_CONFIG and "
            "retrain on one: it finds the stages done."
        )


def _is_passing(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failure may pass by itself: only that of a service."""
    return isinstance(state.data, ServiceError)

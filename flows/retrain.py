"""The main flow: what `dvc repro` does, and then everything that leaves this machine.

The stages come from `dvc.yaml`, in the graph's order. The flow adds what is not
reproducible: fetching photos, versioning them, publishing, registering, promoting
and telling. Only calls that cross the network are tried again.
"""

import datetime
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from httpx import HTTPError
from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import exponential_backoff

from flows.champions.policy import check_policy
from flows.champions.succession import Succession
from flows.exclusion import holder, only_retrain
from flows.inbox import look, take
from flows.loopback.local import check_reachable
from flows.notification import tell_bad_end
from flows.reports import artifacts, findings
from flows.reports.publication import publish_release, record_run
from flows.reports.record import remember, unchanged_since
from flows.reports.report import ModelReport, ReleaseReport, RunReport
from flows.reports.versions import commit_versions, recorded_version, version_files
from flows.settings import load_settings
from flows.shards import shard_runner
from flows.shown_progress import ShownProgress
from flows.workspace import Workspace
from tasks.activations.shards import runner
from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.incoming.fetch import fetch_data
from tasks.incoming.inbox import Inbox
from tasks.layout import Layout
from tasks.params import Params, load_params
from tasks.progress import Progress, silent
from tasks.releases.release import Release
from tasks.services.registry import CHALLENGER, Version
from tasks.training.workers import named_workers

listener: ContextVar[Progress] = ContextVar("listener", default=silent)
"""Whom a flow in this process tells how far it is; the command line sets it."""

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


def _name() -> str:
    version = recorded_version(Layout(Path.cwd()).data_file)
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
    layout = Layout(Path.cwd())
    with only_retrain(layout) as alone:
        if not alone:
            return Cancelled(message=f"Another retrain of this checkout runs: {holder(layout)}.")
        # Until this run writes its own: a report of an earlier one must not pass for it.
        layout.run.unlink(missing_ok=True)
        with Workspace(layout, load_settings()) as workspace:
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
        self._layout = workspace.layout
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
            place = error.filename or self._layout.artifacts
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
            self._report.write(self._layout)
        return self._report

    def _run(self) -> None:
        self._task("services", lambda: check_reachable(self._workspace.settings), network=True)
        _check_alone(load_params(self._layout.params))
        self._workspace.trust.check_signer()
        check_policy(self._workspace.services)
        _log.info(self._workspace.trust.told())
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
        params = load_params(self._layout.params)
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
            artifacts.show_inbox(inbox.name, take(self._workspace, inbox, self._progress))
        return inbox

    def _fetch(self) -> None:
        said = fetch_data(self._layout, self._workspace.pipeline, self._progress)
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
        self._report.data.quarantined = findings.quarantined(self._layout)
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
            artifacts.show_audit(self._layout)
        elif name == "preprocess":
            self._succession.show_changes()

    def _describe(self, params: Params, version: str) -> None:
        """Read what the stages found into the report and show it."""
        layout, report = self._layout, self._report
        report.data = findings.data_report(layout, version)
        report.data.changes = self._succession.changes
        report.features = findings.features_report(
            layout, params, ran=self._outcomes["features"] == "ran"
        )
        report.phases = findings.phase_reports(layout, params, self._seconds)
        report.test = findings.test_report(layout)
        report.gate = findings.gate_report(layout)
        artifacts.show_phases(layout, report.phases)
        artifacts.show_evaluation(layout, report.test)
        artifacts.show_gate(report.gate)

    def _keep_versions(self) -> None:
        artifacts.show_versions(version_files(self._layout))
        if branch := self._workspace.settings.git_push:
            commit = partial(commit_versions, self._layout, branch, self._report)
            _log.info("Branch %s: %s.", branch, self._task("git", commit, network=True))

    def _publish(self, params: Params) -> Release:
        release = publish_release(self._workspace, params, self._report)
        self._report.release = ReleaseReport(id=release.id, uri=release.uri)
        artifacts.show_release(release.uri, self._workspace.storage.address.endpoint_url)
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

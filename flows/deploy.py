"""Work pools, deployments and automations of a Prefect server."""

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from pydantic import BaseModel, ConfigDict

from flows.local.clients import HEARTBEAT_SECONDS, TAG, point_prefect_at
from flows.local.credentials import local_credentials
from flows.local.servers import POOL
from flows.notify import UNHEARD
from flows.preflight import retrain_lock
from flows.settings import Settings
from tasks.errors import ServiceError, SettingsError, first_fault
from tasks.project import Project
from tasks.services.s3 import redact_url

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import State
    from prefect.client.schemas.objects import Flow, FlowRun
    from prefect.events import AutomationCore

FILE = "prefect.yaml"
TEMPLATES = Path("docker/pools")
POOLS = {POOL: "process", f"{POOL}-docker": "docker", f"{POOL}-kubernetes": "kubernetes"}
"""Work pools and their types."""
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
"""Without an event for this long, a run counts as crashed."""
START_SECONDS = 900
"""A worker that took a run and did not start it in this time is gone, image pull and all."""
SILENT = "Mark silent runs as crashed"
NEVER_STARTED = "Mark runs that never start as crashed"
FLOWS = ("retrain", "promote", "rollback")
CRASH_FLOW = "tell/crash"
DEPLOY_SECONDS = 120
LOST = (
    "The service stopped while this run was under way. "
    "What was there before is whole; run it again."
)


class Deployment(BaseModel):
    """One entry of `prefect.yaml`, as far as it is read here."""

    model_config = ConfigDict(extra="allow")

    name: str
    entrypoint: str
    work_pool: dict[str, Any]

    @property
    def full_name(self) -> str:
        """`<flow>/<deployment>`, as the server calls it."""
        return f"{self.entrypoint.rpartition(':')[2]}/{self.name}"


class PrefectFile(BaseModel):
    """`prefect.yaml`."""

    model_config = ConfigDict(extra="allow")

    deployments: list[Deployment]

    def on(self, pool: str) -> str:
        """Return the file's text with every deployment on one work pool."""
        content = self.model_dump()
        for one in content["deployments"]:
            one["work_pool"]["name"] = pool
        return yaml.safe_dump(content)


def declared_deployments(project: Project) -> PrefectFile:
    """Read `prefect.yaml`.

    Raises:
        SettingsError: it cannot be read, or holds no deployments.
    """
    path = project.root / FILE
    with _readable(path):
        return PrefectFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def pool_template(project: Project, kind: str) -> dict[str, Any]:
    """Return the base job template of a `process`, `docker` or `kubernetes` pool.

    Raises:
        SettingsError: the template cannot be read.
    """
    if kind != "process":
        path = project.root / TEMPLATES / f"{kind}.json"
        with _readable(path):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["working_dir"]["default"] = str(project.root.resolve())
    return template


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        raise SettingsError(
            f"'{path}' cannot be read ({first_fault(error)}). Correct it, or restore it from git."
        ) from error


def deploy(
    project: Project,
    settings: Settings,
    api: str,
    pool: str = POOL,
    silence: float = SILENCE_SECONDS,
) -> list[str]:
    """Register pools, deployments and automations, or bring them up to date.

    Args:
        project: the checkout.
        settings: name the server, unless it is the local one.
        api: URL of Prefect's API.
        pool: which of `POOLS` runs the deployments.
        silence: seconds without an event after which a run counts as crashed.

    Returns:
        Names of the deployments, `<flow>/<deployment>`.

    Raises:
        SettingsError: a file of the checkout cannot be read.
        ServiceError: the server does not answer, or refuses.
    """
    declared = declared_deployments(project)
    point_prefect_at(api, project.local.resolve(), settings)
    templates = {name: pool_template(project, kind) for name, kind in POOLS.items()}
    with asking(api):
        asyncio.run(_register_pools(templates, _owner(project)))
        _deploy_flows(project, declared.on(pool))
        asyncio.run(_register_automations(silence))
    return [one.full_name for one in declared.deployments]


@contextmanager
def asking(api: str) -> Iterator[None]:
    """Turn errors of Prefect's client into one line that names the server."""
    from prefect.exceptions import PrefectException

    try:
        yield
    except (httpx.HTTPError, PrefectException, subprocess.TimeoutExpired) as error:
        raise ServiceError(
            f"Prefect at {redact_url(api)} failed ({type(error).__name__}). Check PREFECT_API_URL, "
            "its login and the server's log, then run again."
        ) from error


def check_owner(project: Project, settings: Settings, api: str) -> None:
    """Refuse a work pool whose flow runs start in another checkout.

    Raises:
        SettingsError: another checkout's worker serves the pool.
    """
    point_prefect_at(api, project.local.resolve(), settings)
    with asking(api):
        owner, served = asyncio.run(_pool_owner())
    if served and owner not in (None, _owner(project)):
        raise SettingsError(
            f"The work pool {POOL!r} belongs to another checkout, whose worker is up: {owner}. "
            "Run `handsigns down` there (a worker that was killed counts as up for 90 s), or "
            "name another DATABASE_URL or PREFECT_API_URL."
        )


def _owner(project: Project) -> str:
    """Describe a checkout so that its pool is not taken for another's."""
    key = local_credentials(project.local.resolve()).access_key_id
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return f"{project.root.resolve()} on {socket.gethostname()}, checkout {digest}"


async def _pool_owner() -> tuple[str | None, bool]:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    async with get_client() as client:
        try:
            pool = await client.read_work_pool(POOL)
        except ObjectNotFound:
            return None, False
    return pool.description, await _has_worker()


def wait_for_worker(seconds: float) -> None:
    """Return once a worker of the process pool has reported to the server.

    Raises:
        ServiceError: none did within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not asyncio.run(_has_worker()):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"No worker reported to the pool {POOL!r} in {seconds:.0f} s. "
                "See .local/logs/worker.log."
            )
        time.sleep(0.5)


async def _has_worker() -> bool:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        workers = await client.read_workers_for_work_pool(POOL)
    return any(worker.status == "ONLINE" for worker in workers)


async def _register_pools(templates: dict[str, dict[str, Any]], owner: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    async with get_client() as client:
        for name, template in templates.items():
            about: dict[str, Any] = {"base_job_template": template}
            if name == POOL:
                about["description"] = owner
            try:
                await client.create_work_pool(WorkPoolCreate(name=name, type=POOLS[name], **about))
            except ObjectAlreadyExists:  # and somebody may have paused or limited it
                await client.update_work_pool(name, WorkPoolUpdate(**about))


def _deploy_flows(project: Project, declared: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / FILE
        file.write_text(declared, encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(  # noqa: S603, the command is ours
            [*command, "--prefect-file", str(file)],
            cwd=project.root,
            env={**os.environ, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=DEPLOY_SECONDS,
        )
    if done.returncode:
        reason = textwrap.shorten(done.stderr or done.stdout, 400, placeholder=" …")
        raise ServiceError(f"Prefect did not take the deployments: {reason}")


def automation(
    name: str, after: tuple[str, ...], silence: float, notifier: "UUID"
) -> "AutomationCore":
    """Describe an automation that marks silent runs as crashed; a heartbeat is an event, too.

    It concerns runs with our tag only: others of the same name may beat more slowly.

    Args:
        name: names the automation.
        after: events of a run after which another must come.
        silence: seconds that may pass until then.
        notifier: deployment that notifies people.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events import AutomationCore, EventTrigger, Posture, ResourceSpecification
    from prefect.events.actions import ChangeFlowRunState, RunDeployment

    ours = [
        {"prefect.resource.role": ["flow"], "prefect.resource.name": list(FLOWS)},
        {"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{TAG}"]},
    ]
    # A bare template would be taken for an object and not for its text.
    run = {"__prefect_kind": "jinja", "template": "{{ labels.prefect.resource.id }}"}
    return AutomationCore(
        name=name,
        description="A run whose process is gone sends no heartbeats and cannot say so itself.",
        trigger=EventTrigger(
            after={f"prefect.flow-run.{event}" for event in after},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=[ResourceSpecification(one) for one in ours],
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"{UNHEARD} for {silence:.0f} s: its process, its "
                "worker or its machine is gone. What was there before is whole; run it again.",
            ),
            RunDeployment(deployment_id=notifier, parameters={"run": run}),
        ],
    )


async def _register_automations(silence: float) -> None:
    from prefect.client.orchestration import get_client

    kinds = {
        SILENT: (("Running", "heartbeat", "Cancelling"), silence),
        NEVER_STARTED: (("Pending",), START_SECONDS),
    }
    async with get_client() as client:
        notifier = (await client.read_deployment_by_name(CRASH_FLOW)).id
        for name, (after, seconds) in kinds.items():
            wanted = automation(name, after, seconds, notifier)
            if known := await client.read_automations_by_name(name):
                await client.update_automation(known[0].id, wanted)
            else:
                await client.create_automation(wanted)


def mark_lost_runs(project: Project, without_pool: bool) -> None:
    """Mark runs of this checkout that a fresh local server shows as under way as crashed.

    To be called after `deploy` and before the worker starts. Nothing is marked where a
    retrain of the checkout is under way; the automations see to it then.

    Args:
        project: the checkout.
        without_pool: also those that a command line started; not on a database that other
            checkouts may use.
    """
    from flows.notify import tell_bad_end

    with retrain_lock(project) as alone:
        lost = asyncio.run(_mark_crashed(without_pool)) if alone else []
    for flow, run, state in lost:
        tell_bad_end(flow, run, state)


async def _mark_crashed(without_pool: bool) -> "list[tuple[Flow, FlowRun, State[Any]]]":
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    kinds = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
    under_way = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds)),
        tags=FlowRunFilterTags(all_=[TAG]),
    )
    marked = []
    async with get_client() as client:
        for run in await client.read_flow_runs(flow_run_filter=under_way):
            if run.work_pool_name == POOL or (without_pool and run.work_pool_name is None):
                state: State[Any] = Crashed(message=LOST)
                await client.set_flow_run_state(run.id, state, force=True)
                marked.append((await client.read_flow(run.flow_id), run, state))
    return marked

"""Work pools, deployments and automations of a Prefect server."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from pydantic import BaseModel, ConfigDict

from flows.local.member import POOL
from flows.local.servers import HEARTBEAT_SECONDS, TAG, point_prefect_at
from flows.notify import UNHEARD
from flows.preflight import retrain_lock
from flows.settings import Settings
from tasks.errors import ServiceError, SettingsError, first_fault
from tasks.project import Project
from tasks.services.s3 import redact_url

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import State
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Flow, FlowRun
    from prefect.events import AutomationCore

FILE = "prefect.yaml"
TEMPLATES = Path("docker/pools")
POOLS = {POOL: "process", f"{POOL}-docker": "docker", f"{POOL}-kubernetes": "kubernetes"}
"""Work pools and their types."""


class Deployment(BaseModel):
    """One entry of `prefect.yaml`; what is not named here is Prefect's affair."""

    model_config = ConfigDict(extra="allow")

    name: str
    entrypoint: str
    work_pool: dict[str, Any]

    @property
    def full_name(self) -> str:
        """The name that the server knows it by, `<flow>/<deployment>`."""
        return f"{self.entrypoint.rpartition(':')[2]}/{self.name}"


class Declared(BaseModel):
    """`prefect.yaml`."""

    model_config = ConfigDict(extra="allow")

    deployments: list[Deployment]

    def on(self, pool: str) -> str:
        """The file's text with every deployment on one work pool."""
        content = self.model_dump()
        for one in content["deployments"]:
            one["work_pool"]["name"] = pool
        return yaml.safe_dump(content)


def declared_deployments(project: Project) -> Declared:
    """Read `prefect.yaml`.

    Raises:
        SettingsError: it cannot be read, or holds no deployments.
    """
    path = project.root / FILE
    with _readable(path):
        return Declared.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def pool_template(project: Project, kind: str) -> dict[str, Any]:
    """Return the base job template of a pool.

    Args:
        project: the checkout, in which processes run.
        kind: `process`, `docker` or `kubernetes`.

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
            f"What is declared for Prefect cannot be read. Received: '{path}' "
            f"({first_fault(error)}). Mend it, or take it back from git."
        ) from error


SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
"""Without a sign of life for this long, a run counts as crashed."""
START_SECONDS = 900
"""A worker that took a run and did not start it in this time is gone, image pull and all."""
SILENT = "Mark silent runs as crashed"
NEVER_STARTED = "Mark runs that never start as crashed"
FLOWS = ("retrain", "promote", "rollback")
TELLER = "tell/crash"
RUN = {"__prefect_kind": "jinja", "template": "{{ labels.prefect.resource.id }}"}
"""Named as a template, for a bare one is taken for an object and not for its text."""
DEPLOY_SECONDS = 120


def deploy(
    project: Project,
    settings: Settings,
    api: str,
    pool: str = POOL,
    silence: float = SILENCE_SECONDS,
) -> list[str]:
    """Register everything, or bring it up to date.

    Args:
        project: the checkout.
        settings: say whose server it is.
        api: URL of Prefect's API.
        pool: which of `POOLS` runs the deployments.
        silence: seconds without a sign of life after which a run counts as crashed.

    Returns:
        Names of the deployments, `<flow>/<deployment>`.

    Raises:
        SettingsError: what the checkout declares cannot be read.
        ServiceError: the server does not answer, or refuses, with its own words.
    """
    declared = declared_deployments(project)
    point_prefect_at(api, project.local.resolve(), settings)
    templates = {name: pool_template(project, kind) for name, kind in POOLS.items()}
    with asking(api):
        asyncio.run(_register_pools(templates))
        _deploy_flows(project, declared.on(pool))
        asyncio.run(_register_automations(silence))
    return [one.full_name for one in declared.deployments]


@contextmanager
def asking(api: str) -> Iterator[None]:
    """Turn what Prefect's client raises into one line that names the server."""
    from prefect.exceptions import PrefectException

    try:
        yield
    except (httpx.HTTPError, PrefectException, subprocess.TimeoutExpired) as error:
        raise ServiceError(
            f"Prefect did not do as asked ({type(error).__name__}). Received: {redact_url(api)}. "
            "Check PREFECT_API_URL, its login and the server's log, then run again."
        ) from error


def wait_for_worker(seconds: float) -> None:
    """Return once a worker of the process pool has reported to the server.

    Args:
        seconds: longest wait.

    Raises:
        ServiceError: none did.
    """
    deadline = time.monotonic() + seconds
    while not asyncio.run(_has_worker()):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"No worker reported to the pool {POOL!r} in {seconds:.0f} s. "
                "Look at .local/logs/worker.log."
            )
        time.sleep(0.5)


def automation(
    name: str, after: tuple[str, ...], silence: float, teller: "UUID"
) -> "AutomationCore":
    """Describe an automation that marks runs as crashed of which nothing is heard.

    Every event of a run, a heartbeat too, is a sign of life. Only our own flows are
    meant, which the tag tells from others of the same name: those may beat more slowly.

    Args:
        name: names the automation.
        after: events of a run after which another must come.
        silence: seconds that may pass until then.
        teller: deployment that tells people of it.

    Returns:
        The automation, not registered yet.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events import AutomationCore, EventTrigger, Posture, ResourceSpecification
    from prefect.events.actions import ChangeFlowRunState, RunDeployment

    return AutomationCore(
        name=name,
        description="A run whose process is gone sends no heartbeats and cannot say so itself.",
        trigger=EventTrigger(
            after={f"prefect.flow-run.{event}" for event in after},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=[
                ResourceSpecification(
                    {"prefect.resource.role": ["flow"], "prefect.resource.name": list(FLOWS)}
                ),
                ResourceSpecification(
                    {
                        "prefect.resource.role": ["tag"],
                        "prefect.resource.id": [f"prefect.tag.{TAG}"],
                    }
                ),
            ],
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
            RunDeployment(deployment_id=teller, parameters={"run": RUN}),
        ],
    )


async def _register_pools(templates: dict[str, dict[str, Any]]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    async with get_client() as client:
        for name, template in templates.items():
            pool = WorkPoolCreate(name=name, type=POOLS[name], base_job_template=template)
            try:
                await client.create_work_pool(pool)
            except ObjectAlreadyExists:  # and may be paused, or limited, by somebody
                await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


async def _register_automations(silence: float) -> None:
    from prefect.client.orchestration import get_client

    kinds = {
        SILENT: (("Running", "heartbeat", "Cancelling"), silence),
        NEVER_STARTED: (("Pending",), START_SECONDS),
    }
    async with get_client() as client:
        teller = (await client.read_deployment_by_name(TELLER)).id
        for name, (after, seconds) in kinds.items():
            await _keep_automation(client, automation(name, after, seconds, teller))


async def _keep_automation(client: "PrefectClient", wanted: "AutomationCore") -> None:
    known = await client.read_automations_by_name(wanted.name)
    if known:
        await client.update_automation(known[0].id, wanted)
    else:
        await client.create_automation(wanted)


async def _has_worker() -> bool:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        workers = await client.read_workers_for_work_pool(POOL)
    return any(worker.status == "ONLINE" for worker in workers)


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
        said = " ".join((done.stderr or done.stdout).split())
        raise ServiceError(f"Prefect took no deployment. It said: {said[-400:]}")


LOST = (
    "The service stopped while this run was under way. "
    "What was there before is whole; run it again."
)


def mark_lost_runs(project: Project) -> None:
    """Mark our own runs that a local server has as under way as crashed, and tell people of it.

    To be called while a server that was just started has no worker yet; `deploy` has
    pointed this process at it. Runs of other pools live elsewhere. Where a retrain of the
    checkout lives all the same, nothing is marked: the automations of
    `flows.deploy` see to it.

    Args:
        project: the checkout.
    """
    from flows.notify import tell_bad_end

    with retrain_lock(project) as alone:
        lost = asyncio.run(_mark()) if alone else []
    for flow, run, state in lost:
        tell_bad_end(flow, run, state)


async def _mark() -> "list[tuple[Flow, FlowRun, State[Any]]]":
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
    kinds = FlowRunFilterStateType(any_=under_way)
    marked = []
    async with get_client() as client:
        ours = FlowRunFilter(
            state=FlowRunFilterState(type=kinds), tags=FlowRunFilterTags(all_=[TAG])
        )
        for run in await client.read_flow_runs(flow_run_filter=ours):
            if run.work_pool_name not in (None, POOL):
                continue
            state: State[Any] = Crashed(message=LOST)
            await client.set_flow_run_state(run.id, state, force=True)
            marked.append((await client.read_flow(run.flow_id), run, state))
    return marked

"""Work pools, deployments and automations of a Prefect server.

Prefect reads its address once, when it is imported; until `point_prefect_at` nothing may.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from flows.local.clients import HEARTBEAT_SECONDS, TAG, point_prefect_at
from flows.local.servers import POOL
from flows.settings import Settings
from tasks.errors import BusyError, ServiceError, SettingsError, first_fault
from tasks.project import Project
from tasks.services.s3 import redact_url

if TYPE_CHECKING:
    from prefect import State
    from prefect.client.schemas.objects import Flow, FlowRun

FILE = "prefect.yaml"
POOLS = {POOL: "process", f"{POOL}-docker": "docker", f"{POOL}-kubernetes": "kubernetes"}
"""Work pools and their types."""
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
"""Without an event for this long, a run counts as crashed."""
START_SECONDS = 900
"""A worker that took a run and did not start it in this time is gone, image pull and all."""
FLOWS = ("retrain", "promote", "rollback")
CRASH_FLOW = "notify-crash/crash"
DEPLOY_SECONDS = 120
LOST = (
    "The service stopped while this run was under way. "
    "What was there before is intact; run it again."
)


def declared_deployments(project: Project, pool: str = POOL) -> tuple[list[str], dict[str, Any]]:
    """Names, `<flow>/<deployment>`, and content of `prefect.yaml` for this work pool."""
    path, names = project.root / FILE, []
    try:
        content = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        for one in content["deployments"]:
            names.append(f"{one['entrypoint'].rpartition(':')[2]}/{one['name']}")
            one["work_pool"] = {**one["work_pool"], "name": pool}
    except (OSError, ValueError, yaml.YAMLError, TypeError, LookupError) as error:
        raise SettingsError(
            f"'{path}' cannot be read ({first_fault(error)}). Correct it, or restore it from git."
        ) from error
    return names, content


def pool_template(project: Project, kind: str) -> dict[str, Any]:
    """Return the base job template of a `process`, `docker` or `kubernetes` pool."""
    if kind != "process":
        path = project.root / "docker/pools" / f"{kind}.json"
        return dict(json.loads(path.read_text(encoding="utf-8")))
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["working_dir"]["default"] = str(project.root.resolve())
    return template


def deploy(
    project: Project,
    settings: Settings,
    api: str,
    pool: str = POOL,
    silence: float = SILENCE_SECONDS,
) -> list[str]:
    """Register pools, deployments and automations; return the names of the deployments."""
    names, declared = declared_deployments(project, pool)
    point_prefect_at(api, project.local.resolve(), settings)
    templates = {name: pool_template(project, kind) for name, kind in POOLS.items()}
    with asking(api):
        asyncio.run(_register_pools(templates, _owner(project)))
        _deploy_flows(project, yaml.safe_dump(declared))
        asyncio.run(_register_automations(silence))
    return names


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
    """Refuse a work pool that another checkout has and serves: its runs would start there."""
    point_prefect_at(api, project.local.resolve(), settings)
    with asking(api):
        owner, served = asyncio.run(_pool_owner())
    if served and owner not in (None, _owner(project)):
        raise SettingsError(
            f"The work pool {POOL!r} belongs to another checkout, whose worker is up: {owner}. "
            "Run `handsigns down` there, after which it counts as up for 90 s more, or name "
            "another DATABASE_URL or PREFECT_API_URL."
        )


def _owner(project: Project) -> str:
    return f"{project.root.resolve()} on {socket.gethostname()}"


async def _pool_owner() -> tuple[str | None, bool]:
    """The checkout that registered the process pool, and whether a worker serves it."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    async with get_client() as client:
        try:
            pool = await client.read_work_pool(POOL)
        except ObjectNotFound:
            return None, False
        workers = await client.read_workers_for_work_pool(POOL)
    return pool.description, any(worker.status == "ONLINE" for worker in workers)


def wait_for_worker(seconds: float) -> None:
    """Return once a worker reported to the process pool; `ServiceError` if none does in time."""
    deadline = time.monotonic() + seconds
    while not asyncio.run(_pool_owner())[1]:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"No worker reported to the pool {POOL!r} in {seconds:.0f} s. "
                "See .local/logs/worker.log."
            )
        time.sleep(0.5)


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
    with tempfile.NamedTemporaryFile("w", suffix=f"-{FILE}", encoding="utf-8") as file:
        file.write(declared)
        file.flush()
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(  # noqa: S603, the command is ours
            [*command, "--prefect-file", file.name],
            cwd=project.root,
            env={**os.environ, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=DEPLOY_SECONDS,
        )
    if done.returncode:
        reason = textwrap.shorten(done.stderr or done.stdout, 400, placeholder=" …")
        raise ServiceError(f"Prefect did not take the deployments: {reason}")


async def _register_automations(silence: float) -> None:
    """Mark silent runs as crashed, and notify people; a heartbeat is an event, too."""
    from prefect.client.orchestration import get_client
    from prefect.events import AutomationCore

    from flows.ui import UNHEARD

    kinds = (
        ("Mark silent runs as crashed", ["Running", "heartbeat", "Cancelling"], silence),
        ("Mark runs that never start as crashed", ["Pending"], START_SECONDS),
    )
    # Runs with our tag only: others of the same name may beat more slowly.
    ours = [
        {"prefect.resource.role": ["flow"], "prefect.resource.name": list(FLOWS)},
        {"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{TAG}"]},
    ]
    # A bare template would be taken for an object and not for its text.
    run = {"__prefect_kind": "jinja", "template": "{{ labels.prefect.resource.id }}"}
    async with get_client() as client:
        crash = (await client.read_deployment_by_name(CRASH_FLOW)).id
        notify = {"type": "run-deployment", "source": "selected", "deployment_id": crash}
        for name, after, seconds in kinds:
            message = (
                f"{UNHEARD} for {seconds:.0f} s: its process, its worker or its machine is gone. "
                "What was there before is intact; run it again."
            )
            trigger = {
                "type": "event",
                "posture": "Proactive",
                "after": [f"prefect.flow-run.{event}" for event in after],
                "expect": ["prefect.flow-run.*"],
                "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
                "match_related": ours,
                "for_each": ["prefect.resource.id"],
                "threshold": 1,
                "within": seconds,
            }
            mark = {"type": "change-flow-run-state", "state": "CRASHED", "message": message}
            actions = [mark, {**notify, "parameters": {"run": run}}]
            wanted = AutomationCore.model_validate(
                {"name": name, "trigger": trigger, "actions": actions}
            )
            if known := await client.read_automations_by_name(name):
                await client.update_automation(known[0].id, wanted)
            else:
                await client.create_automation(wanted)


def mark_lost_runs(project: Project, without_pool: bool) -> None:
    """Mark runs that a fresh local server shows as under way as crashed, and notify people.

    Nothing is marked where a retrain of the checkout is under way. With `without_pool` also
    those that a command line started, which on a database that others use may be theirs.
    """
    from flows.run import retrain_lock
    from flows.ui import notify_bad_end

    lost = []
    with suppress(BusyError), retrain_lock(project):
        lost = asyncio.run(_mark_crashed(without_pool))
    for flow, run, state in lost:
        notify_bad_end(flow, run, state)


async def _mark_crashed(without_pool: bool) -> "list[tuple[Flow, FlowRun, State[Any]]]":
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Crashed

    kinds = ["PENDING", "RUNNING", "PAUSED", "CANCELLING"]
    under_way = FlowRunFilter.model_validate(
        {"state": {"type": {"any_": kinds}}, "tags": {"all_": [TAG]}}
    )
    marked = []
    async with get_client() as client:
        for run in await client.read_flow_runs(flow_run_filter=under_way):
            if run.work_pool_name == POOL or (without_pool and run.work_pool_name is None):
                state: State[Any] = Crashed(message=LOST)
                await client.set_flow_run_state(run.id, state, force=True)
                marked.append((await client.read_flow(run.flow_id), run, state))
    return marked

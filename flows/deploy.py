"""Work pools, deployments and automations of a Prefect server."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import yaml

from flows.local.clients import asking_prefect, point_prefect_at
from flows.local.servers import POOL
from flows.settings import Settings
from tasks.errors import ServiceError, SettingsError, first_fault
from tasks.project import Project

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def declared(project: Project) -> tuple[list[str], list[dict[str, Any]]]:
    """Names, `<flow>/<deployment>`, of the deployments in `prefect.yaml`, and its automations."""
    path = project.root / "prefect.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = [
            f"{one['entrypoint'].rpartition(':')[2]}/{one['name']}"
            for one in content["deployments"]
        ]
        return names, content["automations"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, LookupError) as error:
        raise SettingsError(
            f"'{path}' cannot be read ({first_fault(error)}). Correct it, or restore it from git."
        ) from error


def deploy(project: Project, settings: Settings, api: str, pool: str = POOL) -> list[str]:
    """Register a pool, deployments and automations; return the names of the deployments."""
    names, automations = declared(project)
    # Prefect reads its address once, when it is imported.
    point_prefect_at(api, project.local.resolve(), settings)
    with asking_prefect(api) as client:
        _register_pool(client, project, pool)
        _deploy_flows(project, pool)
        _register_automations(client, automations)
    return names


def check_owner(client: "SyncPrefectClient", project: Project) -> None:
    """Refuse a work pool that another checkout has and serves: its runs would start there."""
    owner, served = _pool_owner(client)
    if served and owner not in (None, _owner(project)):
        raise SettingsError(
            f"The work pool {POOL!r} belongs to another checkout, whose worker is up: {owner}. "
            "Run `handsigns down` there, after which it counts as up for 90 s more, or name "
            "another DATABASE_URL or PREFECT_API_URL."
        )


def _owner(project: Project) -> str:
    return f"{project.root.resolve()} on {socket.gethostname()}"


def _pool_owner(client: "SyncPrefectClient") -> tuple[str | None, bool]:
    """The checkout that registered the process pool, and whether a worker serves it."""
    from prefect.exceptions import ObjectNotFound

    try:
        pool, workers = client.read_work_pool(POOL), client.read_workers_for_work_pool(POOL)
    except ObjectNotFound:
        return None, False
    return pool.description, any(worker.status == "ONLINE" for worker in workers)


def wait_for_worker(client: "SyncPrefectClient", seconds: float) -> None:
    """Return once a worker reported to the process pool; `ServiceError` if none does in time."""
    deadline = time.monotonic() + seconds
    while not _pool_owner(client)[1]:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"No worker reported to the pool {POOL!r} in {seconds:.0f} s. "
                "See .local/logs/worker.log."
            )
        time.sleep(0.5)


def _register_pool(client: "SyncPrefectClient", project: Project, pool: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    kind, about = "process", {"description": _owner(project)}
    template: Any = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["working_dir"]["default"] = str(project.root.resolve())
    if pool != POOL:
        kind, about = pool.rpartition("-")[2], {}
        template = json.loads((project.root / f"docker/pools/{kind}.json").read_text())
    try:
        wanted = WorkPoolCreate(name=pool, type=kind, base_job_template=template, **about)
        client.create_work_pool(wanted)
    except ObjectAlreadyExists:  # and somebody may have paused or limited it
        client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template, **about))


def _deploy_flows(project: Project, pool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=project.root,
        env={**os.environ, "NO_COLOR": "1", "WORK_POOL": pool},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        reason = textwrap.shorten(done.stderr or done.stdout, 400, placeholder=" …")
        raise ServiceError(f"Prefect did not take the deployments: {reason}")


def _register_automations(
    client: "SyncPrefectClient", automations: Iterable[dict[str, Any]]
) -> None:
    from prefect.events import AutomationCore

    for content in automations:
        for action in content["actions"]:
            if name := action.pop("deployment", None):
                action["deployment_id"] = str(client.read_deployment_by_name(name).id)
        wanted = AutomationCore.model_validate({**content, "description": json.dumps(content)})
        known = client.read_automations_by_name(wanted.name)
        if not known:
            client.create_automation(wanted)
        elif known[0].description != wanted.description:
            # What it has seen is forgotten then, and so are runs that ended with the server.
            client.update_automation(known[0].id, wanted)

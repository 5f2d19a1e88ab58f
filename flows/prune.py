"""Prune: remove what no champion, alias, tag or rollback needs.

Prefect reads its address when it is imported, so this module is imported after
`point_prefect_at`.
"""

import asyncio
import datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import ui
from flows.local.clients import TAG
from flows.run import retrain_lock
from flows.settings import load_settings
from flows.workspace import Workspace
from tasks.errors import HandsignsError
from tasks.project import Project
from tasks.releases.catalog import prune_releases
from tasks.stage import Progress, silent

KEEP = 5
DAYS = 30.0


def remove_unneeded(
    workspace: Workspace,
    keep: int = KEEP,
    days: float = DAYS,
    dry_run: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Remove old releases, cached photos that nothing names, and records of old runs.

    Args:
        workspace: the checkout and its services.
        keep: rollback depth; this many champions before the present one stay.
        days: what is younger stays.
        dry_run: only report; the size of cached photos is not known then.
        progress: called for each release.

    Returns:
        `releases`, `kept` with reasons, `bytes`, `local`, `cache_bytes` and `runs`.
    """
    project = workspace.project
    with retrain_lock(project):
        found = prune_releases(
            project, workspace.storage, workspace.registry, keep, days, dry_run, progress
        )
        versions = [
            workspace.storage.get(f"releases/{one.release}/{project.data_file.name}").decode()
            for one in found.kept
        ]
        freed = workspace.pipeline.remove_unused(versions, dry_run)
    known = workspace.services.prefect_named()
    runs = asyncio.run(_remove_runs(days, dry_run)) if known else 0
    return {**found.to_json(), "cache_bytes": freed, "runs": runs, "dry_run": dry_run}


def describe(found: dict[str, Any]) -> str:
    """One line of what was removed."""
    size = (found["bytes"] + found["cache_bytes"]) / 1e6
    verb = "would be removed" if found["dry_run"] else "removed"
    return (
        f"{len(found['releases'])} releases, {len(found['local'])} local copies and "
        f"{found['runs']} records of runs {verb}, {size:.1f} MB; {len(found['kept'])} releases stay"
    )


async def _remove_runs(days: float, dry_run: bool) -> int:
    limit = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    old = FlowRunFilter.model_validate({"end_time": {"before_": limit}, "tags": {"all_": [TAG]}})
    removed = 0
    async with get_client() as client:
        while runs := await client.read_flow_runs(flow_run_filter=old, offset=removed * dry_run):
            for run in runs:
                removed += 1
                if not dry_run:
                    await client.delete_flow_run(run.id)
    return removed


@flow(name="prune", flow_run_name="prune")
def prune(keep: int = KEEP, days: float = DAYS) -> State[Any]:
    """Remove what no champion, alias, tag or rollback needs.

    Args:
        keep: Rollback depth; this many champions before the present one stay.
        days: What is younger stays.
    """
    ui.log_to_prefect()
    try:
        with Workspace(Project(Path.cwd()), load_settings()) as workspace:
            return Completed(
                name="Pruned", message=describe(remove_unneeded(workspace, keep, days))
            )
    except HandsignsError as error:
        return Failed(name="Refused", message=str(error))

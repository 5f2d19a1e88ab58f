"""The other flows of the schedule: monitor production for drift, and prune what nobody needs."""

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.states import Completed

from flows import ui
from flows.local.clients import TAG
from flows.run import retrain_lock
from flows.workspace import Workspace
from tasks.data.capture import Store
from tasks.data.images import decode, resize
from tasks.data.traffic import RESULTS, Counts, count_window, read_result
from tasks.io import read_json
from tasks.model.augment import enlarge
from tasks.model.inference import Engine
from tasks.releases.catalog import prune_releases
from tasks.releases.quality import draw_traffic
from tasks.releases.release import open_release
from tasks.scoring.drift import Drift, compare_counts, compare_embeddings
from tasks.stage import Progress, silent

PHOTOS = 500  # kept photos of a window at most whose embeddings are compared

_log = logging.getLogger(__name__)


@flow(name="monitor", flow_run_name="monitor")
def monitor(hours: int = 24, retrain_after: int = 0) -> State[Any]:
    """Compare the last hours of production with the photos the champion was validated on.

    Args:
        hours: Length of the window.
        retrain_after: Start a retrain once as many new photos wait in the inbox; 0 never does.
    """
    return ui.state_of(lambda workspace: _monitor(workspace, hours, retrain_after))


@flow(name="prune", flow_run_name="prune")
def prune(keep: int = 5, days: float = 30.0) -> State[Any]:
    """Remove what no champion, alias, tag or rollback needs.

    Args:
        keep: Rollback depth; this many champions before the present one stay.
        days: What is younger stays.
    """
    return ui.state_of(
        lambda workspace: Completed(
            name="Pruned", message=describe_pruned(remove_unneeded(workspace, keep, days))
        )
    )


def _monitor(workspace: Workspace, hours: int, retrain_after: int) -> State[Any]:
    if retrain_after and (inbox := workspace.inbox()) and len(inbox.new) >= retrain_after:
        _log.info("%d new photos wait in the inbox; a retrain starts.", len(inbox.new))
        run_deployment("retrain/retrain", timeout=0)
    if workspace.champion() is None:
        return Completed(name="No champion", message="There is no champion to compare with.")
    release, folder = workspace.release("champion")
    if not (folder / "reference.npz").exists():
        return Completed(name="No reference", message=f"Release {release} has no reference.")
    store = workspace.traffic()
    counts = count_window(store, release, hours)
    found = compare_with_reference(folder, counts, store, hours)
    before = read_result(store, release)
    drifted = sorted(one.name for one in found if one.verdict == "drift")
    content = {
        "release": release,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hours": hours,
        "drift": drifted,
        "comparisons": [one.to_json() for one in found],
    }
    store.put(f"{RESULTS}/{release}.json", json.dumps(content, indent=2).encode())
    said = "; ".join(one.describe() for one in found)
    draw_traffic(folder, counts, workspace.project.traffic)
    ui.show_drift(found, said, workspace.project.traffic)
    if drifted and before.get("drift") != drifted:
        title = f"handsigns: drift of {', '.join(drifted)}"
        ui.notify_people(workspace.settings, title, said, ui.run_address())
    return Completed(name="Drift" if drifted else "No drift", message=said)


def compare_with_reference(release: Path, counts: Counts, store: Store, hours: int) -> list[Drift]:
    """Compare answers and kept photos of a window with the reference of a fetched release."""
    with np.load(release / "reference.npz") as reference:
        window = [counts.labels[label] for label in read_json(release / "labels.json")]
        return [
            compare_counts("labels", reference["labels"], window),
            compare_counts("confidences", reference["confidences"], counts.confidences),
            compare_embeddings(reference["embeddings"], _embed(release, store, hours)),
        ]


def _embed(release: Path, store: Store, hours: int) -> NDArray[np.float32]:
    """Embeddings of the random sample of photos that the service kept; float32 (n, d)."""
    preprocess = open_release(release).preprocess
    engine = Engine(release / "model.pb", embeddings=True)
    since = f"{datetime.now(UTC) - timedelta(hours=hours):%Y-%m-%dT%H%M%S}"
    keys = [key for key in store.keys("photos/") if "-sample-" in key]
    recent = sorted(key for key in keys if key.rpartition("/")[2] >= since)[-PHOTOS:]
    photos = (resize(decode(store.get(key)), preprocess) for key in recent)
    rows = [*engine.stream(enlarge(photo[np.newaxis], engine.size)[0] for photo in photos)]
    return np.array(rows, np.float32)


def remove_unneeded(
    workspace: Workspace, keep: int, days: float, dry_run: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Remove old releases, captured and cached photos, and records of old runs."""
    from flows.serve.review import open_captures

    project, storage = workspace.project, workspace.storage
    with retrain_lock(project):
        found = prune_releases(project, storage, workspace.registry, keep, days, dry_run, progress)
        names = (f"releases/{release}/{project.data_file.name}" for release in found.kept)
        versions = [storage.get(name).decode() for name in names]
        freed = workspace.pipeline.remove_unused(versions, dry_run)
    known = workspace.services.prefect_named()
    runs = _remove_runs(days, dry_run) if known else 0
    captures = open_captures(workspace)
    captured = captures.remove_expired(dry_run) if captures else 0
    counts = {"cache_bytes": freed, "runs": runs, "captured": captured}
    kept = [{"release": release, "reason": why} for release, why in found.kept.items()]
    return {**asdict(found), "kept": kept, **counts, "dry_run": dry_run}


def describe_pruned(found: dict[str, Any]) -> str:
    """One line of what was removed."""
    size = (found["bytes"] + found["cache_bytes"]) / 1e6
    verb = "would be removed" if found["dry_run"] else "removed"
    releases, copies, kept = (len(found[name]) for name in ("releases", "local", "kept"))
    return (
        f"{releases} releases, {copies} local copies, {found['captured']} captured photos and "
        f"{found['runs']} records of runs {verb}, {size:.1f} MB; {kept} releases stay"
    )


def _remove_runs(days: float, dry_run: bool) -> int:
    limit = datetime.now(UTC) - timedelta(days=days)
    old = FlowRunFilter.model_validate({"end_time": {"before_": limit}, "tags": {"all_": [TAG]}})
    removed = 0
    with get_client(sync_client=True) as client:
        while runs := client.read_flow_runs(flow_run_filter=old, offset=removed * dry_run):
            removed += len(runs)
            for run in () if dry_run else runs:
                client.delete_flow_run(run.id)
    return removed

"""The monitor flow: compare what production sees with the champion's reference, every hour."""

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed

from flows import ui
from flows.local.clients import traffic_store
from flows.notify import notify_people
from flows.settings import load_settings
from flows.workspace import Workspace
from tasks.data.images import decode, resize
from tasks.data.stores import Store
from tasks.data.traffic import RESULT, Counts, count_window, read_result
from tasks.errors import HandsignsError
from tasks.io import read_json
from tasks.model.augment import enlarge
from tasks.model.inference import Engine
from tasks.project import Project
from tasks.releases.release import open_release
from tasks.scoring import plots
from tasks.scoring.drift import BINS, Drift, compare_counts, compare_embeddings

PHOTOS = 500
"""Kept photos of a window at most whose embeddings are compared."""

_log = logging.getLogger(__name__)


@flow(name="monitor", flow_run_name="monitor")
def monitor(hours: int = 24, retrain_after: int = 0) -> State[Any]:
    """Compare the last hours of production with the photos the champion was validated on.

    Args:
        hours: Length of the window.
        retrain_after: Start a retrain once as many new photos wait in the inbox; 0 never does.
    """
    ui.log_to_prefect()
    try:
        with Workspace(Project(Path.cwd()), load_settings()) as workspace:
            if retrain_after and (waiting := _waiting(workspace)) >= retrain_after:
                _log.info("%d new photos wait in the inbox; a retrain starts.", waiting)
                run_deployment("retrain/retrain", timeout=0)
            return _monitor(workspace, hours)
    except HandsignsError as error:
        return Failed(name="Refused", message=str(error))


def _waiting(workspace: Workspace) -> int:
    inbox = workspace.inbox()
    return len(inbox.new) if inbox else 0


def _monitor(workspace: Workspace, hours: int) -> State[Any]:
    if workspace.champion() is None:
        return Completed(name="No champion", message="There is no champion to compare with.")
    release, folder = workspace.release("champion")
    if not (folder / "reference.npz").exists():
        return Completed(name="No reference", message=f"Release {release} has no reference.")
    store = traffic_store(workspace.settings, workspace.project)
    counts = count_window(store, release, hours)
    found = compare_with_reference(folder, counts, store, hours)
    before = read_result(store)
    drifted = sorted(one.name for one in found if one.verdict == "drift")
    content = {
        "release": release,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hours": hours,
        "drift": drifted,
        "comparisons": [one.to_json() for one in found],
    }
    store.put(RESULT, json.dumps(content, indent=2).encode())
    said = "; ".join(one.describe() for one in found)
    picture = workspace.project.local / "drift.png"
    _draw(folder, counts, picture)
    ui.show_drift(found, said, picture)
    if drifted and before.get("drift") != drifted:
        title = f"handsigns: drift of {', '.join(drifted)}"
        notify_people(workspace.settings, title, said, ui.run_address())
    return Completed(name="Drift" if drifted else "No drift", message=said)


def compare_with_reference(release: Path, counts: Counts, store: Store, hours: int) -> list[Drift]:
    """Compare labels, confidences and embeddings of a window with a release's reference.

    Args:
        release: folder of the fetched release.
        counts: what the service answered.
        store: where the service keeps photos.
        hours: length of the window.
    """
    labels = read_json(release / "labels.json")
    with np.load(release / "reference.npz") as reference:
        window = [counts.labels[label] for label in labels]
        confidences = [counts.confidences[number] for number in range(BINS)]
        return [
            compare_counts("labels", reference["labels"], window),
            compare_counts("confidences", reference["confidences"], confidences),
            compare_embeddings(reference["embeddings"], _embed(release, store, hours)),
        ]


def _draw(release: Path, counts: Counts, picture: Path) -> None:
    labels, bins = read_json(release / "labels.json"), range(BINS)
    with np.load(release / "reference.npz") as reference:
        figure = plots.shares(
            {
                "label": (labels, reference["labels"], [counts.labels[one] for one in labels]),
                "confidence": (
                    [f"{number / BINS:.1f}" for number in bins],
                    reference["confidences"],
                    [counts.confidences[number] for number in bins],
                ),
            }
        )
    plots.save(figure, picture)


def _embed(release: Path, store: Store, hours: int) -> NDArray[np.float32]:
    """Embeddings of the random sample of photos that the service kept; float32 (n, d)."""
    preprocess = open_release(release).preprocess
    engine = Engine(release / "model.pb", embeddings=True)
    since = f"{datetime.now(UTC) - timedelta(hours=hours):%Y-%m-%dT%H%M%S}"
    keys = [key for key in store.list("photos") if "-sample-" in key]
    recent = sorted(key for key in keys if key.rpartition("/")[2] >= since)[-PHOTOS:]
    photos = (resize(decode(store.get(key)), preprocess) for key in recent)
    rows = [*engine.stream(enlarge(photo[np.newaxis], engine.size)[0] for photo in photos)]
    return np.array(rows, np.float32)

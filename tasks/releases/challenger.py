"""Compare a new model with the champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import find_photos, name_photos, open_dataset
from tasks.errors import HandsignsError, PromotionError, ServiceError
from tasks.io import read_json
from tasks.model.inference import classify_files
from tasks.project import Project
from tasks.releases.champion import COMPARED_WITH, COMPARISON, COMPARISON_WON
from tasks.releases.pointer import Champion
from tasks.releases.release import DATASET_INDEX, fetch, open_release
from tasks.scoring.compare import Comparison, compare
from tasks.services.mlflow import Registry
from tasks.services.s3 import Storage
from tasks.stage import Progress, silent


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a challenger may become champion.

    Args:
        won: whether it may.
        reason: why, in one sentence without a full stop.
        comparison: None where there was nobody to compare with.
    """

    won: bool
    reason: str
    comparison: Comparison | None = None


def compare_with_champion(
    project: Project, storage: Storage, champion: Champion | None, progress: Progress = silent
) -> PromotionDecision:
    """Score the champion again on the test photos and compare the new model with it.

    Photos that the champion was trained on, and near-duplicates of those, are left out.

    Args:
        project: its `predictions.json` holds the challenger's probabilities.
        storage: bucket with the champion's release.
        champion: None where there is none yet.
        progress: called while photos are scored.

    Raises:
        PromotionError: the champion cannot be loaded, has its labels in another
            order, or has seen every test photo; or one of these cannot be read any more.
        ServiceError: the storage does not answer.
    """
    if champion is None:
        return PromotionDecision(True, "there was no champion")
    try:
        release = fetch(storage, champion.pointer.release, project.releases)
        classifier = open_release(release)
    except ServiceError:
        raise
    except HandsignsError as error:
        raise PromotionError(
            f"The champion cannot be scored, so nothing can be said to be no worse: {error} "
            "Promote a version by hand if that is right."
        ) from error
    photos, labels, challenger = _unseen_photos(project, release)
    found = classify_files(classifier, photos, progress)
    if lost := [f"'{one.path.name}' ({one.error})" for one in found if one.error]:
        raise PromotionError(
            f"Test photos changed while this ran: {len(lost)} unreadable, such as {lost[0]}. "
            "Leave data/ alone during a retrain, and run it again."
        )
    probabilities = np.array([one.probabilities for one in found])
    result = compare(probabilities, challenger, labels, [path.name for path in photos])
    return PromotionDecision(result.no_worse, result.reason, result)


def _unseen_photos(
    project: Project, release: Path
) -> tuple[list[Path], NDArray[np.int64], NDArray[np.float64]]:
    """Test photos new to the champion: paths, labels, the challenger's probabilities."""
    keys = {name: key for key, name in name_photos(find_photos(project.data)).items()}
    dataset = open_dataset(project.dataset)
    predicted = {
        one["name"]: one["probabilities"] for one in read_json(project.predictions)["photos"]
    }
    seen = _seen_photos(project, read_json(release / DATASET_INDEX) or {"photos": []})
    # A photo that went meanwhile is named by its path.
    paths = {row: keys.get(dataset.names[row], dataset.names[row]) for row in dataset.rows("test")}
    rows = [
        row for row, path in paths.items() if not seen & {path, Path(path).name, dataset.names[row]}
    ]
    if not rows:
        raise PromotionError(
            f"The champion, release {release.name}, was trained on every test photo or on a "
            "near-duplicate of it, so it cannot be compared. Promote a version by hand if that "
            "is right."
        )
    photos = [project.data / paths[row] for row in rows]
    return photos, dataset.labels[rows], np.array([predicted[dataset.names[row]] for row in rows])


def _seen_photos(project: Project, index: Mapping[str, Any]) -> set[str]:
    """Names and paths of photos that a release was trained on, with their near-duplicates.

    A photo is named by its file's name alone, or by its path where another has that name.
    """
    seen = {photo["name"] for photo in index["photos"] if photo["split"] != "test"}
    groups = (read_json(project.audit) or {}).get("groups", [])
    return seen.union(
        *(group for group in groups if seen & {*group, *(Path(path).name for path in group)})
    )


def record_comparison(
    registry: Registry, version: int, champion: Champion | None, decision: PromotionDecision
) -> None:
    """Tag a version with the result of its comparison, for a later `promote`."""
    tags = {
        COMPARED_WITH: champion.pointer.release if champion else "nobody",
        COMPARISON: decision.reason,
        COMPARISON_WON: "yes" if decision.won else "no",
    }
    registry.set_tags(version, tags)

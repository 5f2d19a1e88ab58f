"""The challenger against the champion, on the same test photos."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import HandsignsError, PromotionError, ServiceError
from tasks.layout import Layout
from tasks.network.classifier import classify_files
from tasks.pictures.dataset import open_dataset
from tasks.pictures.photos import find_photos, name_photos
from tasks.progress import Progress, silent
from tasks.releases.manifest import DATASET_INDEX
from tasks.releases.pointer import Champion
from tasks.releases.release import fetch
from tasks.releases.release_reader import open_release
from tasks.scoring.compare import Comparison, compare
from tasks.services.storage import Storage
from tasks.whole import read_json


@dataclass(frozen=True)
class Challenge:
    """Whether a challenger may become champion.

    Args:
        won: whether it may.
        reason: why, in one sentence.
        comparison: None where there was nobody to compare with.
    """

    won: bool
    reason: str
    comparison: Comparison | None = None


def challenge(
    layout: Layout, storage: Storage, champion: Champion | None, progress: Progress = silent
) -> Challenge:
    """Score the champion again on the test photos and compare the new model with it.

    Photos that the champion was trained on are left out: it would be examined on
    what it has seen.

    Args:
        layout: its `predictions.json` holds the challenger's probabilities.
        storage: holds the champion's release.
        champion: None where there is none yet.
        progress: told how far scoring is.

    Returns:
        The decision.

    Raises:
        PromotionError: the champion cannot be loaded, has its labels in another
            order, or has seen every test photo; or one of these cannot be read any more.
        ServiceError: the storage does not answer.
    """
    if champion is None:
        return Challenge(True, "there was no champion")
    try:
        release = fetch(storage, champion.pointer.release, layout.releases)
        classifier = open_release(release)
    except ServiceError:
        raise
    except HandsignsError as error:
        raise PromotionError(
            f"The champion cannot be scored, so nothing can be said to be no worse: {error} "
            "Promote a version by hand if that is right."
        ) from error
    photos, labels, challenger = _unseen(layout, release)
    found = classify_files(classifier, photos, progress)
    if lost := [f"'{one.path.name}' ({one.error})" for one in found if one.error]:
        raise PromotionError(
            f"Test photos changed while this ran. Received: {len(lost)} unreadable, such as "
            f"{lost[0]}. Leave data/ alone during a retrain, and run it again."
        )
    probabilities = np.array([one.probabilities for one in found])
    result = compare(probabilities, challenger, labels, [path.name for path in photos])
    return Challenge(result.no_worse, result.reason, result)


def _unseen(
    layout: Layout, release: Path
) -> tuple[list[Path], NDArray[np.int64], NDArray[np.float64]]:
    """Test photos that the champion was not trained on, and what the challenger says."""
    index = read_json(release / DATASET_INDEX) or {"photos": []}
    seen = {photo["name"] for photo in index["photos"] if photo["split"] != "test"}
    dataset = open_dataset(layout.dataset)
    predicted = {
        one["name"]: one["probabilities"] for one in read_json(layout.predictions)["photos"]
    }
    # A path is the name of a photo that was known by its file's name alone before another came.
    known = {row: Path(dataset.names[row]).name for row in dataset.rows("test")}
    rows = [row for row, file in known.items() if not seen & {dataset.names[row], file}]
    if not rows:
        raise PromotionError(
            "The champion was trained on every test photo, so it cannot be compared. Received: "
            f"release {release.name}. Promote a version by hand if that is right."
        )
    names = [dataset.names[row] for row in rows]
    labels = dataset.labels[rows]
    key_of = {name: key for key, name in name_photos(find_photos(layout.data)).items()}
    # One that went meanwhile is told by the name that it had.
    photos = [layout.data / key_of.get(name, name) for name in names]
    return photos, labels, np.array([predicted[name] for name in names])

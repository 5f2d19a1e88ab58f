"""Compare two releases on the photos that neither was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.dataset import Photo, find_photos, name_photos
from tasks.data.images import decode, resize_square
from tasks.errors import DataError
from tasks.io import atomic_write, read_json
from tasks.model.inference import classify_files
from tasks.project import Project
from tasks.releases.champion import seen_photos
from tasks.releases.release import DATASET_INDEX, open_release
from tasks.scoring.compare import Comparison, compare, differing_labels
from tasks.stage import Progress, silent

SHOWN = 24
"""Photos in the picture at most."""
COLUMNS = 6
SIDE = 160


def compare_releases(
    project: Project, releases: Mapping[str, Path], progress: Progress = silent
) -> tuple[Comparison, Path | None]:
    """Score two releases on the same photos, and draw those that they read differently.

    Args:
        releases: the older one first; their names, and their verified folders.

    Returns:
        The comparison, and the picture; None where the releases read all photos alike.
    """
    first, second = (open_release(folder) for folder in releases.values())
    if fault := differing_labels(first.labels, second.labels):
        raise DataError(
            f"The releases {' and '.join(releases)} cannot be compared, for {fault}. Name two "
            "with the same labels."
        )
    photos = _unseen(project, [*releases.values()], first.labels)
    labels = np.array([first.labels.index(photo.label) for photo in photos])
    paths = [project.data / photo.key for photo in photos]
    rows = []
    for classifier in (first, second):
        found = classify_files(classifier, paths, progress)
        if bad := [f"'{one.path}' ({one.error})" for one in found if one.error]:
            raise DataError(
                f"{len(bad)} photos cannot be read, such as {bad[0]}. Import them anew."
            )
        rows.append(np.array([one.probabilities for one in found]))
    result = compare(
        rows[0], rows[1], labels, [photo.key for photo in photos], classes=first.labels
    )
    picture = project.artifacts / "compare.png" if result.changed else None
    if picture:
        _draw(picture, project, [*releases], result)
    return result, picture


def _unseen(project: Project, releases: list[Path], labels: Sequence[str]) -> list[Photo]:
    """Photos in data/ that no release was trained on, near-duplicates included."""
    photos = [photo for photo in find_photos(project.data) if photo.label in labels]
    names = name_photos(photos)
    seen: set[str] = set()
    for folder in releases:
        index: Any = read_json(folder / DATASET_INDEX) or {"photos": []}
        seen |= seen_photos(project, index)
    unseen = [
        photo for photo in photos if not seen & {photo.key, Path(photo.key).name, names[photo.key]}
    ]
    if not unseen:
        raise DataError(
            f"All {len(photos)} photos in data/ with their labels were in the training of one of "
            "the two, so they cannot be compared. Import photos that are new to both."
        )
    return unseen


def _draw(picture: Path, project: Project, names: list[str], result: Comparison) -> None:
    from matplotlib.figure import Figure

    changed = result.changed[:SHOWN]
    height = -(-len(changed) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 2.6 * height), layout="constrained")
    grid = np.atleast_1d(figure.subplots(height, COLUMNS, squeeze=False)).ravel()
    for axes, one in zip(grid, changed, strict=False):
        pixels = decode((project.data / one["name"]).read_bytes(), one["name"])
        axes.imshow(resize_square(pixels, SIDE))
        axes.set_title(
            f"{one['label']}\n{names[0]}: {one['champion']}   {names[1]}: {one['challenger']}",
            fontsize=9,
            color="darkgreen" if one["now"] == "right" else "darkred",
        )
    for axes in grid:
        axes.axis("off")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)

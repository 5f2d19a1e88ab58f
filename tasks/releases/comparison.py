"""Compare two models on photos that neither was trained on.

The promotion rule: a challenger is promoted if it is right on significantly more photos than
the champion (McNemar's exact test, 5 %), or if the difference is within noise and its mean
loss is higher by at most 0.01.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

from tasks.data.dataset import find_photos, name_photos, open_dataset
from tasks.data.images import decode, resize_square
from tasks.errors import DataError, HandsignsError, PromotionError, ServiceError
from tasks.io import read_json
from tasks.model.inference import Classifier, classify_files
from tasks.params import list_labels
from tasks.project import Project
from tasks.releases.champion import Champion
from tasks.releases.release import DATASET_INDEX, fetch, open_release
from tasks.scoring.metrics import FrozenModel, Scores, checked, score
from tasks.services.s3 import Storage
from tasks.stage import Progress, silent

SIGNIFICANCE = 0.05
LOSS_MARGIN = 0.01  # rise in mean loss (nats) that no user notices
SHOWN, SIDE = 24, 160  # photos in the picture at most, and their width in pixels

Verdict = Literal["better", "worse", "no significant difference"]


class Comparison(FrozenModel):
    """A challenger and the champion, scored on the same photos."""

    champion: Scores
    challenger: Scores
    recalls: tuple[dict[str, Any], ...]  # of each class; null where it has no photo
    changed: tuple[dict[str, str], ...]  # photos that got another label
    won: int  # photos that only the challenger classifies correctly
    lost: int  # and only the champion
    p_value: float
    verdict: Verdict
    no_worse: bool  # whether the challenger may become champion
    reason: str


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a challenger may become champion; the reason has no full stop."""

    won: bool
    reason: str
    comparison: Comparison | None = None


def compare(
    champion: np.ndarray,
    challenger: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
) -> Comparison:
    """Compare two models' probabilities, float (n, classes), for photos with integer labels."""
    old, y = checked(champion, labels)
    new, _ = checked(challenger, labels)
    was, now = old.argmax(axis=1), new.argmax(axis=1)
    better, worse = (was != y) & (now == y), (was == y) & (now != y)
    won, lost = int(better.sum()), int(worse.sum())
    before, after = score(old, y, classes), score(new, y, classes)
    # McNemar's exact test (1947), two-sided.
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    rise = after.loss - before.loss
    verdict: Verdict = "no significant difference"
    if p_value < SIGNIFICANCE:
        no_worse = won > lost
        verdict = "better" if no_worse else "worse"
        rule = f"right on significantly {'more' if no_worse else 'fewer'} photos than the champion"
    else:
        no_worse = rise <= LOSS_MARGIN
        limit = f"{'at most' if no_worse else 'more than'} {LOSS_MARGIN} higher"
        rule = f"accuracy equals the champion's within noise, and the loss is {limit}"
    recalls = [
        {
            "label": one.label,
            "support": one.support,
            "champion": one.recall,
            "challenger": two.recall,
            "change": None if one.recall is None or two.recall is None else two.recall - one.recall,
        }
        for one, two in zip(before.per_class, after.per_class, strict=True)
    ]
    changed = [
        {
            "name": names[row],
            "label": classes[y[row]],
            "champion": classes[was[row]],
            "challenger": classes[now[row]],
            "now": "right" if better[row] else "wrong" if worse[row] else "still wrong",
        }
        for row in np.flatnonzero(was != now).tolist()
    ]
    return Comparison(
        champion=before,
        challenger=after,
        recalls=tuple(recalls),
        changed=tuple(changed),
        won=won,
        lost=lost,
        p_value=p_value,
        verdict=verdict,
        no_worse=no_worse,
        reason=f"{rule}: accuracy {before.accuracy:.4f} -> {after.accuracy:.4f}, "
        f"loss {before.loss:.4f} -> {after.loss:.4f}, photos won {won}, lost {lost} "
        f"(McNemar p = {p_value:.3g})",
    )


def compare_with_champion(
    project: Project, storage: Storage, champion: Champion | None, progress: Progress = silent
) -> PromotionDecision:
    """Score the champion on the test photos; the challenger's scores are in `predictions.json`."""
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
    dataset = open_dataset(project.dataset)
    fault = differing_labels(classifier.labels, dataset.classes, "the champion", "the new model")
    if fault:
        return PromotionDecision(False, f"not comparable with the champion, for {fault}")
    keys = {name: key for key, name in name_photos(find_photos(project.data)).items()}
    tested = [(row, dataset.names[row]) for row in dataset.rows("test")]
    # A photo that went meanwhile is named by its path.
    places = {row: keys.get(name, name) for row, name in tested}
    seen = seen_photos(project, release)
    rows = [row for row, name in tested if not seen & _spellings(places[row], name)]
    if not rows:
        raise PromotionError(
            f"The champion, release {release.name}, was trained on every test photo or on a "
            "near-duplicate of it, so it cannot be compared. Promote a version by hand if that "
            "is right."
        )
    predictions = read_json(project.predictions)["photos"]
    predicted = {one["name"]: one["probabilities"] for one in predictions}
    photos = [project.data / places[row] for row in rows]
    result = compare(
        _classify(classifier, photos, progress),
        np.array([predicted[dataset.names[row]] for row in rows]),
        dataset.labels[rows],
        [places[row] for row in rows],
        dataset.classes,
    )
    _draw(project.changed, project, ("champion", "challenger"), result)
    return PromotionDecision(result.no_worse, result.reason, result)


def compare_releases(
    project: Project, releases: Mapping[str, Path], progress: Progress = silent
) -> tuple[Comparison, Path | None]:
    """Score two verified releases by name, the older one first, and draw what they read apart."""
    first, second = (open_release(folder) for folder in releases.values())
    if fault := differing_labels(first.labels, second.labels, *releases):
        raise DataError(
            f"The releases cannot be compared, for {fault}. Name two with the same labels."
        )
    photos = [photo for photo in find_photos(project.data) if photo.label in first.labels]
    names = name_photos(photos)
    seen = set().union(*(seen_photos(project, folder) for folder in releases.values()))
    unseen = [one for one in photos if not seen & _spellings(one.key, names[one.key])]
    if not unseen:
        raise DataError(
            f"All {len(photos)} photos in data/ with their labels were in the training of one of "
            "the two, so they cannot be compared. Import photos that are new to both."
        )
    labels = np.array([first.labels.index(photo.label) for photo in unseen])
    paths = [project.data / photo.key for photo in unseen]
    old, new = (_classify(classifier, paths, progress) for classifier in (first, second))
    result = compare(old, new, labels, [photo.key for photo in unseen], first.labels)
    picture = project.artifacts / "compare.png"
    _draw(picture, project, [*releases], result)
    return result, picture if result.changed else None


def seen_photos(project: Project, release: Path) -> set[str]:
    """Names and paths of photos that a release was trained on, with their near-duplicates."""
    index = read_json(release / DATASET_INDEX) or {"photos": []}
    seen = {photo["name"] for photo in index["photos"] if photo["split"] != "test"}
    groups = (read_json(project.audit) or {}).get("groups", [])
    return seen.union(
        *(group for group in groups if seen & {*group, *(Path(path).name for path in group)})
    )


def differing_labels(
    first: Sequence[str], second: Sequence[str], one: str, other: str
) -> str | None:
    """Why two models with these labels cannot be compared, or None if they can."""
    if [*first] == [*second]:
        return None
    only = {
        one: [label for label in first if label not in second],
        other: [label for label in second if label not in first],
    }
    faults = [f"only {who} has {list_labels(found)}" for who, found in only.items() if found]
    return "their labels differ: " + (" and ".join(faults) or "they are in another order")


def _spellings(key: str, name: str) -> set[str]:
    """What a release may call a photo: its path, its file's name, or its name in a data set."""
    return {key, Path(key).name, name}


def _classify(classifier: Classifier, paths: Sequence[Path], progress: Progress) -> np.ndarray:
    found = classify_files(classifier, paths, progress)
    if bad := [f"'{one.path.name}' ({one.error})" for one in found if one.error]:
        raise DataError(
            f"{len(bad)} photos in data/ cannot be read, such as {bad[0]}. Leave data/ alone "
            "while it is used, import what is missing, and run again."
        )
    return np.array([one.probabilities for one in found])


def _draw(picture: Path, project: Project, names: Sequence[str], result: Comparison) -> None:
    """Draw the photos that got another label, or remove the picture if there is none."""
    from tasks.scoring.plots import grid, save

    picture.unlink(missing_ok=True)
    if changed := result.changed[:SHOWN]:
        first, second = names
        photos = (decode((project.data / one["name"]).read_bytes()) for one in changed)
        captions = [
            f"{one['label']}\n{first}: {one['champion']}   {second}: {one['challenger']}"
            for one in changed
        ]
        title = f"{len(changed)} of {len(result.changed)} photos that got another label"
        small = (resize_square(photo, SIDE) for photo in photos)
        save(grid(small, captions, title, fontsize=8), picture)

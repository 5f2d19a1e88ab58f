"""Compare with the champion, promote, roll back."""

import datetime
import getpass
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import open_dataset
from tasks.data.photos import find_photos, name_photos
from tasks.errors import HandsignsError, OlderError, PromotionError, ReleaseError, ServiceError
from tasks.gate import judge
from tasks.io import read_json
from tasks.model.inference import classify_files
from tasks.params import GateParams
from tasks.project import Project
from tasks.releases.pointer import (
    Champion,
    Move,
    Pointer,
    check_alias,
    check_champion,
    following,
    lead_alias,
    move_champion,
    older_than,
    read_champion,
    repair_alias,
)
from tasks.releases.release import DATASET_INDEX, MANIFEST, fetch, open_release, verify
from tasks.scoring.compare import Comparison, compare
from tasks.services.mlflow import CHALLENGER, CHAMPION, Registry, Version
from tasks.services.s3 import Storage
from tasks.stage import Progress, silent

if TYPE_CHECKING:
    from tasks.params import GateParams

COMPARED_WITH = "compared_with"
COMPARISON = "comparison"
COMPARISON_WON = "comparison_won"
NOBODY = "nobody"


def comparison_tags(champion: Champion | None, won: bool, reason: str) -> dict[str, str]:
    """Tags that keep how a version did against the champion of that day.

    Args:
        champion: whom it was compared with; None where there was nobody.
        won: whether it may become champion.
        reason: why, in one sentence.
    """
    return {
        COMPARED_WITH: champion.pointer.release if champion else NOBODY,
        COMPARISON: reason,
        COMPARISON_WON: "yes" if won else "no",
    }


def blockers(
    version: Version, release: Path, present: Champion | None, limits: GateParams
) -> tuple[str, ...]:
    """List what speaks against a version as champion.

    Args:
        version: with its tags, see `comparison_tags`.
        release: folder of its verified release.
        present: the champion that it would replace.
        limits: the gate's limits of today, which may be stricter than those of its day.

    Returns:
        One short sentence each, without a full stop; empty where nothing does.
    """
    return (
        *_of_its_gate(release),
        *_of_todays_gate(release, limits),
        *_of_champion(version.tags, present),
        *_of_age(version.number, release, present),
    )


def _of_its_gate(release: Path) -> Iterator[str]:
    verdict = read_json(release / "gate.json")
    if not isinstance(verdict, dict) or verdict.get("passed") is not True:
        yield "its own gate did not pass it"


def _of_todays_gate(release: Path, limits: GateParams) -> Iterator[str]:
    index = read_json(release / DATASET_INDEX)
    leaks = index.get("leaks") if isinstance(index, dict) else None
    for reason in judge(read_json(release / "metrics.json"), leaks, limits).reasons:
        yield f"today's gate refuses it, {reason}"


def _of_champion(tags: Mapping[str, str], present: Champion | None) -> Iterator[str]:
    if present is None:
        return
    if tags.get(COMPARED_WITH) != present.pointer.release:
        yield f"it was not compared with the present champion, version {present.pointer.version}"
    elif tags.get(COMPARISON_WON) != "yes":
        yield f"compared with version {present.pointer.version} it is {tags.get(COMPARISON)}"


def _of_age(number: int, release: Path, present: Champion | None) -> Iterator[str]:
    created = str(read_json(release / MANIFEST)["facts"].get("created", ""))
    if fault := older_than(present, number, created):
        yield fault


METRICS = ("accuracy", "loss", "auc", "ece")
"""Scores that the history keeps of each champion."""

_log = logging.getLogger(__name__)


def set_champion(
    storage: Storage,
    registry: Registry,
    version: Version,
    expected: Champion | None,
    reason: str,
    metrics: Mapping[str, float | None],
    *,
    by: str | None = None,
    overruled: Sequence[str] = (),
) -> Move:
    """Make a verified version the champion.

    Args:
        storage: holds the releases and the pointer.
        registry: its alias is moved after the pointer.
        version: the new champion.
        expected: the champion that the decision was made against.
        reason: why, for the history.
        metrics: scores for the history.
        by: who decided; None is the user of this process.
        overruled: what spoke against it; with any of it the promotion is a forced one.

    Returns:
        The move.

    Raises:
        OvertakenError: the champion was changed meanwhile; nothing was moved.
        OlderError: its release is older than the champion's, and nothing is overruled.
        PromotionError: its alias was changed; nothing was moved either.
        ReleaseError: the release is not what its manifest says.
    """
    release = verify(storage, _release_of(version))
    created = str(release.manifest.facts.get("created", ""))
    if not overruled and (fault := older_than(expected, version.number, created)):
        raise OlderError(
            f"Version {version.number} was not promoted: {fault}. Nothing was moved. See who made "
            "it; `handsigns promote` with --force and a --reason overrules this."
        )
    # Before the alias, which follows the champion that came meanwhile and not the expected one.
    check_champion(storage, expected)
    if expected is not None:
        check_alias(registry, expected)
    move = Move(
        release=release.id,
        version=version.number,
        by=by or _who(),
        reason=reason,
        metrics={name: metrics.get(name) for name in METRICS},
        created=created,
        overruled=tuple(overruled),
    )
    new = _pointer(expected, move)
    moved = move_champion(storage, expected, new)
    with following(new.version):
        lead_alias(storage, registry, moved)
        if new.overruled:
            facts = {"by": new.by, "because": reason, "over": "; ".join(overruled)}
            tags = {f"forced_{name}": text[:5000] for name, text in facts.items()}
            registry.set_tags(version.number, tags)
    return new


def promote(
    storage: Storage,
    registry: Registry,
    number: int,
    reason: str,
    cache: Path,
    limits: "GateParams",
    *,
    force: bool = False,
    by: str | None = None,
) -> Move:
    """Make a version the champion because somebody says so.

    Args:
        storage: holds the releases and the pointer.
        registry: knows the version.
        number: of the version.
        reason: why, for the history.
        cache: takes the release.
        limits: the gate's limits of today.
        force: overrule what speaks against it; that is kept, and needs a reason.
        by: who decided; None is the user of this process.

    Returns:
        The move.

    Raises:
        PromotionError: there is no such version, it already is champion, something
            speaks against it, or the champion was changed meanwhile.
        ReleaseError: its release is missing or damaged.
    """
    _need_reason(f"A promotion{' by force' if force else ''}", reason)
    version = registry.version(number)
    if version is None:
        known = ", ".join(str(one.number) for one in registry.versions()) or "none"
        raise PromotionError(
            f"There must be such a version in the registry. Received: {number}; known: {known}. "
            "Promote one of these."
        )
    present = read_champion(storage)
    if present is not None and (said := repair_alias(registry, present)):
        _log.warning(said)
    if present is not None and present.pointer.release == _release_of(version):
        raise PromotionError(f"Version {number} is champion already. Nothing was moved.")
    # Statistics take a second to import; whoever only looks for a release needs none.

    folder = fetch(storage, _release_of(version), cache)
    against = blockers(version, folder, present, limits)
    if against and not force:
        raise PromotionError(
            f"Version {number} should not be champion: {'; '.join(against)}. Nothing was moved. "
            "To overrule that, promote it with --force and a --reason."
        )
    metrics = read_json(folder / "metrics.json") or {}
    return set_champion(
        storage, registry, version, present, reason, metrics, by=by, overruled=against
    )


def rollback(storage: Storage, registry: Registry, reason: str, *, by: str | None = None) -> Move:
    """Give the place back to the champion before the present one.

    Args:
        storage: holds the releases and the pointer.
        registry: must still know the earlier champion.
        reason: why, for the history.
        by: who decided; None is the user of this process.

    Returns:
        The move, as the history keeps it.

    Raises:
        PromotionError: there is none, its version is gone, no reason is given, or the
            champion was changed meanwhile.
        ReleaseError: its release is missing or damaged.
    """
    _need_reason("A rollback", reason)
    present = read_champion(storage)
    target = present.pointer.former() if present else None
    if present is None or target is None:
        raise PromotionError("There is no earlier champion to return to. Nothing was moved.")
    if registry.version(target.version) is None:
        raise PromotionError(
            f"The earlier champion is gone from the registry. Received: version {target.version}. "
            "Promote another version."
        )
    verify(storage, target.release)
    update = {"action": "rollback", "reason": reason, "by": by or _who()}
    new = _pointer(present, target.model_copy(update=update))
    moved = move_champion(storage, present, new)
    with following(new.version):
        lead_alias(storage, registry, moved)
    return new


def _need_reason(what: str, reason: str) -> None:
    if not reason.strip():
        raise PromotionError(
            f"{what} needs a reason, for the history. Received: none. Say why with --reason."
        )


def find_release(storage: Storage, registry: Callable[[], Registry], name: str) -> str:
    """Id of the release that a person means.

    Args:
        storage: holds the pointer.
        registry: opened only when the pointer does not answer the question.
        name: `champion`, `challenger`, or the number of a version.

    Raises:
        ReleaseError: there is no such release.
    """
    if name == CHAMPION:
        champion = read_champion(storage)
        if champion is None:
            raise ReleaseError("There is no champion yet. Run `handsigns retrain` first.")
        return champion.pointer.release
    if name == CHALLENGER:
        version = registry().version_by_alias(CHALLENGER)
    elif name.isdecimal():
        version = registry().version(int(name))
    else:
        raise ReleaseError(
            "A model is named champion, challenger, by its version's number, or by the path of "
            f"a release. Received: '{name}', which is none of these."
        )
    if version is None:
        raise ReleaseError(
            f"There is no such model in the registry. Received: {name}. "
            "`handsigns status` shows which there are."
        )
    return _release_of(version)


def _release_of(version: Version) -> str:
    if version.content_id is None:
        raise ReleaseError(
            f"Version {version.number} names no release. It was not registered by this workflow; "
            "retrain, and use the version that it makes."
        )
    return version.content_id


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def _pointer(before: Champion | None, move: Move) -> Pointer:
    return Pointer.model_validate(
        {
            **move.model_dump(),
            "previous": before.pointer.version if before else None,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "history": before.pointer.moves if before else (),
        }
    )


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a challenger may become champion.

    Args:
        won: whether it may.
        reason: why, in one sentence.
        comparison: None where there was nobody to compare with.
    """

    won: bool
    reason: str
    comparison: Comparison | None = None


def compare_with_champion(
    project: Project, storage: Storage, champion: Champion | None, progress: Progress = silent
) -> PromotionDecision:
    """Score the champion again on the test photos and compare the new model with it.

    Photos that the champion was trained on are left out: it would be examined on
    what it has seen.

    Args:
        project: its `predictions.json` holds the challenger's probabilities.
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
    photos, labels, challenger = _unseen(project, release)
    found = classify_files(classifier, photos, progress)
    if lost := [f"'{one.path.name}' ({one.error})" for one in found if one.error]:
        raise PromotionError(
            f"Test photos changed while this ran. Received: {len(lost)} unreadable, such as "
            f"{lost[0]}. Leave data/ alone during a retrain, and run it again."
        )
    probabilities = np.array([one.probabilities for one in found])
    result = compare(probabilities, challenger, labels, [path.name for path in photos])
    return PromotionDecision(result.no_worse, result.reason, result)


def _unseen(
    project: Project, release: Path
) -> tuple[list[Path], NDArray[np.int64], NDArray[np.float64]]:
    """Test photos that the champion was not trained on, and what the challenger says."""
    index = read_json(release / DATASET_INDEX) or {"photos": []}
    seen = {photo["name"] for photo in index["photos"] if photo["split"] != "test"}
    dataset = open_dataset(project.dataset)
    predicted = {
        one["name"]: one["probabilities"] for one in read_json(project.predictions)["photos"]
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
    key_of = {name: key for key, name in name_photos(find_photos(project.data)).items()}
    # One that went meanwhile is told by the name that it had.
    photos = [project.data / key_of.get(name, name) for name in names]
    return photos, labels, np.array([predicted[name] for name in names])

"""Compare a new model with the champion, promote it, and roll back."""

import datetime
import getpass
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import find_photos, name_photos, open_dataset
from tasks.errors import HandsignsError, OvertakenError, PromotionError, ServiceError
from tasks.gate import judge
from tasks.io import read_json
from tasks.model.inference import classify_files
from tasks.params import GateParams, load_params
from tasks.project import Project
from tasks.releases.pointer import (
    Champion,
    Move,
    Pointer,
    move_champion,
    read_champion,
    release_of,
    sync_alias,
)
from tasks.releases.release import DATASET_INDEX, MANIFEST, fetch, open_release, verify
from tasks.scoring.compare import Comparison, compare, differing_labels
from tasks.services.mlflow import Registry, Version
from tasks.services.s3 import Storage, check_conditional_writes
from tasks.stage import Progress, silent

COMPARED_WITH = "compared_with"
COMPARISON = "comparison"
COMPARISON_WON = "comparison_won"
"""Tags of a version: how it compared with the champion of its day."""
METRICS = ("accuracy", "loss", "auc", "ece")
"""Scores that the history keeps of each champion."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a challenger may become champion; the reason has no full stop."""

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

    Raises:
        PromotionError: the champion cannot be loaded, or has seen every test photo; or one
            of these cannot be read any more.
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
    classes = open_dataset(project.dataset).classes
    if fault := differing_labels(classifier.labels, classes):
        fault = fault.replace("the first", "the champion").replace("the second", "the new model")
        return PromotionDecision(False, f"not comparable with the champion, for {fault}")
    photos, labels, challenger = _unseen_photos(project, release)
    found = classify_files(classifier, photos, progress)
    if lost := [f"'{one.path.name}' ({one.error})" for one in found if one.error]:
        raise PromotionError(
            f"Test photos changed while this ran: {len(lost)} unreadable, such as {lost[0]}. "
            "Leave data/ alone during a retrain, and run it again."
        )
    probabilities = np.array([one.probabilities for one in found])
    result = compare(
        probabilities, challenger, labels, [path.name for path in photos], classes=classes
    )
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
    seen = seen_photos(project, read_json(release / DATASET_INDEX) or {"photos": []})
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


def seen_photos(project: Project, index: Mapping[str, Any]) -> set[str]:
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


def promote(
    storage: Storage,
    registry: Registry,
    project: Project,
    version: int,
    reason: str,
    *,
    force: bool = False,
    by: str | None = None,
) -> Move:
    """Make a registered version the champion; nothing happens if it already is.

    Args:
        force: promote in spite of failed checks, which are kept in the history.
        by: who decided; None is the user of this process.

    Raises:
        PromotionError: there is no such version, or a check fails.
        OvertakenError: the champion was changed meanwhile.
    """
    _need_reason(f"A promotion{' by force' if force else ''}", reason)
    check_conditional_writes(storage)
    found = registry.version(version)
    if found is None:
        known = ", ".join(str(one.number) for one in registry.versions()) or "none"
        raise PromotionError(
            f"There is no version {version} in the registry, only: {known}. Promote one of these; "
            "if versions were lost, run `handsigns rebuild-registry`."
        )
    present = read_champion(storage)
    folder = fetch(storage, release_of(found), project.releases)
    if present and present.pointer.release == found.content_id:
        return _already(storage, registry, present)
    blockers = [*_failed_gates(folder, load_params(project.params).gate)]
    if present:
        blockers += _lost_comparison(registry, found, present.pointer)
        blockers += _made_earlier(folder, present.pointer)
    if blockers and not force:
        raise PromotionError(
            f"Version {version} should not be champion: {'; '.join(blockers)}. Nothing was moved. "
            "To overrule that, promote it with --force and a --reason."
        )
    metrics = read_json(folder / "metrics.json") or {}
    return set_champion(
        storage, registry, found, present, reason, metrics, by=by, overruled=blockers
    )


def rollback(
    storage: Storage,
    registry: Registry,
    reason: str,
    *,
    by: str | None = None,
    expected: str | None = None,
) -> Move:
    """Undo the promotion of the present champion.

    A repeated call changes nothing: without `expected`, a champion that is there by a
    rollback stays; with it, only that champion is rolled back.

    Args:
        by: who decided; None is the user of this process.
        expected: release of the champion to roll back.

    Raises:
        PromotionError: there is no earlier champion, or the registry lost it.
        OvertakenError: the champion is not the expected one.
    """
    _need_reason("A rollback", reason)
    check_conditional_writes(storage)
    present = read_champion(storage)
    now = present.pointer if present else None
    if present and now and now.action == "rollback":
        undone = now.history[-1].release
        if expected is None or expected == undone != now.release:
            return _already(storage, registry, present)
    if expected is not None and (now is None or now.release != expected):
        who = f"version {now.version}, release {now.release}," if now else "nobody"
        raise OvertakenError(
            f"The champion was changed meanwhile: it is {who} and not release {expected}. Nothing "
            "was moved. Look at `handsigns status` before you run again."
        )
    target = now.former() if now else None
    if target is None:
        raise PromotionError("There is no earlier champion to return to. Nothing was moved.")
    version = registry.find(target.release)
    if version is None:
        raise PromotionError(
            f"The earlier champion, version {target.version}, is gone from the registry. Promote "
            "another version, or run `handsigns rebuild-registry`."
        )
    verify(storage, target.release)
    update = {"action": "rollback", "reason": reason, "by": by or "", "version": version.number}
    return _move(storage, registry, present, target.model_copy(update=update))


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
    """Move the pointer to a verified version, then the alias.

    Args:
        expected: the champion that the decision was made against.
        overruled: checks that failed; with any, the promotion is a forced one.

    Raises:
        OvertakenError: the champion was changed meanwhile; nothing was moved.
    """
    release = verify(storage, release_of(version))
    facts = release.manifest.facts
    move = Move(
        release=release.id,
        version=version.number,
        by=by or "",
        reason=reason,
        metrics={name: metrics.get(name) for name in METRICS},
        created=str(facts.get("created", "")),
        pointer_moves=facts.get("pointer_moves"),
        overruled=tuple(overruled),
    )
    try:
        new = _move(storage, registry, expected, move)
    except OvertakenError:
        present = read_champion(storage)
        if present and present.pointer.release == release.id:
            return _already(storage, registry, present)
        raise
    if overruled:
        kept = {"by": new.by, "because": reason, "over": "; ".join(overruled)}
        tags = {f"forced_{name}": text[:5000] for name, text in kept.items()}
        try:
            registry.set_tags(version.number, tags)
        except HandsignsError as error:
            _log.warning("The registry does not show that the promotion was forced: %s", error)
    return new


def _failed_gates(release: Path, limits: GateParams) -> Iterator[str]:
    verdict = read_json(release / "gate.json")
    if not isinstance(verdict, dict) or verdict.get("passed") is not True:
        yield "its own gate did not pass it"
    index = read_json(release / DATASET_INDEX)
    leaks = index.get("leaks") if isinstance(index, dict) else None
    metrics, labels = (read_json(release / f"{name}.json") for name in ("metrics", "labels"))
    if not labels:
        yield "it has no labels.json"
    for reason in judge(metrics, leaks, limits, labels or ()).reasons:
        yield f"today's gate refuses it, {reason}"


def _lost_comparison(registry: Registry, version: Version, now: Pointer) -> Iterator[str]:
    tags, numbers = version.tags, {move.release: move.version for move in now.moves}
    against = tags.get(COMPARED_WITH)
    if against is not None and tags.get(COMPARISON_WON) != "yes":
        yield f"compared with version {numbers.get(against, '?')} it is {tags.get(COMPARISON)}"
    if against == now.release:
        return
    held = registry.find(now.release)
    if held and held.tags.get(COMPARED_WITH) == version.content_id:
        yield f"version {now.version} took its place: {held.tags.get(COMPARISON)}"
    else:
        yield f"it was not compared with the present champion, version {now.version}"


def _made_earlier(release: Path, now: Pointer) -> Iterator[str]:
    """Whoever can write to the registry could name an old release by a new number.

    The count of pointer moves orders releases; clocks may be wrong.
    """
    if now.pointer_moves is None:
        return
    made = read_json(release / MANIFEST)["facts"].get("pointer_moves")
    if not isinstance(made, int) or made < now.pointer_moves:
        when = f"after move {made}" if isinstance(made, int) else "by an earlier program version"
        yield (
            f"its release is older than that of version {now.version} (made {when}, and the "
            f"champion's after move {now.pointer_moves})"
        )


def _already(storage: Storage, registry: Registry, present: Champion) -> Move:
    """Report a repeated request as done; the alias may have been left behind."""
    now = present.pointer
    back = f" To go back further, run `handsigns rollback --from {now.version}`."
    further = back if now.action == "rollback" else ""
    _log.warning("Version %d is champion already; nothing was moved.%s", now.version, further)
    _repair_alias(storage, registry)
    return now


def _move(storage: Storage, registry: Registry, before: Champion | None, move: Move) -> Move:
    fields = {
        **move.model_dump(),
        "by": move.by or _user(),
        "previous": before.pointer.version if before else None,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "history": before.pointer.moves if before else (),
    }
    moved = move_champion(storage, before, Pointer.model_validate(fields))
    _repair_alias(storage, registry)
    return moved.pointer


def _repair_alias(storage: Storage, registry: Registry) -> None:
    """Let MLflow's alias follow; log, don't raise, if that fails: the champion has moved."""
    try:
        if said := sync_alias(storage, registry):
            _log.info(said)
    except HandsignsError as error:
        _log.warning(
            "The alias in the registry could not be updated. It follows with the next retrain or "
            "promotion. %s",
            error,
        )


def _need_reason(what: str, reason: str) -> None:
    if not reason.strip():
        raise PromotionError(f"{what} needs a reason, for the history. Say why with --reason.")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"

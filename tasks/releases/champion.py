"""Promote and roll back."""

import datetime
import getpass
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tasks.errors import HandsignsError, OvertakenError, PromotionError
from tasks.gate import judge
from tasks.io import read_json
from tasks.params import GateParams, load_params
from tasks.project import Project
from tasks.releases.pointer import (
    Champion,
    Move,
    Pointer,
    check_alias,
    check_champion,
    move_champion,
    read_champion,
    sync_alias,
)
from tasks.releases.release import (
    DATASET_INDEX,
    MANIFEST,
    fetch,
    verify,
)
from tasks.releases.versions import COMPARED_WITH, COMPARISON, COMPARISON_WON, release_of
from tasks.services.mlflow import Registry, Version
from tasks.services.s3 import Storage, check_conditional_writes

METRICS = ("accuracy", "loss", "auc", "ece")
"""Scores that the history keeps of each champion."""

_log = logging.getLogger(__name__)


def promote(
    storage: Storage,
    registry: Registry,
    project: Project,
    version: int,
    reason: str,
    *,
    force: bool = False,
    by: str | None = None,
    expected: str | None = None,
) -> Move:
    """Make a registered version the champion; nothing happens if it already is.

    Args:
        storage: bucket with the releases and the pointer.
        registry: knows the version.
        project: the checkout, with the gate's limits of today.
        version: its number in the registry.
        reason: why, for the history.
        force: promote in spite of failed checks, which are kept; needs a reason.
        by: who decided; None is the user of this process.
        expected: release of the champion that the caller saw; None takes any.

    Returns:
        The move that made it champion.

    Raises:
        PromotionError: there is no such version, or a check fails.
        OvertakenError: the champion is not the expected one.
        ReleaseError: the release is missing, damaged or not signed as required.
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
    _check_expected(present, expected)
    failed = blockers(found, folder, present, load_params(project.params).gate)
    if failed and not force:
        raise PromotionError(
            f"Version {version} should not be champion: {'; '.join(failed)}. Nothing was moved. "
            "To overrule that, promote it with --force and a --reason."
        )
    # Where the alias lags behind, it must not be taken for one that was moved by hand.
    _sync_alias_or_warn(storage, registry)
    metrics = read_json(folder / "metrics.json") or {}
    return set_champion(storage, registry, found, present, reason, metrics, by=by, overruled=failed)


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
        storage: bucket with the releases and the pointer.
        registry: must still know the earlier champion.
        reason: why, for the history.
        by: who decided; None is the user of this process.
        expected: release of the champion to roll back.

    Returns:
        The move that made the earlier champion champion again.

    Raises:
        PromotionError: there is no earlier champion, or the registry lost it.
        OvertakenError: the champion is not the expected one.
        ReleaseError: the earlier release is missing or damaged.
    """
    _need_reason("A rollback", reason)
    check_conditional_writes(storage)
    present = read_champion(storage)
    if present and _rolled_back_already(present.pointer, expected):
        return _already(storage, registry, present)
    _check_expected(present, expected)
    target = present.pointer.former() if present else None
    if present is None or target is None:
        raise PromotionError("There is no earlier champion to return to. Nothing was moved.")
    version = registry.find(target.release)
    if version is None:
        raise PromotionError(
            f"The earlier champion, version {target.version}, is gone from the registry. Promote "
            "another version, or run `handsigns rebuild-registry`."
        )
    verify(storage, target.release)
    update = {
        "action": "rollback",
        "version": version.number,
        "reason": reason,
        "by": by or _user(),
    }
    new = _pointer(present, target.model_copy(update=update))
    move_champion(storage, present, new)
    _sync_alias_or_warn(storage, registry)
    return new


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
        storage: bucket with the releases and the pointer.
        registry: its alias follows the pointer.
        version: the new champion.
        expected: the champion that the decision was made against.
        reason: why, for the history.
        metrics: scores for the history.
        by: who decided; None is the user of this process.
        overruled: checks that failed; with any, the promotion is a forced one.

    Returns:
        The move; that of an earlier attempt whose answer was lost, if there was one.

    Raises:
        OvertakenError: the champion was changed meanwhile; nothing was moved.
        PromotionError: the alias was moved by hand; nothing was moved either.
        ReleaseError: the release is not what its manifest says.
    """
    release = verify(storage, release_of(version))
    present = read_champion(storage)
    if present and present.pointer.release == release.id:
        return _already(storage, registry, present)
    check_champion(storage, expected)
    if expected is not None:
        check_alias(registry, expected)
    facts = release.manifest.facts
    move = Move(
        release=release.id,
        version=version.number,
        by=by or _user(),
        reason=reason,
        metrics={name: metrics.get(name) for name in METRICS},
        created=str(facts.get("created", "")),
        pointer_moves=facts.get("pointer_moves"),
        overruled=tuple(overruled),
    )
    new = _pointer(expected, move)
    move_champion(storage, expected, new)
    _sync_alias_or_warn(storage, registry)
    if overruled:
        kept = {"by": new.by, "because": reason, "over": "; ".join(overruled)}
        tags = {f"forced_{name}": text[:5000] for name, text in kept.items()}
        try:
            registry.set_tags(version.number, tags)
        except HandsignsError as error:
            _log.warning(
                "The registry does not say that version %d was forced: %s", version.number, error
            )
    return new


def blockers(
    version: Version, release: Path, present: Champion | None, limits: GateParams
) -> tuple[str, ...]:
    """Checks that a version fails as champion, one short sentence each.

    Args:
        version: with its tags, see `record_comparison`.
        release: folder of its verified release.
        present: the champion that it would replace.
        limits: the gate's limits of today, which may be stricter than those of its day.
    """
    return (
        *_failed_gates(release, limits),
        *_lost_comparison(version.tags, present),
        *_made_earlier(release, present),
    )


def _failed_gates(release: Path, limits: GateParams) -> Iterator[str]:
    verdict = read_json(release / "gate.json")
    if not isinstance(verdict, dict) or verdict.get("passed") is not True:
        yield "its own gate did not pass it"
    index = read_json(release / DATASET_INDEX)
    leaks = index.get("leaks") if isinstance(index, dict) else None
    for reason in judge(read_json(release / "metrics.json"), leaks, limits).reasons:
        yield f"today's gate refuses it, {reason}"


def _lost_comparison(tags: Mapping[str, str], present: Champion | None) -> Iterator[str]:
    if present is None:
        return
    against, now = tags.get(COMPARED_WITH), present.pointer
    numbers = {move.release: move.version for move in now.moves}
    if against is not None and tags.get(COMPARISON_WON) != "yes":
        yield f"compared with version {numbers.get(against, '?')} it is {tags.get(COMPARISON)}"
    if against != now.release:
        yield f"it was not compared with the present champion, version {now.version}"


def _made_earlier(release: Path, present: Champion | None) -> Iterator[str]:
    """Whoever can write to the registry could name an old release by a new number.

    The count of pointer moves orders releases; clocks may be wrong.
    """
    base = present.pointer.pointer_moves if present else None
    if present is None or base is None:
        return
    made = read_json(release / MANIFEST)["facts"].get("pointer_moves")
    if not isinstance(made, int) or made < base:
        when = f"after move {made}" if isinstance(made, int) else "by an earlier program version"
        yield (
            f"its release is older than that of version {present.pointer.version} (made {when}, "
            f"and the champion's after move {base})"
        )


def _rolled_back_already(pointer: Pointer, expected: str | None) -> bool:
    """Whether the last move is the rollback that is asked for."""
    if pointer.action != "rollback":
        return False
    return expected is None or (
        pointer.release != expected and pointer.history[-1].release == expected
    )


def _check_expected(present: Champion | None, expected: str | None) -> None:
    now = present.pointer.release if present else None
    if expected is not None and now != expected:
        who = f"version {present.pointer.version}, release {now}," if present else "nobody"
        raise OvertakenError(
            f"The champion was changed meanwhile: it is {who} and not release {expected}. Nothing "
            "was moved. Look at `handsigns status` before you run again."
        )


def _already(storage: Storage, registry: Registry, present: Champion) -> Move:
    """Report a repeated request as done; the alias may have been left behind."""
    now = present.pointer
    further = (
        f" To go back further, run `handsigns rollback --from {now.version}`."
        if now.action == "rollback"
        else ""
    )
    _log.warning("Version %d is champion already; nothing was moved.%s", now.version, further)
    _sync_alias_or_warn(storage, registry)
    return now


def _sync_alias_or_warn(storage: Storage, registry: Registry) -> None:
    """Log, don't raise, if the alias update fails: the champion has moved."""
    for last in (False, True):
        try:
            if said := sync_alias(storage, registry):
                _log.info(said)
            return
        except HandsignsError as error:
            if last:
                _log.warning(
                    "The alias in the registry could not be updated. It follows with the next "
                    "retrain or promotion. %s",
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


def _pointer(before: Champion | None, move: Move) -> Pointer:
    return Pointer.model_validate(
        {
            **move.model_dump(),
            "previous": before.pointer.version if before else None,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "history": before.pointer.moves if before else (),
        }
    )

"""Promote, roll back, and find releases by the names that people use."""

import datetime
import getpass
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tasks.errors import HandsignsError, OvertakenError, PromotionError, ReleaseError
from tasks.io import read_json
from tasks.params import GateParams, load_params
from tasks.project import Project
from tasks.releases.pointer import (
    Champion,
    Move,
    Pointer,
    check_alias,
    move_champion,
    overtaken,
    read_champion,
    sync_alias,
)
from tasks.releases.release import (
    DATASET_INDEX,
    MANIFEST,
    fetch,
    list_releases,
    read_manifest,
    verify,
)
from tasks.services.mlflow import CHALLENGER, CHAMPION, Registry, Version
from tasks.services.s3 import Storage, check_conditional_writes

COMPARED_WITH = "compared_with"
COMPARISON = "comparison"
COMPARISON_WON = "comparison_won"
"""Tags of a version: how it compared with the champion of its day."""
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
        force: promote in spite of failed checks, which are kept in the history.
        by: who decided; None is the user of this process.
        expected: release of the champion that the caller saw; None takes any.

    Raises:
        PromotionError: there is no such version, or a check fails.
        OvertakenError: the champion is not the expected one.
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
    blockers = (
        *_failed_gates(folder, load_params(project.params).gate),
        *_lost_comparison(registry, found, present),
        *_made_earlier(folder, present),
    )
    if blockers and not force:
        raise PromotionError(
            f"Version {version} should not be champion: {'; '.join(blockers)}. Nothing was moved. "
            "To overrule that, promote it with --force and a --reason."
        )
    # An alias that lags behind must not be taken for one that was moved by hand.
    _sync_alias_or_warn(storage, registry)
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
    if present and present.pointer.action == "rollback":
        undone = present.pointer.history[-1].release
        if expected is None or expected == undone != present.pointer.release:
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
        PromotionError: the alias was moved by hand; nothing was moved either.
    """
    release = verify(storage, release_of(version))
    present = read_champion(storage)
    if present and present.pointer.release == release.id:
        return _already(storage, registry, present)
    if (present and present.etag) != (expected and expected.etag):
        raise overtaken(expected)
    if expected is not None:
        check_alias(registry, expected)
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
    new = _move(storage, registry, expected, move)
    if overruled:
        kept = {"by": new.by, "because": reason, "over": "; ".join(overruled)}
        tags = {f"forced_{name}": text[:5000] for name, text in kept.items()}
        try:
            registry.set_tags(version.number, tags)
        except HandsignsError as error:
            _log.warning("The registry does not show that the promotion was forced: %s", error)
    return new


def _failed_gates(release: Path, limits: GateParams) -> Iterator[str]:
    from tasks.gate import judge  # loads scipy, which a rollback need not wait for

    verdict = read_json(release / "gate.json")
    if not isinstance(verdict, dict) or verdict.get("passed") is not True:
        yield "its own gate did not pass it"
    index = read_json(release / DATASET_INDEX)
    leaks = index.get("leaks") if isinstance(index, dict) else None
    for reason in judge(read_json(release / "metrics.json"), leaks, limits).reasons:
        yield f"today's gate refuses it, {reason}"


def _lost_comparison(
    registry: Registry, version: Version, present: Champion | None
) -> Iterator[str]:
    if present is None:
        return
    tags, now = version.tags, present.pointer
    against, numbers = tags.get(COMPARED_WITH), {move.release: move.version for move in now.moves}
    if against is not None and tags.get(COMPARISON_WON) != "yes":
        yield f"compared with version {numbers.get(against, '?')} it is {tags.get(COMPARISON)}"
    if against == now.release:
        return
    held = registry.find(now.release)
    if held and held.tags.get(COMPARED_WITH) == version.content_id:
        yield f"version {now.version} took its place: {held.tags.get(COMPARISON)}"
    else:
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


def find_release(storage: Storage, registry: Callable[[], Registry], name: str) -> str:
    """Id of the release that a person means.

    Args:
        registry: opened only when the pointer does not answer the question.
        name: `champion`, `challenger`, a version's number, or a release's id.
    """
    if name == CHAMPION:
        champion = read_champion(storage)
        if champion is None:
            raise ReleaseError("There is no champion yet. Run `handsigns retrain` first.")
        return champion.pointer.release
    if len(name) == 32 and set(name) <= set("0123456789abcdef"):
        return name
    if name == CHALLENGER:
        version = registry().version_by_alias(CHALLENGER)
    elif name.isdecimal():
        version = registry().version(int(name))
    else:
        raise ReleaseError(
            f"'{name}' names no model. Use champion, challenger, a version's number, a release's "
            "id, or the path of a release."
        )
    if version is None:
        raise ReleaseError(
            f"There is no model {name} in the registry. `handsigns status` shows which there are; "
            "if versions were lost, run `handsigns rebuild-registry`."
        )
    return release_of(version)


def release_of(version: Version) -> str:
    """Id of a version's release; `ReleaseError` for a version of another program."""
    if version.content_id is None:
        raise ReleaseError(
            f"Version {version.number} names no release. It was not registered by this workflow; "
            "retrain, and use the version that it makes."
        )
    return version.content_id


def rebuild_registry(storage: Storage, registry: Registry) -> list[Version]:
    """Register every complete release in storage that the registry lacks.

    Numbers are given anew, in the order in which the releases were made.
    """
    known = {version.content_id for version in registry.versions()}
    missing = []
    for release in list_releases(storage):
        if release not in known:
            try:
                missing.append(read_manifest(storage, release))
            except ReleaseError as error:
                _log.warning("Release %s is left out: %s", release, error)
    missing.sort(key=lambda one: (one.facts.get("pointer_moves", 0), one.facts.get("created", "")))
    added = [
        registry.register(None, one.id, {"release_uri": storage.uri(f"releases/{one.id}/")})
        for one in missing
    ]
    sync_alias(storage, registry)
    return added


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
    back = f" To go back further, run `handsigns rollback --from {now.version}`."
    further = back if now.action == "rollback" else ""
    _log.warning("Version %d is champion already; nothing was moved.%s", now.version, further)
    _sync_alias_or_warn(storage, registry)
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
    _sync_alias_or_warn(storage, registry)
    return moved.pointer


def _sync_alias_or_warn(storage: Storage, registry: Registry) -> None:
    """Log, don't raise, if the alias update fails twice: the champion has moved."""
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

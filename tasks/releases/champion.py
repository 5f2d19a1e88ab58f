"""Who is champion: the pointer in storage decides, the registry's alias follows."""

import datetime
import getpass
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import OlderError, PromotionError, ReleaseError
from tasks.releases.alias import check_alias, following, lead_alias, mend_alias
from tasks.releases.pointer import (
    Champion,
    Move,
    Pointer,
    check_champion,
    move_champion,
    older_than,
    read_champion,
)
from tasks.releases.release import fetch, verify
from tasks.services.registry import CHALLENGER, CHAMPION, Registry, Version
from tasks.services.storage import Storage
from tasks.whole import read_json

if TYPE_CHECKING:
    from tasks.params import GateParams

METRICS = ("accuracy", "loss", "auc", "ece")
"""Scores that the history keeps of each champion."""

_log = logging.getLogger(__name__)


def crown(
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
    if present is not None and (said := mend_alias(registry, present)):
        _log.warning(said)
    if present is not None and present.pointer.release == _release_of(version):
        raise PromotionError(f"Version {number} is champion already. Nothing was moved.")
    # Statistics take a second to import; whoever only looks for a release needs none.
    from tasks.releases.objections import objections

    folder = fetch(storage, _release_of(version), cache)
    against = objections(version, folder, present, limits)
    if against and not force:
        raise PromotionError(
            f"Version {number} should not be champion: {'; '.join(against)}. Nothing was moved. "
            "To overrule that, promote it with --force and a --reason."
        )
    metrics = read_json(folder / "metrics.json") or {}
    return crown(storage, registry, version, present, reason, metrics, by=by, overruled=against)


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

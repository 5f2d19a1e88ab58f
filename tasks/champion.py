"""Who is champion: the pointer in storage decides, the registry's alias follows."""

import datetime
import getpass
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tasks.errors import PromotionError, ReleaseError
from tasks.pointer import Champion, Move, Pointer, move_champion, read_champion
from tasks.registry import CHALLENGER, CHAMPION, Registry, Version
from tasks.release import fetch, verify
from tasks.storage import Storage
from tasks.whole import read_json

METRICS = ("accuracy", "loss", "auc", "ece")
"""Scores that the history keeps of each champion."""


def crown(
    storage: Storage,
    registry: Registry,
    version: Version,
    expected: Champion | None,
    reason: str,
    metrics: Mapping[str, float | None],
) -> Move:
    """Make a verified version the champion.

    Args:
        storage: holds the releases and the pointer.
        registry: its alias is moved after the pointer.
        version: the new champion.
        expected: the champion that the decision was made against.
        reason: why, for the history.
        metrics: scores for the history.

    Returns:
        The move.

    Raises:
        PromotionError: the champion was changed meanwhile; nothing was moved.
        ReleaseError: the release is not what its manifest says, or not as new as the
            registry says.
    """
    release = verify(storage, _release_of(version))
    created = str(release.manifest.facts.get("created", ""))
    _check_age(expected, version, created)
    kept = {name: metrics.get(name) for name in METRICS}
    new = _pointer(expected, release.id, version.number, "promote", reason, kept, created)
    move_champion(storage, expected, new)
    registry.set_alias(CHAMPION, version.number)
    return new


def promote(storage: Storage, registry: Registry, number: int, reason: str, cache: Path) -> Move:
    """Make a version the champion because somebody says so.

    Raises:
        PromotionError: there is no such version, it already is champion, or the
            champion was changed meanwhile.
        ReleaseError: its release is missing or damaged.
    """
    version = registry.version(number)
    if version is None:
        known = ", ".join(str(one.number) for one in registry.versions()) or "none"
        raise PromotionError(
            f"There must be such a version in the registry. Received: {number}; known: {known}. "
            "Promote one of these."
        )
    present = read_champion(storage)
    if present is not None and present.pointer.release == _release_of(version):
        mend_alias(registry, present)
        raise PromotionError(f"Version {number} is champion already. Nothing was moved.")
    folder = fetch(storage, _release_of(version), cache)
    metrics = read_json(folder / "metrics.json") or {}
    return crown(storage, registry, version, present, reason, metrics)


def rollback(storage: Storage, registry: Registry, reason: str) -> Move:
    """Give the place back to the champion before the present one.

    Raises:
        PromotionError: there is none, its version is gone, or the champion was
            changed meanwhile.
        ReleaseError: its release is missing or damaged.
    """
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
    new = _pointer(
        present,
        target.release,
        target.version,
        "rollback",
        reason,
        dict(target.metrics),
        target.created,
    )
    move_champion(storage, present, new)
    registry.set_alias(CHAMPION, target.version)
    return new


def mend_alias(registry: Registry, champion: Champion) -> str | None:
    """Let the alias follow the pointer where a crash came between; what was done, in words."""
    held = registry.version_by_alias(CHAMPION)
    number = champion.pointer.version
    if held is not None and held.number == number:
        return None
    registry.set_alias(CHAMPION, number)
    was = f"version {held.number}" if held else "nothing"
    return f"The alias named {was}; it follows the pointer to version {number} again."


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
        raise ReleaseError(f"There is no such model in the registry. Received: {name}.")
    return _release_of(version)


def _release_of(version: Version) -> str:
    if version.content_id is None:
        raise ReleaseError(
            f"Version {version.number} names no release. It was not registered by this workflow; "
            "retrain, and use the version that it makes."
        )
    return version.content_id


def _check_age(present: Champion | None, version: Version, created: str) -> None:
    """Whoever can write to the registry could name an old release by a new number.

    Raises:
        ReleaseError: the number is later than the champion's, the release earlier.
    """
    if present is None or version.number <= present.pointer.version:
        return
    if created and created < present.pointer.created:
        raise ReleaseError(
            f"An older release is presented as a newer version. Received: version "
            f"{version.number}, made {created}, where version {present.pointer.version} was made "
            f"{present.pointer.created}. See who registered it."
        )


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def _pointer(
    before: Champion | None,
    release: str,
    version: int,
    action: str,
    reason: str,
    metrics: dict[str, float | None],
    created: str,
) -> Pointer:
    return Pointer.model_validate(
        {
            "release": release,
            "version": version,
            "previous": before.pointer.version if before else None,
            "action": action,
            "by": _who(),
            "reason": reason,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "metrics": metrics,
            "created": created,
            "history": before.pointer.moves if before else (),
        }
    )

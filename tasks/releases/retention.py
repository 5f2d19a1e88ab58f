"""Remove releases that nothing needs any more."""

import datetime
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.errors import HandsignsError, ReleaseError
from tasks.io import folder_size
from tasks.project import Project
from tasks.releases.pointer import read_champion
from tasks.releases.release import MANIFEST, list_releases, read_manifest
from tasks.services.mlflow import Registry, Version
from tasks.services.s3 import MissingObjectError, Storage
from tasks.stage import Progress, silent

OUR_TAGS = ("content_id", "release_uri", "compared_with", "comparison", "comparison_won")
"""Tags that the workflow sets; a version with any other was tagged by somebody."""
PRUNING = "pruning/"
"""Marks of releases whose removal has begun, so that a killed one is completed later."""


@dataclass(frozen=True)
class Kept:
    """A release that stays, and why."""

    release: str
    reason: str


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be.

    Args:
        releases: ids of releases.
        kept: releases that stay.
        bytes: size of the removed objects and local copies.
        local: local copies of releases that storage does not have or loses.
    """

    releases: tuple[str, ...]
    kept: tuple[Kept, ...]
    bytes: int
    local: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def prune_releases(
    project: Project,
    storage: Storage,
    registry: Registry,
    keep: int,
    days: float,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """Remove releases, with their MLflow versions, runs and local copies.

    A release stays if it is or was one of the last `keep` champions before the present one,
    has an alias, was tagged by somebody, or is younger than `days`. To be called under the
    retrain lock.

    Args:
        keep: rollback depth.
        days: age in days below which nothing is removed.
        dry_run: only report.
    """
    versions = {one.content_id: one for one in registry.versions() if one.content_id}
    everything = list_releases(storage)
    begun = [one.key.removeprefix(PRUNING) for one in storage.list(PRUNING)]
    kept = tuple(_needed(storage, versions, everything, keep, days))
    stay = {one.release for one in kept}
    gone = tuple(one for one in dict.fromkeys([*begun, *everything]) if one not in stay)
    folders = sorted(project.releases.glob("[!.]*"))
    local = tuple(path.name for path in folders if path.name not in stay)
    size = sum(found.size for one in gone for found in storage.list(f"releases/{one}/"))
    size += sum(folder_size(project.releases / name) for name in local)
    if not dry_run:
        for number, release in enumerate(gone, start=1):
            _check_still_unneeded(storage, release)
            _remove(storage, registry, release, versions.get(release))
            progress("remove releases", number, len(gone))
        for name in local:
            shutil.rmtree(project.releases / name, ignore_errors=True)
        for release in stay.intersection(begun):  # it is needed again
            storage.remove(PRUNING + release)
    return Pruned(gone, kept, size, local)


def _needed(
    storage: Storage,
    versions: dict[str, Version],
    releases: Sequence[str],
    keep: int,
    days: float,
) -> Iterator[Kept]:
    champion = read_champion(storage)
    moves = champion.pointer.moves if champion else ()
    champions = list(dict.fromkeys(move.release for move in reversed(moves)))
    now = datetime.datetime.now(datetime.UTC)
    for release in releases:
        version = versions.get(release)
        rank = champions.index(release) if release in champions else None
        if rank is not None and rank <= keep:
            yield Kept(release, "champion" if rank == 0 else f"champion {rank} before the present")
        elif version and version.aliases:
            yield Kept(release, f"alias {', '.join(version.aliases)}")
        elif version and (tags := [name for name in version.tags if _is_foreign(name)]):
            yield Kept(release, f"tag {', '.join(tags)}")
        elif (age := _age(storage, release, now)) is None:
            yield Kept(release, "its age is unknown")
        elif age < days:
            yield Kept(release, f"{age:.0f} days old")


def _is_foreign(tag: str) -> bool:
    return tag not in OUR_TAGS and not tag.startswith(("mlflow.", "forced_"))


def _age(storage: Storage, release: str, now: datetime.datetime) -> float | None:
    """Age in days as the manifest has it; None if it does not say or is damaged."""
    try:
        created = read_manifest(storage, release).facts["created"]
        return (now - datetime.datetime.fromisoformat(created)).total_seconds() / 86_400
    except (ReleaseError, LookupError, TypeError, ValueError):
        return None


def _check_still_unneeded(storage: Storage, release: str) -> None:
    """A promotion by another machine may have come since the plan was made."""
    champion = read_champion(storage)
    if champion and champion.pointer.release == release:
        raise HandsignsError(
            f"Release {release} became champion meanwhile, so it stays. Run again to remove others."
        )


def _remove(storage: Storage, registry: Registry, release: str, version: Version | None) -> None:
    """Remove the version first and the manifest next: what is left is no release to anybody."""
    mark = PRUNING + release
    run = version.run_id if version else None
    if run is None:
        try:
            run = storage.get(mark).decode() or None
        except MissingObjectError:
            run = None
    storage.put(mark, (run or "").encode())
    registry.remove(version.number if version else None, run)
    prefix = f"releases/{release}/"
    names = [found.key for found in storage.list(prefix)]
    for key in sorted(names, key=lambda key: key != prefix + MANIFEST):
        storage.remove(key)
    storage.remove(mark)

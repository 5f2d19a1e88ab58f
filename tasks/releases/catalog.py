"""The releases in storage beside the registry's versions: find, restore, and prune them."""

import datetime
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.errors import HandsignsError, ReleaseError
from tasks.io import folder_size
from tasks.project import Project
from tasks.releases.champion import (
    COMPARED_WITH,
    COMPARISON,
    COMPARISON_WON,
    read_champion,
    sync_alias,
)
from tasks.releases.release import ID, MANIFEST, list_releases, read_manifest, release_uri
from tasks.services.mlflow import CHALLENGER, CHAMPION, CONTENT_ID, Registry, Version
from tasks.services.s3 import Storage, StoredObject
from tasks.stage import Progress, silent

_log = logging.getLogger(__name__)


def find_release(storage: Storage, registry: Callable[[], Registry], name: str) -> str:
    """Id of the release that a person means; the registry is opened only if it must be."""
    if name == CHAMPION:
        champion = read_champion(storage)
        if champion is None:
            raise ReleaseError("There is no champion yet. Run `handsigns retrain` first.")
        return champion.pointer.release
    if ID.fullmatch(name):
        return name
    if name != CHALLENGER and not name.isdecimal():
        raise ReleaseError(
            f"'{name}' names no model. Use champion, challenger, a version's number, a release's "
            "id, or the path of a release."
        )
    version = registry().find(name if name == CHALLENGER else int(name))
    if version is None:
        raise ReleaseError(
            f"There is no model {name} in the registry. `handsigns status` shows which there are; "
            "if versions were lost, run `handsigns rebuild-registry`."
        )
    return version.release


def rebuild_registry(storage: Storage, registry: Registry) -> list[Version]:
    """Register every complete release in storage that the registry lacks, the oldest first."""
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
        registry.register(None, one.id, {"release_uri": release_uri(storage, one.id)})
        for one in missing
    ]
    sync_alias(storage, registry)
    return added


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be, why the other releases stay, and the bytes."""

    releases: tuple[str, ...]
    kept: dict[str, str]
    bytes: int
    local: tuple[str, ...]  # copies of releases that storage loses


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
    has an alias, was tagged by somebody, or is younger than `days`. An incomplete one is as
    old as its last upload. To be called under the retrain lock.
    """
    versions = {one.content_id: one for one in registry.versions() if one.content_id}
    objects: dict[str, list[StoredObject]] = {}
    for found in storage.list("releases/"):
        objects.setdefault(found.key.split("/")[1], []).append(found)
    champion = read_champion(storage)
    moves = champion.pointer.moves if champion else ()
    champions = list(dict.fromkeys(move.release for move in reversed(moves)))[: keep + 1]
    kept = {}
    for release, stored in objects.items():
        version = versions.get(release)
        if release in champions:
            rank = champions.index(release)
            kept[release] = f"champion {rank} before the present" if rank else "champion"
        elif version and (marks := _marks(version)):
            kept[release] = marks
        elif (age := _age(storage, release, stored)) is None:
            kept[release] = "its age is unknown"
        elif age < days:
            kept[release] = f"{age:.0f} days old"
    gone = tuple(release for release in objects if release not in kept)
    folders = sorted(project.releases.glob("[!.]*"))
    local = tuple(path.name for path in folders if path.name not in kept)
    size = sum(found.size for release in gone for found in objects[release])
    size += sum(folder_size(project.releases / name) for name in local)
    if not dry_run:
        for number, release in enumerate(gone, start=1):
            _remove(storage, registry, release, versions.get(release))
            progress("remove releases", number, len(gone))
        for name in local:
            shutil.rmtree(project.releases / name, ignore_errors=True)
    return Pruned(gone, kept, size, local)


def _marks(version: Version) -> str:
    """The aliases of a version, or the tags that neither this program nor MLflow sets."""
    if version.aliases:
        return f"alias {', '.join(version.aliases)}"
    ours = (CONTENT_ID, "release_uri", COMPARED_WITH, COMPARISON, COMPARISON_WON)
    tags = [name for name in version.tags if name not in ours]
    tags = [name for name in tags if not name.startswith(("mlflow.", "forced_"))]
    return f"tag {', '.join(tags)}" if tags else ""


def _age(storage: Storage, release: str, stored: Sequence[StoredObject]) -> float | None:
    """Age in days; None if the manifest does not say or is damaged."""
    made = max(found.modified for found in stored)
    try:
        if any(found.key.endswith(f"/{MANIFEST}") for found in stored):
            facts = read_manifest(storage, release).facts
            made = datetime.datetime.fromisoformat(facts["created"])
        return (datetime.datetime.now(datetime.UTC) - made).total_seconds() / 86_400
    except (ReleaseError, LookupError, TypeError, ValueError):
        return None


def _remove(storage: Storage, registry: Registry, release: str, version: Version | None) -> None:
    """Remove the version first and the manifest next: what is left is no release to anybody."""
    champion = read_champion(storage)
    if champion and champion.pointer.release == release:
        raise HandsignsError(
            f"Release {release} became champion meanwhile, so it stays. Run again to remove others."
        )
    if version:
        registry.remove(version)
    prefix = f"releases/{release}/"
    for key in sorted(storage.keys(prefix), key=lambda key: key != prefix + MANIFEST):
        storage.remove(key)

"""Registered versions and the releases that they stand for."""

import logging
from collections.abc import Callable

from tasks.errors import ReleaseError
from tasks.releases.pointer import read_champion, sync_alias
from tasks.releases.release import list_releases, read_manifest
from tasks.services.mlflow import CHALLENGER, CHAMPION, Registry, Version
from tasks.services.s3 import Storage

COMPARED_WITH = "compared_with"
COMPARISON = "comparison"
COMPARISON_WON = "comparison_won"
"""Tags of a version: how it compared with the champion of its day."""

_log = logging.getLogger(__name__)


def find_release(storage: Storage, registry: Callable[[], Registry], name: str) -> str:
    """Id of the release that a person means.

    Args:
        storage: bucket with the pointer.
        registry: opened only when the pointer does not answer the question.
        name: `champion`, `challenger`, a version's number, or a release's id.

    Raises:
        ReleaseError: there is no such release.
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


def rebuild_registry(storage: Storage, registry: Registry) -> list[Version]:
    """Register every complete release in storage that the registry lacks.

    Numbers are given anew, in the order in which the releases were made.

    Returns:
        The versions that were added.
    """
    known = {version.content_id for version in registry.versions()}
    missing = []
    for release in list_releases(storage):
        if release in known:
            continue
        try:
            missing.append(read_manifest(storage, release))
        except ReleaseError as error:
            _log.warning("Release %s is left out: %s", release, error)
    missing.sort(
        key=lambda one: (one.facts.get("pointer_moves") or 0, one.facts.get("created", ""))
    )
    added = [
        registry.register(None, one.id, {"release_uri": storage.uri(f"releases/{one.id}/")})
        for one in missing
    ]
    sync_alias(storage, registry)
    return added


def release_of(version: Version) -> str:
    """Id of a version's release.

    Raises:
        ReleaseError: the version was registered by another program.
    """
    if version.content_id is None:
        raise ReleaseError(
            f"Version {version.number} names no release. It was not registered by this workflow; "
            "retrain, and use the version that it makes."
        )
    return version.content_id

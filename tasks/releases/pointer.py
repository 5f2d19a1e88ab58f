"""The champion pointer in storage, and the registry, which follows it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from tasks.errors import OvertakenError, ReleaseError
from tasks.releases.release import list_releases, read_manifest
from tasks.services.mlflow import CHALLENGER, CHAMPION, Registry, Version
from tasks.services.s3 import ChangedError, MissingObjectError, Storage

KEY = "champion.json"

_log = logging.getLogger(__name__)


class Move(BaseModel):
    """One move of the champion, kept for good; numbers and times are for display only.

    Args:
        release: id of the release that became champion.
        version: its number in the registry on that day.
        previous: number of the champion before.
        metrics: its scores on the test split.
        overruled: failed checks of a forced promotion.
        created: when the release was made.
        pointer_moves: how many moves there were then; None for releases of earlier
            program versions.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    release: str = Field(pattern=r"^[0-9a-f]{32}$")
    version: int = Field(ge=1)
    previous: int | None = Field(default=None, ge=1)
    action: Literal["promote", "rollback"] = "promote"
    by: str = ""
    reason: str = ""
    at: str = ""
    metrics: dict[str, float | None] = {}
    overruled: tuple[str, ...] = ()
    created: str = ""
    pointer_moves: int | None = Field(default=None, ge=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def forced(self) -> bool:
        """Whether it was promoted in spite of failed checks."""
        return bool(self.overruled)

    def describe(self) -> str:
        """The move in one line."""
        before = f"version {self.previous}" if self.previous else "none"
        force = f" (FORCED: {'; '.join(self.overruled)})" if self.forced else ""
        return (
            f"{self.at} {self.action}: {before} -> version {self.version}, "
            f"by {self.by}: {self.reason}{force}"
        )


class Pointer(Move):
    """Content of `champion.json`: the last move, and all moves before it.

    One object holds pointer and history, so that no crash can leave one without the other.
    """

    history: tuple[Move, ...] = ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move, oldest first."""
        return (*self.history, Move(**self.model_dump(exclude={"history"})))

    def former(self) -> Move | None:
        """The promotion before the present one; None where there is none.

        A rollback undoes one promotion, so two rollbacks go back by two.
        """
        standing: list[Move] = []
        for move in self.moves:
            if move.action == "rollback":
                standing[-1:] = []
            else:
                standing.append(move)
        return standing[-2] if len(standing) > 1 else None


@dataclass(frozen=True)
class Champion:
    """A pointer as it was read, with the etag that the next move must match."""

    pointer: Pointer
    etag: str


def read_champion(storage: Storage) -> Champion | None:
    """Return the present champion, or None before the first promotion.

    Raises:
        ReleaseError: the pointer is damaged, not signed as required, or older than one
            seen before.
    """
    place = storage.uri(KEY)
    try:
        content, etag = storage.read(KEY)
    except MissingObjectError:
        storage.trust.check_newest(place, 0)
        return None
    pointer = storage.trust.read(Pointer, _signed_name(storage), content, place)
    storage.trust.check_newest(place, len(pointer.moves))
    return Champion(pointer, etag)


def move_champion(storage: Storage, expected: Champion | None, new: Pointer) -> Champion:
    """Compare and set: replace the pointer if it still is the one that was read.

    Args:
        expected: what `read_champion` returned when the decision was made.

    Raises:
        OvertakenError: it was changed meanwhile; nothing was written.
        SettingsError: it must be signed and cannot be.
    """
    content = storage.trust.sign(_signed_name(storage), new)
    try:
        if expected is None:
            etag = storage.put_if_absent(KEY, content)
        else:
            etag = storage.put_if_match(KEY, content, expected.etag)
    except ChangedError:
        was = f"version {expected.pointer.version} was" if expected else "there was no"
        raise OvertakenError(
            f"The champion was changed meanwhile by another promotion: {was} champion when this "
            "one was decided. Nothing was moved. Look at `handsigns status` and promote again if "
            "it still is right."
        ) from None
    storage.trust.check_newest(storage.uri(KEY), len(new.moves))
    return Champion(new, etag)


def sign_pointer(storage: Storage) -> Champion | None:
    """Replace the pointer's signature, whoever made it, by ours; nothing else changes."""
    present = read_champion(Storage(storage.address))
    return present and move_champion(storage, present, present.pointer)


def sync_alias(storage: Storage, registry: Registry) -> str | None:
    """Point MLflow's alias at the champion's release, also if that moves meanwhile.

    Returns:
        What was done or is missing, in one sentence; None if the alias was right.
    """
    said = None
    for _ in range(10):
        champion = read_champion(storage)
        if champion is None:
            return said
        release = champion.pointer.release
        versions = registry.versions()
        held = next((one for one in versions if CHAMPION in one.aliases), None)
        if held and held.content_id == release:
            return said
        was = f"version {held.number}" if held else "nothing"
        version = next((one for one in versions if one.content_id == release), None)
        if version is None:
            return (
                f"The champion, release {release}, is not in the registry, whose alias names "
                f"{was}. Run `handsigns rebuild-registry`."
            )
        registry.set_alias(CHAMPION, version.number)
        said = f"The alias named {was}; it follows the pointer to version {version.number} again."
    return said


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

    Numbers are given again, in the order in which the releases were made.
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


def _signed_name(storage: Storage) -> str:
    """Includes the bucket: the champion of one bucket must not pass for that of another."""
    return f"{storage.address.bucket}.{KEY}"

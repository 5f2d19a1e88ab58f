"""The champion pointer in storage, and MLflow's alias that follows it."""

import json
import logging
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from tasks.errors import OvertakenError, PromotionError, ReleaseError, ServiceError, first_fault
from tasks.releases.release import refuse_constant
from tasks.services.mlflow import CHAMPION, Registry
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
    try:
        pointer = Pointer.model_validate_json(content)
        fields = json.loads(content, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(
            f"The champion pointer {place} cannot be understood ({first_fault(error)}). Put an "
            "earlier copy back; or remove it, which loses the history, and promote a version."
        ) from None
    storage.trust.verify(_signed_name(storage), fields, place)
    storage.trust.check_newest(place, len(pointer.moves))
    return Champion(pointer, etag)


def move_champion(storage: Storage, expected: Champion | None, new: Pointer) -> Champion:
    """Compare and set: replace the pointer if it still is the one that was read.

    Args:
        expected: what `read_champion` returned when the decision was made.
        new: the pointer to write; its signature is added here.

    Raises:
        OvertakenError: it was changed meanwhile; nothing was written.
        SettingsError: it must be signed and cannot be.
    """
    signed = storage.trust.sign(_signed_name(storage), new.model_dump(mode="json"))
    content = json.dumps(signed, indent=1).encode() + b"\n"
    try:
        if expected is None:
            etag = storage.put_if_absent(KEY, content)
        else:
            etag = storage.put_if_match(KEY, content, expected.etag)
    except ChangedError:
        raise overtaken(expected) from None
    except ServiceError as error:
        etag = _written(storage, content, error)
    storage.trust.check_newest(storage.uri(KEY), len(new.moves))
    return Champion(new, etag)


def _written(storage: Storage, content: bytes, error: ServiceError) -> str:
    """Etag of a write that arrived although every answer was lost; else raise `error`."""
    try:
        found, etag = storage.read(KEY)
    except MissingObjectError:
        raise error from None
    if found != content:
        raise error
    return etag


def overtaken(expected: Champion | None) -> OvertakenError:
    """The error for a champion that is no longer `expected`."""
    was = f"version {expected.pointer.version} was" if expected else "there was no"
    return OvertakenError(
        f"The champion was changed meanwhile by another promotion: {was} champion when this one "
        "was decided. Nothing was moved. Look at `handsigns status` and promote again if it "
        "still is right."
    )


def sign_pointer(storage: Storage) -> Champion | None:
    """Replace the pointer's signature, whoever made it, by ours; nothing else changes."""
    present = read_champion(Storage(storage.address))
    return present and move_champion(storage, present, present.pointer)


def check_alias(registry: Registry, expected: Champion) -> None:
    """Refuse, with `PromotionError`, to overwrite an alias that somebody moved by hand."""
    held = registry.version_by_alias(CHAMPION)
    release = expected.pointer.release
    if held and held.content_id == release:
        return
    # A registry that never knew the champion cannot name it.
    if held is None and registry.find(release) is None:
        return
    now = f"names version {held.number}" if held else "is gone"
    raise PromotionError(
        f"The alias '{CHAMPION}' was changed in the registry: it {now}, and the champion is "
        f"version {expected.pointer.version}. Find out who moved it, use `handsigns promote` for "
        "what was meant, and run again."
    )


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
        held = registry.version_by_alias(CHAMPION)
        if held and held.content_id == release:
            return said
        was = f"version {held.number}" if held else "nothing"
        version = registry.find(release)
        if version is None:
            return (
                f"The champion, release {release}, is not in the registry, whose alias names "
                f"{was}. Run `handsigns rebuild-registry`."
            )
        registry.set_alias(CHAMPION, version.number)
        said = f"The alias named {was}; it follows the pointer to version {version.number} again."
    return said


def _signed_name(storage: Storage) -> str:
    """Includes the bucket: the champion of one bucket must not pass for that of another."""
    return f"{storage.address.bucket}.{KEY}"

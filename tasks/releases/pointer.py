"""The champion pointer in storage, and MLflow's alias that follows it."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from tasks.errors import HandsignsError, OvertakenError, PromotionError, ReleaseError, first_fault
from tasks.releases.release import refuse_constant
from tasks.services.mlflow import CHAMPION, Registry, Version
from tasks.services.s3 import ChangedError, MissingObjectError, Storage

KEY = "champion.json"


class Move(BaseModel):
    """One move of the champion, as it is kept for good.

    Args:
        release: id of the release that became champion.
        version: its number in the model registry.
        previous: version that was champion before.
        action: how it came about.
        by: who moved it.
        reason: why.
        at: when, ISO 8601 in UTC.
        metrics: what it scored on its test split.
        overruled: what spoke against it when it was promoted all the same.
        created: when the release was made, ISO 8601 in UTC.
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

    @computed_field  # type: ignore[prop-decorator]
    @property
    def forced(self) -> bool:
        """Whether it stands there in spite of something."""
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
    """What `champion.json` says: the last move, and all moves before it.

    The history lies in the same object as the pointer, so that no crash can leave
    one without the other.

    Args:
        history: earlier moves, oldest first.
    """

    history: tuple[Move, ...] = ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move, oldest first."""
        return (*self.history, Move(**self.model_dump(exclude={"history"})))

    def former(self) -> Move | None:
        """The champion that a rollback returns to; None where there is none.

        A rollback takes back one promotion, so two in a row go back by two.
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
    """A pointer as it was read, with the etag that a move must match."""

    pointer: Pointer
    etag: str


def older_than(present: Champion | None, number: int, created: str) -> str | None:
    """Say that a later version holds an earlier release than the champion's.

    Whoever can write to the registry could name an old release by a new number; a clock
    that was wrong, of either release, looks the same.

    Args:
        present: the champion.
        number: of the version that would take its place.
        created: when that version's release was made, ISO 8601 in UTC.

    Returns:
        A short sentence without a full stop; None where all is well.
    """
    if present is None or number <= present.pointer.version:
        return None
    if not created or created >= present.pointer.created:
        return None
    return (
        f"its release is older than the champion's, though its number is later (made {created}, "
        f"and that of version {present.pointer.version} {present.pointer.created}; somebody "
        "registered an old release, or a clock was wrong)"
    )


def read_champion(storage: Storage) -> Champion | None:
    """Return the present champion, or None before the first promotion.

    Raises:
        ReleaseError: the pointer is not one, is not signed as it must be, or is older
            than one seen before.
        ServiceError: the storage does not answer.
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
            f"The champion pointer cannot be understood. Received: {place} "
            f"({first_fault(error)}). Put an earlier copy of it back; or remove it, which forgets "
            "who was champion when, and promote a version."
        ) from None
    storage.trust.verify(_signed_name(storage), fields, place)
    storage.trust.check_newest(place, len(pointer.moves))
    return Champion(pointer, etag)


def move_champion(storage: Storage, expected: Champion | None, new: Pointer) -> Champion:
    """Point to another release if nobody moved the pointer since it was read.

    Args:
        storage: bucket that holds the pointer.
        expected: what `read_champion` returned when the decision was made.
        new: what the pointer shall say.

    Returns:
        The new champion.

    Raises:
        OvertakenError: it was changed meanwhile; nothing was written.
        SettingsError: it must be signed and cannot be.
        ServiceError: the storage does not answer.
    """
    sealed = storage.trust.sign(_signed_name(storage), new.model_dump(mode="json"))
    content = json.dumps(sealed, indent=1).encode() + b"\n"
    try:
        if expected is None:
            etag = storage.put_if_absent(KEY, content)
        else:
            etag = storage.put_if_match(KEY, content, expected.etag)
    except ChangedError:
        raise _overtaken(expected) from None
    storage.trust.check_newest(storage.uri(KEY), len(new.moves))
    return Champion(new, etag)


def check_champion(storage: Storage, expected: Champion | None) -> None:
    """Refuse early what `move_champion` would refuse.

    Args:
        storage: bucket that holds the pointer.
        expected: what `read_champion` returned when the decision was made.

    Raises:
        OvertakenError: it was changed meanwhile.
        ReleaseError: it cannot be read, or is not signed as it must be.
        ServiceError: the storage does not answer.
    """
    present = read_champion(storage)
    if (present and present.etag) != (expected and expected.etag):
        raise _overtaken(expected)


def _overtaken(expected: Champion | None) -> OvertakenError:
    was = f"version {expected.pointer.version}" if expected else "none"
    return OvertakenError(
        f"The champion was changed meanwhile, by another promotion. Received: {was} as the "
        "one to replace. Look at `handsigns status` and promote again if it still is right."
    )


def sign_pointer(storage: Storage) -> Champion | None:
    """Replace the pointer's signature, whoever made it, by ours; nothing else changes.

    Returns:
        What the pointer says; None before the first promotion.

    Raises:
        OvertakenError: it was changed meanwhile; nothing was written.
        SettingsError: there is no usable signing key.
    """
    present = read_champion(Storage(storage.address))
    return present and move_champion(storage, present, present.pointer)


def _signed_name(storage: Storage) -> str:
    """With the bucket in it: the champion of one place must not become that of another."""
    return f"{storage.address.bucket}.{KEY}"


_log = logging.getLogger(__name__)


def check_alias(registry: Registry, expected: Champion) -> None:
    """Refuse to go on where somebody moved the alias by hand, rather than undo it in silence.

    Raises:
        PromotionError: the alias names another version than the pointer.
    """
    versions = registry.versions()
    held = _held(versions)
    number = expected.pointer.version
    # A registry that never knew the champion's version cannot name it.
    known = any(one.number == number for one in versions)
    if held != number and (known or held is not None):
        raise PromotionError(
            f"The alias '{CHAMPION}' was changed meanwhile, in the registry. Received: "
            f"{f'version {held}' if held else 'nothing'}, where the champion is version {number}. "
            "Find out who moved it, use `handsigns promote` for what was meant, and run again."
        )


@contextmanager
def following(version: int) -> Iterator[None]:
    """Tell the registry of a champion that has moved; that it fails is told and no failure.

    Whoever was told of one would move the champion once more.

    Args:
        version: the champion.
    """
    try:
        yield
    except HandsignsError as error:
        _log.warning(
            "Version %d is champion, and the registry could not be told. Its alias follows with "
            "the next retrain or promotion. %s",
            version,
            error,
        )


def lead_alias(storage: Storage, registry: Registry, moved: Champion) -> None:
    """Let the alias name the champion, also where the next promotion overtook this one."""
    for _ in range(10):
        registry.set_alias(CHAMPION, moved.pointer.version)
        present = read_champion(storage)
        if present is None or present.etag == moved.etag:
            return
        moved = present


def repair_alias(registry: Registry, champion: Champion) -> str | None:
    """Let the alias follow the pointer where a crash came between; what was done, in words."""
    versions = registry.versions()
    held = _held(versions)
    number = champion.pointer.version
    if held == number:
        return None
    was = f"version {held}" if held else "nothing"
    if all(one.number != number for one in versions):
        return f"The champion, version {number}, is not in this registry; its alias names {was}."
    registry.set_alias(CHAMPION, number)
    return f"The alias named {was}; it follows the pointer to version {number} again."


def _held(versions: Sequence[Version]) -> int | None:
    return next((one.number for one in versions if CHAMPION in one.aliases), None)

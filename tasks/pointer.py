"""The one object that says which release is champion, moved by compare-and-set."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import PromotionError, ReleaseError
from tasks.storage import Storage
from tasks.storage_errors import ChangedError, MissingObjectError

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

    def told(self) -> str:
        """The move in one line."""
        before = f"version {self.previous}" if self.previous else "none"
        return (
            f"{self.at} {self.action}: {before} -> version {self.version}, "
            f"by {self.by}: {self.reason}"
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
                standing.pop()
            else:
                standing.append(move)
        return standing[-2] if len(standing) > 1 else None


@dataclass(frozen=True)
class Champion:
    """A pointer as it was read, with the etag that a move must match."""

    pointer: Pointer
    etag: str


def read_champion(storage: Storage) -> Champion | None:
    """Return the present champion, or None before the first promotion.

    Raises:
        ReleaseError: the pointer is not one.
        ServiceError: the storage does not answer.
    """
    try:
        content, etag = storage.read(KEY)
    except MissingObjectError:
        return None
    try:
        return Champion(Pointer.model_validate_json(content), etag)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        raise ReleaseError(
            f"The champion pointer cannot be understood. Received: {storage.uri(KEY)} "
            f"({'.'.join(map(str, fault['loc']))}: {fault['msg']}). Promote a version to mend it."
        ) from None


def move_champion(storage: Storage, expected: Champion | None, new: Pointer) -> Champion:
    """Point to another release if nobody moved the pointer since it was read.

    Args:
        storage: bucket that holds the pointer.
        expected: what `read_champion` returned when the decision was made.
        new: what the pointer shall say.

    Returns:
        The new champion.

    Raises:
        PromotionError: it was changed meanwhile; nothing was written.
        ServiceError: the storage does not answer.
    """
    content = new.model_dump_json(indent=1).encode() + b"\n"
    try:
        if expected is None:
            etag = storage.put_if_absent(KEY, content)
        else:
            etag = storage.put_if_match(KEY, content, expected.etag)
    except ChangedError:
        was = f"version {expected.pointer.version}" if expected else "none"
        raise PromotionError(
            f"The champion was changed meanwhile, by another promotion. Received: {was} as the "
            "one to replace. Look at `handsigns status` and promote again if it still is right."
        ) from None
    return Champion(new, etag)

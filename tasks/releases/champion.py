"""The champion: a signed pointer in storage, moved by compare-and-set; the registry follows it."""

import datetime
import getpass
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from tasks.errors import OvertakenError, PromotionError
from tasks.io import read_json
from tasks.params import GateParams, load_params
from tasks.project import Project
from tasks.releases.release import DATASET_INDEX, MANIFEST, fetch, verify
from tasks.services.mlflow import CHAMPION, Registry, Version
from tasks.services.s3 import ChangedError, MissingObjectError, Storage, check_conditional_writes

KEY = "champion.json"
# Tags of a version: how it compared with the champion of its day.
COMPARED_WITH = "compared_with"
COMPARISON = "comparison"
COMPARISON_WON = "comparison_won"
METRICS = ("accuracy", "loss", "auc", "ece")
"""Scores that the history keeps of each champion, on the test photos of its day."""
PHOTOS = "photos"  # number of training photos, which the history keeps as well

_log = logging.getLogger(__name__)


class Move(BaseModel):
    """One move of the champion, kept for good; numbers and times are for display only."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    release: str = Field(pattern=r"^[0-9a-f]{32}$")
    version: int = Field(ge=1)  # in the registry on that day
    previous: int | None = Field(default=None, ge=1)  # the version before
    action: Literal["promote", "rollback"] = "promote"
    by: str = ""
    reason: str = ""
    at: str = ""
    metrics: dict[str, float | None] = {}
    overruled: tuple[str, ...] = ()  # failed checks of a forced promotion
    pointer_moves: int | None = Field(default=None, ge=0)  # of that day; an old release has none

    @computed_field  # type: ignore[prop-decorator]
    @property
    def forced(self) -> bool:
        return bool(self.overruled)

    def describe(self) -> str:
        before = f"version {self.previous}" if self.previous else "none"
        force = f" (FORCED: {'; '.join(self.overruled)})" if self.forced else ""
        return (
            f"{self.at} {self.action}: {before} -> version {self.version}, "
            f"by {self.by}: {self.reason}{force}"
        )


class Pointer(Move):
    """Content of `champion.json`: the last move, and all before it, so that no crash parts them."""

    history: tuple[Move, ...] = ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move, oldest first."""
        return (*self.history, Move(**self.model_dump(exclude={"history"})))

    def former(self) -> Move | None:
        """The promotion before the present one; two rollbacks go back by two."""
        standing: list[Move] = []
        for move in self.moves:
            standing = standing[:-1] if move.action == "rollback" else [*standing, move]
        return standing[-2] if len(standing) > 1 else None


@dataclass(frozen=True)
class Champion:
    """A pointer as it was read, with the etag that the next move must match."""

    pointer: Pointer
    etag: str


def read_champion(storage: Storage) -> Champion | None:
    """Return the present champion, whose pointer verifies and is no older one; None at first."""
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
    """Replace the pointer, or raise `OvertakenError` if it no longer is the one that was read."""
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


def record_comparison(
    registry: Registry, version: int, champion: Champion | None, won: bool, reason: str
) -> None:
    """Tag a version with the result of its comparison, for a later `promote`."""
    against = champion.pointer.release if champion else "nobody"
    answer = "yes" if won else "no"
    tags = {COMPARED_WITH: against, COMPARISON: reason, COMPARISON_WON: answer}
    registry.set_tags(version, tags)


def sync_alias(storage: Storage, registry: Registry) -> str | None:
    """Point MLflow's alias at the champion, also if that moves meanwhile; say what was done."""
    said = None
    for _ in range(10):
        champion = read_champion(storage)
        if champion is None:
            break
        version, named = registry.find(champion.pointer.release), registry.find(CHAMPION)
        if version and version == named:
            break
        was = f"version {named.number}" if named else "nothing"
        if version is None:
            return (
                f"The champion, release {champion.pointer.release}, is not in the registry, whose "
                f"alias names {was}. Run `handsigns rebuild-registry`."
            )
        registry.set_alias(CHAMPION, version.number)
        said = f"The alias named {was}; it follows the pointer to version {version.number} again."
    return said


def promote(
    storage: Storage,
    registry: Registry,
    project: Project,
    version: int,
    reason: str,
    *,
    force: bool = False,
    by: str | None = None,
) -> Move:
    """Make a registered version the champion; force overrules failed checks, and keeps them."""
    _need_reason(f"A promotion{' by force' if force else ''}", reason)
    check_conditional_writes(storage)
    found = registry.find(version)
    if found is None:
        known = ", ".join(str(one.number) for one in registry.versions()) or "none"
        raise PromotionError(
            f"There is no version {version} in the registry, only: {known}. If versions were "
            "lost, run `handsigns rebuild-registry`."
        )
    present = read_champion(storage)
    folder = fetch(storage, found.release, project.releases)
    if present and present.pointer.release == found.content_id:
        return _already(present)
    blockers = [*_failed_gates(folder, load_params(project.params).gate)]
    if present:
        blockers += _lost_comparison(registry, found, present.pointer)
        blockers += _made_earlier(folder, present.pointer)
    if blockers and not force:
        raise PromotionError(
            f"Version {version} should not be champion: {'; '.join(blockers)}. Nothing was moved. "
            "To overrule that, promote it with --force and a --reason."
        )
    photos = (read_json(folder / DATASET_INDEX) or {}).get("photos", [])
    scores = read_json(folder / "metrics.json") or {}
    scores[PHOTOS] = sum(photo["split"] == "train" for photo in photos)
    return set_champion(storage, found, present, reason, scores, by, blockers)


def rollback(
    storage: Storage,
    registry: Registry,
    reason: str,
    *,
    by: str | None = None,
    expected: str | None = None,
) -> Move:
    """Undo the promotion of the present champion, or only that of the `expected` release.

    A repeated call changes nothing: a champion that is there by a rollback stays.
    """
    _need_reason("A rollback", reason)
    check_conditional_writes(storage)
    present = read_champion(storage)
    now = present.pointer if present else None
    if present and now and now.action == "rollback":
        undone = now.history[-1].release
        if expected is None or expected == undone != now.release:
            return _already(present)
    if expected is not None and (now is None or now.release != expected):
        who = f"version {now.version}, release {now.release}," if now else "nobody"
        raise OvertakenError(
            f"The champion was changed meanwhile: it is {who} and not release {expected}. Nothing "
            "was moved. Look at `handsigns status` before you run again."
        )
    target = now.former() if now else None
    if target is None:
        raise PromotionError("There is no earlier champion to return to. Nothing was moved.")
    version = registry.find(target.release)
    if version is None:
        raise PromotionError(
            f"The earlier champion, version {target.version}, is gone from the registry. Promote "
            "another version, or run `handsigns rebuild-registry`."
        )
    verify(storage, target.release)
    update = {"action": "rollback", "reason": reason, "by": by or "", "version": version.number}
    return _move(storage, present, target.model_copy(update=update))


def set_champion(
    storage: Storage,
    version: Version,
    expected: Champion | None,
    reason: str,
    metrics: Mapping[str, float | None],
    by: str | None = None,
    overruled: Sequence[str] = (),
) -> Move:
    """Move the pointer from the champion that was `expected` to a version, verified to the byte."""
    release = verify(storage, version.release)
    move = Move(
        release=release.id,
        version=version.number,
        by=by or "",
        reason=reason,
        metrics={name: metrics.get(name) for name in (*METRICS, PHOTOS) if name in metrics},
        pointer_moves=release.facts.get("pointer_moves"),
        overruled=tuple(overruled),
    )
    try:
        return _move(storage, expected, move)
    except OvertakenError:
        present = read_champion(storage)
        if present and present.pointer.release == release.id:
            return _already(present)
        raise


def _failed_gates(release: Path, limits: GateParams) -> Iterator[str]:
    from tasks.gate import judge  # loads SciPy and scikit-learn

    verdict = read_json(release / "gate.json")
    if not isinstance(verdict, dict) or verdict.get("passed") is not True:
        yield "its own gate did not pass it"
    index = read_json(release / DATASET_INDEX)
    leaks = index.get("leaks") if isinstance(index, dict) else None
    metrics, labels = (read_json(release / f"{name}.json") for name in ("metrics", "labels"))
    if not labels:
        yield "it has no labels.json"
    for reason in judge(metrics, leaks, limits, labels or ())["reasons"]:
        yield f"today's gate refuses it, {reason}"


def _lost_comparison(registry: Registry, version: Version, now: Pointer) -> Iterator[str]:
    tags, numbers = version.tags, {move.release: move.version for move in now.moves}
    against = tags.get(COMPARED_WITH)
    if against is not None and tags.get(COMPARISON_WON) != "yes":
        yield f"compared with version {numbers.get(against, '?')} it is {tags.get(COMPARISON)}"
    if against == now.release:
        return
    present = registry.find(now.release)
    if present and present.tags.get(COMPARED_WITH) == version.content_id:
        yield f"version {now.version} took its place: {present.tags.get(COMPARISON)}"
    else:
        yield f"it was not compared with the present champion, version {now.version}"


def _made_earlier(release: Path, now: Pointer) -> Iterator[str]:
    """The count of pointer moves orders releases; numbers can be chosen, and clocks be wrong."""
    if now.pointer_moves is None:
        return
    made = read_json(release / MANIFEST)["facts"].get("pointer_moves")
    if not isinstance(made, int) or made < now.pointer_moves:
        when = f"after move {made}" if isinstance(made, int) else "by an earlier program version"
        yield (
            f"its release is older than that of version {now.version} (made {when}, and the "
            f"champion's after move {now.pointer_moves})"
        )


def _already(present: Champion) -> Move:
    """Report a repeated request as done."""
    now, further = present.pointer, ""
    if now.action == "rollback":
        further = f" To go back further, run `handsigns rollback --from {now.version}`."
    _log.warning("Version %d is champion already; nothing was moved.%s", now.version, further)
    return now


def _move(storage: Storage, before: Champion | None, move: Move) -> Move:
    fields = {
        **move.model_dump(),
        "by": move.by or _user(),
        "previous": before.pointer.version if before else None,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "history": before.pointer.moves if before else (),
    }
    return move_champion(storage, before, Pointer.model_validate(fields)).pointer


def _need_reason(what: str, reason: str) -> None:
    if not reason.strip():
        raise PromotionError(f"{what} needs a reason, for the history. Say why with --reason.")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def _signed_name(storage: Storage) -> str:
    """Includes the bucket: the champion of one bucket must not pass for that of another."""
    return f"{storage.address.bucket}.{KEY}"

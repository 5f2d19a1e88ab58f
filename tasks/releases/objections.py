"""What speaks against a version as champion: its gate, today's gate, its comparison.

A person may overrule all of it; that is then kept as a forced promotion, with these
words. The comparison is kept in the version's tags, because it is made long before
somebody promotes by hand, and with photos that may be gone by then.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from tasks.gate import judge
from tasks.params import GateParams
from tasks.releases.manifest import DATASET_INDEX, MANIFEST
from tasks.releases.pointer import Champion, older_than
from tasks.services.registry import Version
from tasks.whole import read_json

COMPARED_WITH = "compared_with"
COMPARISON = "comparison"
COMPARISON_WON = "comparison_won"
NOBODY = "nobody"


def comparison_tags(champion: Champion | None, won: bool, reason: str) -> dict[str, str]:
    """Tags that keep how a version did against the champion of that day.

    Args:
        champion: whom it was compared with; None where there was nobody.
        won: whether it may become champion.
        reason: why, in one sentence.
    """
    return {
        COMPARED_WITH: champion.pointer.release if champion else NOBODY,
        COMPARISON: reason,
        COMPARISON_WON: "yes" if won else "no",
    }


def objections(
    version: Version, release: Path, present: Champion | None, limits: GateParams
) -> tuple[str, ...]:
    """List what speaks against a version as champion.

    Args:
        version: with its tags, see `comparison_tags`.
        release: folder of its verified release.
        present: the champion that it would replace.
        limits: the gate's limits of today, which may be stricter than those of its day.

    Returns:
        One short sentence each, without a full stop; empty where nothing does.
    """
    return (
        *_of_its_gate(release),
        *_of_todays_gate(release, limits),
        *_of_champion(version.tags, present),
        *_of_age(version.number, release, present),
    )


def _of_its_gate(release: Path) -> Iterator[str]:
    verdict = read_json(release / "gate.json")
    if not isinstance(verdict, dict) or verdict.get("passed") is not True:
        yield "its own gate did not pass it"


def _of_todays_gate(release: Path, limits: GateParams) -> Iterator[str]:
    index = read_json(release / DATASET_INDEX)
    leaks = index.get("leaks") if isinstance(index, dict) else None
    for reason in judge(read_json(release / "metrics.json"), leaks, limits).reasons:
        yield f"today's gate refuses it, {reason}"


def _of_champion(tags: Mapping[str, str], present: Champion | None) -> Iterator[str]:
    if present is None:
        return
    if tags.get(COMPARED_WITH) != present.pointer.release:
        yield f"it was not compared with the present champion, version {present.pointer.version}"
    elif tags.get(COMPARISON_WON) != "yes":
        yield f"compared with version {present.pointer.version} it is {tags.get(COMPARISON)}"


def _of_age(number: int, release: Path, present: Champion | None) -> Iterator[str]:
    created = str(read_json(release / MANIFEST)["facts"].get("created", ""))
    if fault := older_than(present, number, created):
        yield fault

"""Which of the photos of an import are taken: the rules, without touching a file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tasks.incoming.held import Place

TAKEN = "taken"
ALREADY_THERE = "already there"


@dataclass(frozen=True)
class Candidate:
    """A sound photo of the source: its stored name and where it belongs."""

    origin: str
    name: str
    place: Place


def verdicts(candidates: Iterable[Candidate], held: Mapping[str, Place]) -> list[str]:
    """Decide for each photo; the order of the files makes no difference to what is held.

    A photo that is held stays as it is: the same photo under another label or in the
    other split is set aside. Within one import, the same photo under two labels is set
    aside everywhere, and of one in both splits the test keeps it.

    Args:
        candidates: all sound photos of one import.
        held: name and place of each photo in `data/`.

    Returns:
        `TAKEN`, `ALREADY_THERE` or a reason, for each candidate in order.
    """
    candidates = list(candidates)
    wanted: dict[str, set[Place]] = {}
    for candidate in candidates:
        wanted.setdefault(candidate.name, set()).add(candidate.place)
    taken: set[str] = set()
    decided = []
    for candidate in candidates:
        verdict = _verdict(candidate, wanted[candidate.name], held.get(candidate.name))
        if verdict == TAKEN and candidate.name in taken:
            verdict = ALREADY_THERE
        if verdict == TAKEN:
            taken.add(candidate.name)
        decided.append(verdict)
    return decided


def _verdict(candidate: Candidate, wanted: set[Place], held: Place | None) -> str:
    split, label = candidate.place
    if held == candidate.place:
        return ALREADY_THERE
    labels = sorted({label for _, label in wanted} | ({held[1]} if held else set()))
    if held and held[1] != label:
        return f"same photo under two labels: it is held as {held[1]}"
    if not held and len(labels) > 1:
        return f"same photo under two labels: {' and '.join(labels)}"
    kept = held or (("test", label) if ("test", label) in wanted else candidate.place)
    if kept[0] != split:
        return f"same photo in train and test: {kept[0]} keeps it"
    return TAKEN

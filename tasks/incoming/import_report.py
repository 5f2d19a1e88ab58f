"""What became of each file of an import."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tasks.incoming.held import Place
from tasks.incoming.quarantine import SetAside
from tasks.layout import FOLDERS


@dataclass(frozen=True)
class ImportReport:
    """What became of each file of an import.

    Args:
        taken: photos per split and label that are new in `data/`.
        already_there: photos per split and label that were held, or came twice.
        quarantined: files that were set aside, in the order of the source.
        ignored: hidden files and system clutter.
        removed: photos that `replace` took out of `data/`.
    """

    taken: dict[Place, int]
    already_there: dict[Place, int]
    quarantined: tuple[SetAside, ...]
    ignored: int
    removed: int

    @property
    def usable(self) -> bool:
        """Whether any file is a photo that is held now."""
        return bool(self.taken or self.already_there)

    def kinds(self) -> dict[str, int]:
        """Files set aside by kind of reason, most frequent first."""
        return dict(Counter(aside.kind for aside in self.quarantined).most_common())

    def told_kinds(self) -> str:
        """The same in words."""
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds().items())

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return {
            "taken": _by_split(self.taken),
            "already_there": _by_split(self.already_there),
            "quarantined": [aside.to_json() for aside in self.quarantined],
            "ignored": self.ignored,
            "removed": self.removed,
        }


def _by_split(counts: dict[Place, int]) -> dict[str, dict[str, int]]:
    return {
        split: {label: n for (s, label), n in sorted(counts.items()) if s == split}
        for split in FOLDERS
    }

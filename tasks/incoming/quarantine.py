"""Files that were set aside: a copy of each, and a list that says why."""

import hashlib
import json
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.incoming.held import writing
from tasks.layout import Layout
from tasks.whole import whole_file, write_json

MAX_COPIES = 2**30
"""Bytes of copies that one import may leave; beyond it files are listed only."""


@dataclass(frozen=True)
class SetAside:
    """One file that was not taken.

    Args:
        origin: where it was in the source.
        reason: `kind: detail`.
        copy: path below `artifacts/quarantine/`; None where none was made.
    """

    origin: str
    reason: str
    copy: str | None = None

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]

    def to_json(self) -> dict[str, str | None]:
        return {"origin": self.origin, "reason": self.reason, "copy": self.copy}


class Quarantine:
    """Where one import puts what it sets aside.

    Copies are named by content below a folder named by the kind of fault, so that the
    same import twice leaves the same files.

    Args:
        layout: the checkout.
    """

    def __init__(self, layout: Layout) -> None:
        self._folder = layout.quarantine
        self._layout = layout
        self._room = MAX_COPIES

    def keep(self, origin: str, reason: str, content: bytes | None) -> SetAside:
        """Copy one file and give its entry; nothing is copied of what could not be read."""
        aside = SetAside(origin, reason)
        if not content or len(content) > self._room:
            return aside
        self._room -= len(content)
        digest = hashlib.sha256(content).hexdigest()[:12]
        copy = f"{_plain(aside.kind)}/{digest}-{_plain(origin.split('/')[-1])}"
        path = self._folder / copy
        with writing(path):
            if not path.exists():
                with whole_file(path) as temporary:
                    temporary.write_bytes(content)
        return SetAside(origin, reason, copy)

    def finish(
        self,
        source: str,
        aside: Sequence[SetAside],
        forget: bool,
        standing: Container[str] = (),
    ) -> None:
        """List this import's files in place of what the same source had set aside before.

        Args:
            source: what the list calls the source.
            aside: its files.
            forget: drop what other sources had set aside, too.
            standing: origins of this source that were not read again; what was said of
                them still holds.
        """
        # Of a list that cannot be read nobody knows which copies are somebody's.
        listed = _listed(self._layout)
        known = listed is not None or not _list(self._layout).exists()
        earlier = listed or {}
        sources = {} if forget else dict(earlier)
        files = [each for each in earlier.get(source, []) if each["origin"] in standing]
        sources[source] = files + [each.to_json() for each in aside]
        if not sources[source]:
            del sources[source]
        with writing(self._folder):
            if sources or self._folder.exists():
                if not known:
                    _list(self._layout).replace(_spoilt(self._layout))
                write_json(_list(self._layout), {"sources": sources})
                if not _spoilt(self._layout).exists():
                    self._prune({each["copy"] for files in sources.values() for each in files})

    def _prune(self, listed: set[str | None]) -> None:
        for path in sorted(self._folder.glob("*/*")):
            if path.is_file() and path.relative_to(self._folder).as_posix() not in listed:
                path.unlink()


def set_aside(layout: Layout) -> dict[str, list[dict[str, Any]]]:
    """Files that are listed, by source; none where the list cannot be read."""
    return _listed(layout) or {}


def _listed(layout: Layout) -> dict[str, list[dict[str, Any]]] | None:
    try:
        sources = json.loads(_list(layout).read_text(encoding="utf-8"))["sources"]
        return {
            str(name): [SetAside(**each).to_json() for each in files]
            for name, files in sources.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _list(layout: Layout) -> Path:
    return layout.quarantine / "quarantine.json"


def _spoilt(layout: Layout) -> Path:
    """A list that could not be read; while it lies there, no copy goes."""
    return layout.quarantine / "quarantine.json.spoilt"


def _plain(name: str) -> str:
    """Letters, digits, dot, dash and underscore; never hidden, never a parent."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:].lstrip(".") or "_"

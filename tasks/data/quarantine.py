"""The quarantine: files that were not imported, with the reason of each."""

import hashlib
import json
import re
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass

from tasks.data.directory import file_errors
from tasks.io import atomic_write, write_json
from tasks.project import Project

MAX_COPIES = 2**30
"""Bytes that one import may copy into the quarantine; beyond it files are only listed."""


@dataclass(frozen=True)
class QuarantinedFile:
    """A file that was not imported: its path in the source, and `kind: detail`.

    `copy` is its path below `artifacts/quarantine/`, if it was copied.
    """

    origin: str
    reason: str
    copy: str | None = None

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]


class Quarantine:
    """Copies of the files that were not imported, by kind, and a list with their reasons."""

    def __init__(self, project: Project) -> None:
        self._folder = project.quarantine
        self._list = project.quarantine / "quarantine.json"
        # A list that could not be read. While it is there, no copy is removed.
        self._damaged = project.quarantine / "quarantine.json.damaged"
        self._room = MAX_COPIES

    def add(self, origin: str, reason: str, content: bytes) -> QuarantinedFile:
        """Copy one file, if it could be read."""
        file = QuarantinedFile(origin, reason)
        if not content or len(content) > self._room:
            return file
        self._room -= len(content)
        digest = hashlib.sha256(content).hexdigest()[:12]
        copy = f"{_safe_name(file.kind)}/{digest}-{_safe_name(origin.split('/')[-1])}"
        path = self._folder / copy
        with file_errors(path):
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
        return QuarantinedFile(origin, reason, copy)

    def listed(self) -> dict[str, list[QuarantinedFile]]:
        """The files by source; empty if the list cannot be read."""
        return self._read() or {}

    def update(
        self,
        source: str,
        files: Sequence[QuarantinedFile],
        only: bool,
        unchanged: Container[str] = (),
    ) -> None:
        """Replace the entries of a source, and remove copies that are not listed.

        Entries of `unchanged` origins stay. With `only`, other sources are forgotten.
        """
        before = self._read()
        sources = {} if only else dict(before or {})
        kept = [file for file in (before or {}).get(source, []) if file.origin in unchanged]
        sources[source] = [*kept, *files]
        sources = {name: listed for name, listed in sources.items() if listed}
        if not sources and not self._folder.exists():
            return
        with file_errors(self._folder):
            if before is None and self._list.exists():
                self._list.replace(self._damaged)
            listed = {name: [asdict(file) for file in files] for name, files in sources.items()}
            write_json(self._list, {"sources": listed})
            if not self._damaged.exists():
                copies = {file.copy for files in sources.values() for file in files}
                for path in self._folder.glob("*/*"):
                    if path.relative_to(self._folder).as_posix() not in copies:
                        path.unlink()

    def _read(self) -> dict[str, list[QuarantinedFile]] | None:
        try:
            sources = json.loads(self._list.read_text(encoding="utf-8"))["sources"]
            return {
                str(name): [QuarantinedFile(**file) for file in files]
                for name, files in sources.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _safe_name(name: str) -> str:
    """Letters, digits, dot, dash and underscore; never hidden, never a parent folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:].lstrip(".") or "_"

"""The inbox: a folder or bucket whose new photos are imported before each retrain.

Files stay in the inbox. A file that was imported is remembered in `.local/inbox.json` by
its name and its size and time (or etag), and is not read again while it stays the same
and `data/` is the version that it went into. Forgetting costs only time: `data/` knows
photos by their content.
"""

from functools import partial
from pathlib import Path

from tasks.data.images import printable
from tasks.data.importer import ImportReport, import_source
from tasks.data.sources import (
    UNREADABLE,
    Source,
    SourceFile,
    arrange,
    folder_files,
    is_clutter,
)
from tasks.errors import ImageError, SourceError
from tasks.io import read_json, write_json
from tasks.project import Project
from tasks.services.s3 import MissingObjectError, Storage
from tasks.stage import Progress, silent

MAX_FILES = 200_000

Listing = list[tuple[SourceFile, str]]
"""Files, each with a stamp that changes with the file."""


class Inbox:
    """New files of an inbox, since they were imported into this version of `data/`.

    Raises:
        SourceError: there are files but no label folder, or too many files.
    """

    def __init__(self, project: Project, name: str, listing: Listing, version: str | None) -> None:
        self.name = printable(name)
        if len(listing) > MAX_FILES:
            raise SourceError(
                f"Inbox '{self.name}' has more than {MAX_FILES} files. Name a smaller folder."
            )
        self._project = project
        self._stamps = {file.origin: stamp for file, stamp in listing}
        visible = [file for file, _ in listing if not any(map(is_clutter, file.parts))]
        files = arrange(visible, name).files if visible else ()
        last = read_json(project.inbox)
        known = isinstance(last, dict) and (last.get("inbox"), last.get("data"))
        seen = last.get("seen") if known == (self.name, version) else None
        seen = seen if isinstance(seen, dict) else {}
        self.new = tuple(f for f in files if seen.get(f.origin) != self._stamps[f.origin])
        self._already_seen = {f.origin for f in files} - {f.origin for f in self.new}
        self._unread: set[str] = set()

    def import_new(self, replace: bool = False, progress: Progress = silent) -> ImportReport:
        """Import the new files, in place of all other photos with `replace`."""
        report = import_source(
            self._project, Source(self.new), self.name, self._already_seen, replace, progress
        )
        self._unread = {file.origin for file in report.quarantined if file.kind == UNREADABLE}
        return report

    def remember(self, version: str) -> None:
        """Remember that all readable files are part of this version of `data/`."""
        seen = {name: stamp for name, stamp in self._stamps.items() if name not in self._unread}
        write_json(self._project.inbox, {"inbox": self.name, "data": version, "seen": seen})


def list_folder(folder: Path) -> Listing:
    """List a folder's files with size and time of change."""
    if not folder.is_dir():
        raise SourceError(
            f"HANDSIGNS_INBOX='{printable(str(folder))}' is not a folder. Create it, or correct "
            "the setting."
        )
    return [(file, _stamp(folder.joinpath(*file.parts))) for file in folder_files(folder)]


def list_bucket(storage: Storage, prefix: str) -> Listing:
    """List the objects below a prefix with their etags."""
    folder = f"{prefix.strip('/')}/".lstrip("/")
    listing = []
    for stored in storage.list(folder, MAX_FILES + 1):
        if stored.key.endswith("/") and not stored.size:
            continue  # a folder, as consoles create it
        parts = tuple(stored.key.removeprefix(folder).split("/"))
        if {"", ".", ".."}.isdisjoint(parts):
            file = SourceFile(parts, partial(_read_object, storage, stored.key))
        else:
            file = SourceFile(parts, None, "name: it has empty or dotted parts")
        listing.append((file, f"{stored.size}-{stored.etag}"))
    return listing


def _read_object(storage: Storage, key: str, limit: int) -> bytes:
    try:
        return storage.read_start(key, limit)
    except MissingObjectError:
        raise ImageError(f"{UNREADABLE}: it was removed meanwhile") from None


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "unreadable"
    return f"{found.st_size}-{found.st_mtime_ns}"

"""The inbox: a place that photos are dropped into, looked at before each retrain.

What lies there stays there. A file that was looked at is remembered by its name, size
and time (or etag) in `.local/inbox.json`, and is not read again while it stays the same
and `data/` is the version that it went into; one that could not be read is tried again
each time. Forgetting costs time only, never a photo: `data/` knows its photos by their
content.
"""

from functools import partial
from pathlib import Path

from tasks.data.folders import UNREADABLE, Entry, Source, arrange, folder_entries, is_clutter
from tasks.data.images import printable
from tasks.data.importer import ImportReport, import_items
from tasks.errors import ImageError, SourceError
from tasks.io import read_json, write_json
from tasks.project import Project
from tasks.services.s3 import MissingObjectError, Storage
from tasks.stage import Progress, silent

MAX_FILES = 200_000
"""A place with more files than this was hardly meant."""

Listing = list[tuple[Entry, str]]
"""Files, each with a stamp that changes when the file does."""


class Inbox:
    """One look into the inbox.

    Args:
        project: the checkout.
        name: where it is, for lists and messages.
        listing: what lies there.
        version: of the data now; None where there is none.

    Raises:
        SourceError: there are files but no class folder, or too many files.
    """

    def __init__(self, project: Project, name: str, listing: Listing, version: str | None) -> None:
        if len(listing) > MAX_FILES:
            raise SourceError(
                f"Inbox holds more than {MAX_FILES} files. Received: '{printable(name)}'. "
                "Name a smaller folder."
            )
        self._project = project
        self.name = printable(name)
        self._stamps = {printable("/".join(entry.parts)): stamp for entry, stamp in listing}
        visible = [entry for entry, _ in listing if not any(map(is_clutter, entry.parts))]
        items = arrange(visible, name).items if visible else ()
        last = read_json(project.inbox)
        known = isinstance(last, dict) and (last.get("inbox"), last.get("data"))
        seen = last.get("seen") if known == (self.name, version) else None
        seen = seen if isinstance(seen, dict) else {}
        self.new = tuple(
            item for item in items if seen.get(item.origin) != self._stamps[item.origin]
        )
        self._unread: frozenset[str] = frozenset()
        self._standing = {item.origin for item in items} - {item.origin for item in self.new}

    def take(self, replace: bool = False, progress: Progress = silent) -> ImportReport:
        """Bring what is new into `data/`.

        Args:
            replace: hold these photos alone, if any is usable.
            progress: told about each file.

        Returns:
            What became of each file.
        """
        source = Source(self.new)
        report = import_items(self._project, source, self.name, self._standing, replace, progress)
        aside = report.quarantined
        self._unread = frozenset(one.origin for one in aside if one.kind == UNREADABLE)
        return report

    def remember(self, version: str) -> None:
        """Keep in mind that all that could be read went into this version of the data."""
        seen = {name: stamp for name, stamp in self._stamps.items() if name not in self._unread}
        write_json(self._project.inbox, {"inbox": self.name, "data": version, "seen": seen})


def list_folder(folder: Path) -> Listing:
    """List a folder's files with size and time of change.

    Raises:
        SourceError: there is no such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise SourceError(
            "Inbox is no folder that exists. Received: "
            f"HANDSIGNS_INBOX='{printable(str(folder))}'. Make the folder, or mend the setting."
        )
    return [(entry, _stamp(folder.joinpath(*entry.parts))) for entry in folder_entries(folder)]


def list_bucket(storage: Storage, prefix: str) -> Listing:
    """List the objects below a prefix with their etags.

    Args:
        storage: the inbox's bucket.
        prefix: folder in it; empty for all of it.

    Returns:
        Each file with its stamp.

    Raises:
        ServiceError: the storage does not answer, or has no such bucket.
    """
    folder = f"{prefix.strip('/')}/".lstrip("/")
    listing = []
    for stored in storage.list(folder, MAX_FILES + 1):
        if stored.key.endswith("/") and not stored.size:
            continue  # what consoles make to show a folder
        parts = tuple(stored.key.removeprefix(folder).split("/"))
        if {"", ".", ".."}.isdisjoint(parts):
            entry = Entry(parts, partial(_read_object, storage, stored.key))
        else:
            entry = Entry(parts, None, "name: it has empty or dotted parts")
        listing.append((entry, f"{stored.size}-{stored.etag}"))
    return listing


def _read_object(storage: Storage, key: str, limit: int) -> bytes:
    try:
        return storage.read_start(key, limit)
    except MissingObjectError:
        raise ImageError(f"{UNREADABLE}: it went away meanwhile") from None


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "unreadable"
    return f"{found.st_size}-{found.st_mtime_ns}"

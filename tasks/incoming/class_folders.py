"""Where each file of a source belongs: its split and label, told by its path."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tasks.errors import ImageError, SourceError
from tasks.labels import LABELS
from tasks.layout import FOLDERS
from tasks.pictures.images import Read, printable

UNREADABLE = "cannot be read"
"""The kind of fault of a file that may be readable another time."""

_CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Entry:
    """One file of a source, before anybody knows what it is.

    Args:
        parts: its path inside the source.
        read: gives its bytes; None where they must not be read.
        fault: why it cannot be taken, if that is known already.
    """

    parts: tuple[str, ...]
    read: Read | None
    fault: str | None = None


@dataclass(frozen=True)
class Item:
    """One file of a source with its place: `label` is None where it has none."""

    origin: str
    split: str
    label: str | None
    read: Read | None
    fault: str | None = None


@dataclass(frozen=True)
class Source:
    """All files of a source; hidden ones and system clutter are only counted."""

    items: tuple[Item, ...]
    ignored: int = 0


def arrange(entries: list[Entry], where: str) -> Source:
    """Give each file its split and label.

    `<label>/<file>` and `train/<label>/<file>` go to train, `test/<label>/<file>` to
    test. Folders that hold everything (`signs/<label>/<file>`) are passed through.
    Folders below a label's belong to that label.

    Args:
        entries: the files.
        where: what an error calls the source.

    Returns:
        The source's items, in the order of their paths.

    Raises:
        SourceError: there is no file, or none is in a label's folder.
    """
    shown = printable(where)
    seen = [entry for entry in entries if not any(map(is_clutter, entry.parts))]
    if not seen:
        raise SourceError(f"Source is empty. Received: '{shown}'. Name a folder with photos.")
    depth = _depth(seen)
    items = [_place(entry, depth) for entry in sorted(seen, key=lambda entry: entry.parts)]
    if not any(item.label for item in items):
        raise SourceError(
            f"Source has no folder named 0 to 5. Received: '{shown}'. "
            "Name the folder that holds the six class folders."
        )
    return Source(tuple(items), len(entries) - len(seen))


def folder_entries(folder: Path) -> list[Entry]:
    """List a folder's files, never following a link out of it.

    Args:
        folder: the folder.

    Returns:
        One entry for each file or link below it.

    Raises:
        SourceError: a folder below it cannot be listed.
    """
    root = folder.resolve()
    return [_entry(root, path) for path in _walk(root)]


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise SourceError(
            f"Source cannot be read ({error.strerror}). "
            f"Received: '{printable(str(error.filename))}'. Give yourself permission to read it."
        ) from error

    for parent, folders, files in os.walk(root, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in [*files, *links])


def _entry(root: Path, path: Path) -> Entry:
    parts = path.relative_to(root).parts
    target = path
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return Entry(parts, None, "symbolic link: it leads nowhere")
        if not target.is_relative_to(root):
            return Entry(parts, None, "symbolic link: it leaves the source")
        if target.is_dir():
            return Entry(parts, None, "symbolic link: it names a folder")
    return Entry(parts, partial(_read_file, target))


def _read_file(path: Path, limit: int) -> bytes:
    # Without O_NONBLOCK, opening a pipe waits for a writer; with O_NOFOLLOW, a file that
    # was swapped for a link since it was listed is refused.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("not a file: a pipe, socket or device")
            return file.read(limit)
    except OSError as error:
        raise ImageError(f"{UNREADABLE}: {error.strerror}") from error


def is_clutter(part: str) -> bool:
    """Whether a name is hidden, or one that systems leave behind."""
    return part.startswith(".") or part in _CLUTTER


def _depth(entries: list[Entry]) -> int:
    """Count the single folders that hold everything above labels and splits."""
    depth = 0
    while True:
        names = {entry.parts[depth] for entry in entries if len(entry.parts) > depth + 1}
        if len(names) != 1:
            return depth
        (name,) = names
        if name in LABELS or name.lower() in FOLDERS:
            return depth
        depth += 1


def _place(entry: Entry, depth: int) -> Item:
    origin = printable("/".join(entry.parts))
    folders = entry.parts[depth:-1]
    split = "train"
    if folders and folders[0].lower() in FOLDERS:
        split = folders[0].lower()
        folders = folders[1:]
    if entry.fault:
        return Item(origin, split, None, entry.read, entry.fault)
    if not folders:
        return Item(origin, split, None, entry.read, "no label: it lies in no class folder")
    if folders[0] not in LABELS:
        return Item(origin, split, None, entry.read, _label_fault(folders[0]))
    return Item(origin, split, folders[0], entry.read)


def _label_fault(name: str) -> str:
    if re.fullmatch(r"-?[0-9]+", name):
        return f"label outside 0 to 5: {name[:40]}"
    return f"unknown label folder: {printable(name)[:80]!r} is none of 0 to 5"

"""Class folders and zip files of photos."""

import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tasks.data.images import Read, printable
from tasks.errors import ImageError, SourceError
from tasks.params import LABELS
from tasks.project import FOLDERS

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
    return [_folder_entry(root, path) for path in _walk(root)]


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise SourceError(
            f"Source cannot be read ({error.strerror}). "
            f"Received: '{printable(str(error.filename))}'. Give yourself permission to read it."
        ) from error

    for parent, folders, files in os.walk(root, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in [*files, *links])


def _folder_entry(root: Path, path: Path) -> Entry:
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


MAX_TOTAL = 8 * 2**30
MAX_RATIO = 100
"""Of a whole archive and of a member above `RATIO_FROM` bytes; photos compress to about 1."""

RATIO_FROM = 2**20
MAX_DIRECTORY = 16 * 2**20
"""Bytes of the archive's list of members, which has to fit in memory: about 150,000 photos."""

_ENCRYPTED = 0x1


class _Directory(io.FileIO):
    """A file that refuses the one long read by which zipfile loads the list of members."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise SourceError(
                f"Archive lists too many members ({size} bytes of list). "
                f"Received: '{printable(str(self.name))}'. Unpack it and import the folder."
            )
        return super().read(size)


@contextmanager
def zip_entries(path: Path) -> Iterator[list[Entry]]:
    """Open an archive and list its files.

    Everything is checked from the list of members before one of them is read: names
    that leave the archive's folder, links, encryption, and sizes that a photo collection
    does not have. The entries can be read until the context ends.

    Args:
        path: the archive.

    Yields:
        One entry for each member that is not a folder.

    Raises:
        SourceError: the archive is damaged or not to be trusted.
    """
    with _Directory(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except SourceError:
            raise
        except Exception as error:  # zipfile raises what it likes on a damaged archive
            raise _refused_zip(path, f"is damaged ({printable(str(error))})") from error
        with archive:
            _check_sizes(path, archive.infolist())
            entries = {member: _zip_entry(path, archive, member) for member in archive.infolist()}
            yield [entry for member, entry in entries.items() if not _is_folder(member)]


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    packed = sum(member.compress_size for member in members)
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL:
        raise _refused_zip(path, f"unpacks to more than {MAX_TOTAL // 2**30} GiB")
    if packed > path.stat().st_size:
        raise _refused_zip(path, "has members that overlap")
    for member in members:
        if member.file_size > max(RATIO_FROM, MAX_RATIO * member.compress_size):
            name = printable(member.filename)
            raise _refused_zip(path, f"is a bomb ('{name}' unpacks to {member.file_size} bytes)")
    if total > max(RATIO_FROM, MAX_RATIO * packed):
        raise _refused_zip(path, f"is a bomb ({packed} bytes unpack to {total})")


def _is_folder(member: zipfile.ZipInfo) -> bool:
    return member.orig_filename.endswith(("/", "\\"))


def _zip_entry(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    # Windows tools write backslashes; as separators they must not smuggle in a parent.
    name = member.orig_filename.replace("\\", "/")
    shown = printable(member.orig_filename)
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or name[1:2] == ":" or "\0" in name or not parts:
        raise _refused_zip(path, f"has a member with an absolute or broken path ('{shown}')")
    if ".." in parts:
        raise _refused_zip(path, f"has a member that leaves its folder ('{shown}')")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "symbolic link" if kind == stat.S_IFLNK else "special file"
        raise _refused_zip(path, f"has a member that is a {what} ('{shown}')")
    if member.flag_bits & _ENCRYPTED:
        raise _refused_zip(path, f"has an encrypted member ('{shown}')")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The other methods let the archive choose how much memory unpacking takes.
        raise _refused_zip(path, f"has a member that is neither stored nor deflated ('{shown}')")
    return Entry(parts, partial(_read_member, archive, member))


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    try:
        with archive.open(member) as stream:
            return stream.read(limit)
    except Exception as error:  # zipfile and zlib raise what they like on a damaged member
        raise ImageError(f"damaged in the archive: {printable(str(error))[:120]}") from error


def _refused_zip(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"Archive {fault}. Received: '{printable(str(path))}'. "
        "Nothing was taken; pack the class folders anew."
    )

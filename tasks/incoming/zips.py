"""Read a .zip of class folders without extracting it by name."""

import io
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tasks.errors import ImageError, SourceError
from tasks.incoming.class_folders import Entry
from tasks.pictures.images import printable

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
            raise _refused(path, f"is damaged ({printable(str(error))})") from error
        with archive:
            _check_sizes(path, archive.infolist())
            entries = {member: _entry(path, archive, member) for member in archive.infolist()}
            yield [entry for member, entry in entries.items() if not _is_folder(member)]


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    packed = sum(member.compress_size for member in members)
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL:
        raise _refused(path, f"unpacks to more than {MAX_TOTAL // 2**30} GiB")
    if packed > path.stat().st_size:
        raise _refused(path, "has members that overlap")
    for member in members:
        if member.file_size > max(RATIO_FROM, MAX_RATIO * member.compress_size):
            name = printable(member.filename)
            raise _refused(path, f"is a bomb ('{name}' unpacks to {member.file_size} bytes)")
    if total > max(RATIO_FROM, MAX_RATIO * packed):
        raise _refused(path, f"is a bomb ({packed} bytes unpack to {total})")


def _is_folder(member: zipfile.ZipInfo) -> bool:
    return member.orig_filename.endswith(("/", "\\"))


def _entry(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    # Windows tools write backslashes; as separators they must not smuggle in a parent.
    name = member.orig_filename.replace("\\", "/")
    shown = printable(member.orig_filename)
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or name[1:2] == ":" or "\0" in name or not parts:
        raise _refused(path, f"has a member with an absolute or broken path ('{shown}')")
    if ".." in parts:
        raise _refused(path, f"has a member that leaves its folder ('{shown}')")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "symbolic link" if kind == stat.S_IFLNK else "special file"
        raise _refused(path, f"has a member that is a {what} ('{shown}')")
    if member.flag_bits & _ENCRYPTED:
        raise _refused(path, f"has an encrypted member ('{shown}')")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The other methods let the archive choose how much memory unpacking takes.
        raise _refused(path, f"has a member that is neither stored nor deflated ('{shown}')")
    return Entry(parts, partial(_read_member, archive, member))


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    try:
        with archive.open(member) as stream:
            return stream.read(limit)
    except Exception as error:  # zipfile and zlib raise what they like on a damaged member
        raise ImageError(f"damaged in the archive: {printable(str(error))[:120]}") from error


def _refused(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"Archive {fault}. Received: '{printable(str(path))}'. "
        "Nothing was taken; pack the class folders anew."
    )

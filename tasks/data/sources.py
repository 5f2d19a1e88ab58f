"""Read photos from class folders, zip archives and HDF5 files that nobody checked yet."""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tasks.data.archives import h5_files, zip_files
from tasks.data.images import Read, printable
from tasks.errors import ImageError, SourceError
from tasks.params import LABELS
from tasks.project import FOLDERS

UNREADABLE = "cannot be read"
"""Kind of fault of a file that may be readable another time."""
UNKNOWN_FOLDER = "unknown label folder"

SPLITS = {"train": "train", "training": "train", "val": "train", "valid": "train"}
SPLITS |= {"validation": "train", "test": "test", "testing": "test"}
"""Folder names of exporters; their validation photos are trained on, ours are split anew."""

_CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini")
_H5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ZIP_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, before it is read; `read` is None if it must not be."""

    parts: tuple[str, ...]
    read: Read | None
    fault: str | None = None
    split: str = "train"
    label: str | None = None

    @property
    def origin(self) -> str:
        """The path, fit to print."""
        return printable("/".join(self.parts))


@dataclass(frozen=True)
class Source:
    """The files of a source; hidden files and system clutter are only counted."""

    files: tuple[SourceFile, ...]
    ignored: int = 0


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """List label folders, a .zip of them, an .h5 file, or a folder of .h5 files.

    Raises:
        SourceError: it is missing, empty, unreadable, damaged or malicious.
    """
    with ExitStack() as stack:
        try:
            source = _recognize(path, stack)
        except FileNotFoundError as error:
            raise _refused(path, "does not exist. Check the path") from error
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or printable(str(error))
            raise _refused(path, f"cannot be read ({fault}). Check its permissions") from error
        name = path.resolve().name
        files = (replace(file, parts=(name, *file.parts)) for file in source.files)
        yield replace(source, files=tuple(files))


def as_test(source: Source, path: Path) -> Source:
    """Put all files of a source into the test split."""
    if {file.split for file in source.files} == set(FOLDERS):
        raise _refused(path, "has training photos too. Name only its test folder with --test")
    return replace(source, files=tuple(replace(file, split="test") for file in source.files))


def arrange(files: list[SourceFile], where: str) -> Source:
    """Find the split and label of each file by the folders above it.

    Folders above those of labels (of a split, a day, an export) are passed through, each by
    itself. Beside label folders, any other folder is an unknown label, or a split. Folders
    below a label's belong to the label.

    Raises:
        SourceError: there is no file, or no label folder.
    """
    visible = [file for file in files if not any(map(is_clutter, file.parts))]
    if not visible:
        raise SourceError(f"'{printable(where)}' is empty. Name a folder with photos.")
    found = sorted(_place(visible, 0), key=lambda file: file.parts)
    if not any(file.label for file in found):
        raise SourceError(
            f"'{printable(where)}' has no folder named {_labels()}. Name the folder that holds "
            "the label folders."
        )
    return Source(tuple(found), len(files) - len(visible))


def folder_files(folder: Path) -> list[SourceFile]:
    """List the files below a folder.

    Links to files are followed inside the folder, and links to folders also outside of
    it if they and their target belong to this user.

    Raises:
        SourceError: a folder cannot be listed.
    """
    root = folder.resolve()
    return list(_walk(root, (), (root,)))


def is_clutter(name: str) -> bool:
    """Whether a file is hidden, or left behind by an operating system."""
    return name.startswith(".") or name in _CLUTTER


def _recognize(path: Path, stack: ExitStack) -> Source:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        files = folder_files(path)
        names = sorted(file.parts[0] for file in files if _is_h5(file))
        if names and all(len(file.parts) == 1 for file in files):
            return Source(tuple(one for name in names for one in _from_h5(path / name, stack)))
        return arrange(files, str(path))
    # Only regular files are opened: opening a pipe would wait for its writer.
    start = b""
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            start = file.read(len(_H5_SIGNATURE))
    if start == _H5_SIGNATURE:
        return Source(tuple(replace(one, parts=one.parts[1:]) for one in _from_h5(path, stack)))
    if start and (start.startswith(_ZIP_SIGNATURE) or path.suffix.lower() == ".zip"):
        members = stack.enter_context(zip_files(path))
        return arrange([SourceFile(parts, read) for parts, read in members], str(path))
    raise _refused(path, "is neither a folder nor a .zip nor an .h5 file. Name one of these")


def _is_h5(file: SourceFile) -> bool:
    return file.parts[0].endswith(".h5") and not is_clutter(file.parts[0]) and not file.fault


def _from_h5(path: Path, stack: ExitStack) -> Iterator[SourceFile]:
    for split, row, label, read in stack.enter_context(h5_files(path)):
        known = label in LABELS
        fault = None if known else f"unknown label: {label} is none of {_labels()}"
        parts = (path.name, f"{split}_set_x", str(row))
        yield SourceFile(parts, read, fault, split, label if known else None)


def _place(files: list[SourceFile], depth: int, split: str | None = None) -> Iterator[SourceFile]:
    below: dict[str, list[SourceFile]] = {}
    for file in files:
        if len(file.parts) == depth + 1:
            yield replace(file, split=split or "train", fault=file.fault or _no_label(file))
        else:
            below.setdefault(file.parts[depth], []).append(file)
    labelled = not below.keys().isdisjoint(LABELS)
    for name, inside in below.items():
        named_split = None if split else SPLITS.get(name.lower())
        if name in LABELS:
            yield from (replace(f, split=split or "train", label=name) for f in inside)
        elif labelled and not named_split:
            fault = _unknown(name)
            yield from (replace(f, split=split or "train", fault=fault) for f in inside)
        else:
            yield from _place(inside, depth + 1, split or named_split)


def _no_label(file: SourceFile) -> str:
    folders = [name for name in file.parts[:-1] if name.lower() not in SPLITS]
    return _unknown(folders[0]) if folders else "no label: it is in no label folder"


def _unknown(name: str) -> str:
    return f"{UNKNOWN_FOLDER}: {printable(name)[:80]!r} is none of {_labels()}"


def _labels() -> str:
    return ", ".join(LABELS)


def _walk(folder: Path, parts: tuple[str, ...], above: tuple[Path, ...]) -> Iterator[SourceFile]:
    """Files below `folder`; `above` are the real folders that lead to it, the root first."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(
            f"'{printable(str(folder))}' cannot be read ({error.strerror}). Check its permissions."
        ) from error
    for entry in entries:
        path, inside = Path(entry.path), (*parts, entry.name)
        if entry.is_symlink():
            try:
                path = path.resolve(strict=True)
            except (OSError, RuntimeError):
                yield SourceFile(inside, None, "symbolic link: its target does not exist")
                continue
            if fault := _link_fault(entry, path, above):
                yield SourceFile(inside, None, fault)
                continue
        if path.is_dir():
            yield from _walk(path, inside, (*above, path))
        else:
            yield SourceFile(inside, partial(_read_file, path))


def _link_fault(entry: os.DirEntry[str], target: Path, above: tuple[Path, ...]) -> str | None:
    if target in above:
        return "symbolic link: it leads back to a folder above it"
    if target.is_relative_to(above[0]):
        return None
    own = os.getuid()
    if target.is_dir() and entry.stat(follow_symlinks=False).st_uid == own == target.stat().st_uid:
        return None
    return "symbolic link: it leaves the source"


def _read_file(path: Path, limit: int) -> bytes:
    # O_NONBLOCK: opening a pipe would wait for a writer. O_NOFOLLOW: the file may have been
    # replaced by a link since it was listed.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("not a file: a pipe, socket or device")
            return file.read(limit)
    except OSError as error:
        raise ImageError(f"{UNREADABLE}: {error.strerror}") from error


def _refused(path: Path, fault: str) -> SourceError:
    return SourceError(f"Source '{printable(str(path))}' {fault}.")

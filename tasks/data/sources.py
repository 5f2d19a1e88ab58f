"""List photos in class folders, archives and HDF5 files, which are checked before they are read."""

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.data.images import MAX_PIXELS, Read, encode, printable, read_file
from tasks.errors import ImageError, SourceError
from tasks.params import list_labels
from tasks.project import FOLDERS

if TYPE_CHECKING:
    import h5py

UNKNOWN_FOLDER = "unknown label folder"

SPLITS = {"train": "train", "training": "train", "val": "train", "valid": "train"}
SPLITS |= {"validation": "train", "test": "test", "testing": "test"}
"""Folder names of exporters; their validation photos are trained on, ours are split anew."""

REVIEWED = "review-"  # begins the names of folders with photos that people labelled at `/review`

Folder = tuple[str, ...]  # names of the folders that lead to it, and its own


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, before it is read; `read` is None if it must not be."""

    parts: tuple[str, ...]
    read: Read | None
    fault: str | None = None
    split: str = "train"
    label: str | None = None
    stamp: str = ""  # of a file in the inbox; changes with the file

    @property
    def origin(self) -> str:
        """The path, fit to print."""
        return printable("/".join(self.parts))


@dataclass(frozen=True)
class Source:
    """The files of a source; hidden files and system clutter are only counted."""

    files: tuple[SourceFile, ...]
    ignored: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """Those that its files have, numbers in them by value."""
        return tuple(sorted({file.label for file in self.files if file.label}, key=_by_value))


@contextmanager
def open_source(path: Path, labels: Sequence[str] | None) -> Iterator[Source]:
    """List label folders, a .zip of them, or an .h5 file; without `labels`, by those it has."""
    with ExitStack() as stack:
        try:
            source = _recognize(path, labels, stack)
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or printable(str(error))
            raise _refused(path, f"cannot be read ({fault}). Check path and permissions") from error
        name = path.resolve().name
        files = (replace(file, parts=(name, *file.parts)) for file in source.files)
        yield replace(source, files=tuple(files))


def arrange(files: list[SourceFile], where: str, labels: Sequence[str] | None) -> Source:
    """Find the split and label of each file by the folders above it.

    Folders above those of labels (of a split, a day, an export) are passed through. Beside
    label folders, any other is an unknown label, a split, or photos that people labelled.
    Without `labels` the first folders that are not the only one, nor a split, are taken.
    """
    visible = [file for file in files if not is_clutter(file)]
    if not visible:
        raise SourceError(f"'{printable(where)}' is empty. Name a folder with photos.")
    # Composed as labels are.
    above = [tuple(unicodedata.normalize("NFC", n) for n in file.parts[:-1]) for file in visible]
    folders = {names[:depth] for names in above for depth in range(1, len(names) + 1)}
    known = sorted(_label_folders(folders)) if labels is None else labels
    parents = {folder[:-1] for folder in folders if folder[-1] in known}
    pairs = zip(visible, above, strict=True)
    found = sorted((_place(*pair, known, parents) for pair in pairs), key=lambda f: f.parts)
    if not any(file.label for file in found):
        raise SourceError(
            f"'{printable(where)}' has no folder named {list_labels(known) or 'as a label'}. Name "
            "the folder that holds the label folders, or take its folders' names as labels with "
            "--replace --set-labels."
        )
    return Source(tuple(found), len(files) - len(visible))


def is_clutter(file: SourceFile) -> bool:
    left_behind = ("__MACOSX", "Thumbs.db", "desktop.ini")  # by operating systems
    return any(name.startswith(".") or name in left_behind for name in file.parts)


def folder_files(folder: Path) -> list[SourceFile]:
    """List the files below a folder; links may leave it to folders of this user's own."""
    root = folder.resolve()
    try:
        return list(_walk(root, (), (root,)))
    except OSError as error:
        fault = f"cannot be read ({error.strerror}). Check its permissions"
        raise _refused(Path(error.filename or folder), fault) from error


def _recognize(path: Path, labels: Sequence[str] | None, stack: ExitStack) -> Source:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return arrange(folder_files(path), str(path), labels)
    # Only regular files are opened: opening a pipe would wait for its writer.
    start = b""
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            start = file.read(8)
    if start == b"\x89HDF\r\n\x1a\n":
        return Source(tuple(_h5_rows(path, labels, stack)))
    if start.startswith(b"PK\x03\x04"):
        return arrange(_zip_members(path, stack), str(path), labels)
    raise _refused(path, "is neither a folder nor a .zip nor an .h5 file. Name one of these")


def _place(
    file: SourceFile, folders: Folder, labels: Sequence[str], parents: set[Folder]
) -> SourceFile:
    """Find one file's place; `parents` are the folders that hold label folders."""
    split = None
    for depth, name in enumerate(folders):
        named_split = None if split else SPLITS.get(name.lower())
        # A class may be called like a split: trains, say.
        if name in labels and not (named_split and folders[: depth + 1] in parents):
            return replace(file, split=split or "train", label=name)
        split = split or named_split
        if folders[:depth] in parents and not named_split and not name.startswith(REVIEWED):
            return replace(file, split=split or "train", fault=_unknown(name, labels))
    others = [name for name in folders if name.lower() not in SPLITS]
    fault = _unknown(others[0], labels) if others else "no label: it is in no label folder"
    return replace(file, split=split or "train", fault=file.fault or fault)


def _label_folders(folders: set[Folder], at: Folder = ()) -> set[str]:
    """Names of the folders that photos are sorted into."""
    below = [folder for folder in folders if folder[:-1] == at]
    above = {folder[:-1] for folder in folders}
    splits = [folder for folder in below if folder[-1].lower() in SPLITS and folder in above]
    deeper = splits or (below if len(below) == 1 else [])
    found = {name for folder in deeper for name in _label_folders(folders, folder)}
    return found or {folder[-1] for folder in below}


def _by_value(label: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", label)
    return [(int(part) if part.isdecimal() else 0, part) for part in parts]


def _unknown(name: str, labels: Sequence[str]) -> str:
    return f"{UNKNOWN_FOLDER}: {printable(name)[:80]!r} is none of {list_labels(labels)}"


def _walk(folder: Path, parts: tuple[str, ...], above: tuple[Path, ...]) -> Iterator[SourceFile]:
    """Files below `folder`; `above` are the real folders that lead to it, the root first."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, inside = Path(entry.path), (*parts, entry.name)
        if entry.is_symlink():
            if fault := _link_fault(path, above):
                yield SourceFile(inside, None, f"symbolic link: {fault}")
                continue
            path = path.resolve()
        if path.is_dir():
            yield from _walk(path, inside, (*above, path))
        else:
            yield SourceFile(inside, partial(read_file, path))


def _link_fault(link: Path, above: tuple[Path, ...]) -> str | None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return "its target does not exist"
    if target in above:
        return "it leads back to a folder above it"
    own = target.is_dir() and link.lstat().st_uid == target.stat().st_uid == os.getuid()
    return None if own or target.is_relative_to(above[0]) else "it leaves the source"


def _zip_members(path: Path, stack: ExitStack) -> list[SourceFile]:
    """Files of an archive; nothing is unpacked to disk, so its paths and links lead nowhere."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:  # zipfile raises anything on damaged archives
        raise _refused(path, f"is damaged ({printable(str(error))}). Pack it again") from error
    members = [(member.filename.replace("\\", "/"), member) for member in archive.infolist()]
    return [
        SourceFile(tuple(name.strip("/").split("/")), partial(_read_member, archive, member))
        for name, member in members
        if not name.endswith("/")
    ]


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    try:
        with archive.open(member) as stream:
            return stream.read(limit)
    except Exception as error:  # anything, on damaged members
        raise ImageError(f"damaged in the archive: {printable(str(error))[:120]}") from error


def _h5_rows(path: Path, known: Sequence[str] | None, stack: ExitStack) -> Iterator[SourceFile]:
    """Rows of `train_set_x` and `train_set_y`, or of `test`; what may harm is refused unread."""
    import h5py

    try:
        cache = 64 * 2**20  # of unpacked chunks, which may have many rows
        file = stack.enter_context(h5py.File(path, "r", locking=False, rdcc_nbytes=cache))
        splits = [split for split in FOLDERS if f"{split}_set_x" in file]
        if not splits:
            raise ValueError("has neither train_set_x nor test_set_x")
        limit = max(64 * 2**20, 100 * path.stat().st_size)  # photos compress to about as many bytes
        arrays = [(split, *_h5_arrays(file, split, limit)) for split in splits]
    except Exception as error:  # h5py raises anything on damaged files
        fault = " ".join(printable(str(error)).split())[:160]
        fault = fault if isinstance(error, ValueError) else f"is damaged ({fault})"
        raise _refused(path, f"{fault}. Give the data set's own train.h5 or test.h5") from error
    for split, photos, labels in arrays:
        for row, label in enumerate(map(str, labels)):
            file = SourceFile((f"{split}_set_x", str(row)), partial(_read_row, photos, row))
            if known is None or label in known:
                yield replace(file, split=split, label=label)
            else:
                fault = f"unknown label: {label} is none of {list_labels(known)}"
                yield replace(file, split=split, fault=fault)


def _h5_arrays(file: "h5py.File", split: str, limit: int) -> tuple[Any, list[int]]:
    photos, labels = _h5_array(file, f"{split}_set_x"), _h5_array(file, f"{split}_set_y")
    found = f"{photos.dtype} {photos.shape} photos and {labels.dtype} {labels.shape} labels"
    chunk = np.prod(photos.chunks or (1,), dtype=np.int64)
    if photos.dtype != np.uint8 or photos.ndim != 4 or photos.shape[3] != 3 or not photos.size:
        raise ValueError(f"has {found}, not uint8 (n, height, width, 3) photos")
    count = len(photos)
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (1, count)):
        raise ValueError(f"has {found}, not integer ({count},) labels")
    if photos.size // count > 3 * MAX_PIXELS or max(photos.size, chunk) > limit:
        raise ValueError(f"has too much: {found}")
    return photos, np.asarray(labels[...]).reshape(-1).tolist()


def _h5_array(file: "h5py.File", name: str) -> Any:
    import h5py

    found = file.get(name) if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ValueError(f"has no data set '{name}' of its own")
    return found


def _read_row(photos: Any, row: int, limit: int) -> bytes:
    try:
        return encode(np.ascontiguousarray(photos[row]))[:limit]
    except (OSError, RuntimeError) as error:
        raise ImageError(f"damaged in the HDF5 file: {str(error)[:120]}") from error


def _refused(path: Path, fault: str) -> SourceError:
    return SourceError(f"Source '{printable(str(path))}' {fault}.")

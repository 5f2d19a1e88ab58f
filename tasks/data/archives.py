"""Check zip archives and HDF5 files of photos, and list what they hold.

Sizes, types and links are checked before any content is read.
"""

import io
import stat
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.data.images import MAX_PIXELS, Read, encode, printable
from tasks.errors import ImageError, SourceError
from tasks.project import FOLDERS

if TYPE_CHECKING:
    import h5py

MAX_TOTAL = 8 * 2**30
MAX_RATIO = 100
"""Of an archive, and of its members above `RATIO_FROM` bytes; photos compress to about 1."""
RATIO_FROM = 2**20
MAX_DIRECTORY = 16 * 2**20
"""Bytes of an archive's directory, which must fit in memory: about 150,000 photos."""
MAX_ROWS = 1_000_000

_ENCRYPTED = 0x1
_CACHE = 64 * 2**20  # of unpacked chunks, which may have many rows
_FILTERS = (1, 2, 3, 32000)  # gzip, shuffle, Fletcher-32, LZF: part of h5py, no plug-ins

Row = tuple[str, int, str, Read]
"""Split, row, label and content of one photo."""


class _ZipFile(io.FileIO):
    """Refuses the one long read by which zipfile loads the directory of an archive."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise _refused_zip(Path(str(self.name)), f"has too many members ({size} bytes of them)")
        return super().read(size)


@contextmanager
def zip_files(path: Path) -> Iterator[list[tuple[tuple[str, ...], Read]]]:
    """Open an archive and yield the path and content of each file in it.

    Raises:
        SourceError: it is damaged, a zip bomb, encrypted, or has paths or links that leave it.
    """
    with _ZipFile(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except SourceError:
            raise
        except Exception as error:  # zipfile raises anything on damaged archives
            raise _refused_zip(path, f"is damaged ({printable(str(error))})") from error
        with archive:
            members = archive.infolist()
            _check_sizes(path, members)
            parts = [_safe_path(path, member) for member in members]
            yield [
                (inside, partial(_read_member, archive, member))
                for inside, member in zip(parts, members, strict=True)
                if not member.orig_filename.endswith(("/", "\\"))
            ]


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


def _safe_path(path: Path, member: zipfile.ZipInfo) -> tuple[str, ...]:
    # Windows tools write backslashes, which must not hide a parent folder.
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
        # With other methods the archive chooses how much memory unpacking takes.
        raise _refused_zip(path, f"has a member that is neither stored nor deflated ('{shown}')")
    return parts


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    try:
        with archive.open(member) as stream:
            return stream.read(limit)
    except Exception as error:  # zipfile and zlib raise anything on damaged members
        raise ImageError(f"damaged in the archive: {printable(str(error))[:120]}") from error


def _refused_zip(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"Archive '{printable(str(path))}' {fault}. Nothing was imported; pack the label "
        "folders again, or import them unpacked."
    )


@contextmanager
def h5_files(path: Path) -> Iterator[list[Row]]:
    """Open an HDF5 file with `train_set_x` and `train_set_y`, or the same of `test`, or both.

    Photos are uint8 (n, height, width, 3), labels integers (n,) or (1, n).

    Raises:
        SourceError: it is damaged, or its arrays have other types, huge shapes, filters
            that need plug-ins, or links.
    """
    import h5py

    with ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(path, "r", locking=False, rdcc_nbytes=_CACHE))
            for name in file:
                if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"has a link that may lead out of it ('{name}')")
            splits = [split for split in FOLDERS if f"{split}_set_x" in file]
            if not splits:
                raise ValueError("has neither train_set_x nor test_set_x")
            limit = min(MAX_TOTAL, max(64 * RATIO_FROM, MAX_RATIO * path.stat().st_size))
            rows = [row for split in splits for row in _rows(file, split, limit)]
        except ValueError as error:
            raise _refused_h5(path, str(error)) from error
        except Exception as error:  # h5py raises anything on damaged files
            raise _refused_h5(path, f"is damaged ({str(error)[:160]})") from error
        yield rows


def _rows(file: "h5py.File", split: str, limit: int) -> Iterator[Row]:
    photos, labels = _dataset(file, f"{split}_set_x"), _dataset(file, f"{split}_set_y")
    _check_photos(photos, limit)
    _check_labels(labels, len(photos))

    def read(row: int, limit: int) -> bytes:
        try:
            return encode(np.ascontiguousarray(photos[row]))[:limit]
        except (OSError, RuntimeError) as error:
            raise ImageError(f"damaged in the HDF5 file: {str(error)[:120]}") from error

    for row, label in enumerate(np.asarray(labels[...]).reshape(-1).tolist()):
        yield split, row, str(label), partial(read, row)


def _check_photos(photos: Any, limit: int) -> None:
    if photos.dtype != np.uint8:
        raise ValueError(f"holds {photos.dtype} photos, not uint8 ('{photos.name}')")
    if photos.ndim != 4 or photos.shape[3] != 3 or 0 in photos.shape:
        raise ValueError(
            f"holds photos of shape {photos.shape}, not (n, height, width, 3) ('{photos.name}')"
        )
    count, height, width, _ = photos.shape
    chunk = np.prod(photos.chunks or (1,), dtype=np.int64)
    if count > MAX_ROWS or height * width > MAX_PIXELS or max(photos.size, chunk) > limit:
        raise ValueError(f"holds too much: {photos.shape} ('{photos.name}')")


def _check_labels(labels: Any, count: int) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"holds {labels.dtype} labels, not integers ('{labels.name}')")
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[0] != 1):
        raise ValueError(f"holds labels of shape {labels.shape}, not (n,) ('{labels.name}')")
    if labels.size != count:
        raise ValueError(f"has {count} photos but {labels.size} labels ('{labels.name}')")


def _dataset(file: "h5py.File", name: str) -> Any:
    import h5py

    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"has no data set '{name}'")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"keeps '{name}' in another file")
    plan = dataset.id.get_create_plist()
    if any(plan.get_filter(n)[0] not in _FILTERS for n in range(plan.get_nfilters())):
        raise ValueError(f"stores '{name}' with a filter that is not part of h5py")
    return dataset


def _refused_h5(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"HDF5 file '{printable(str(path))}' {printable(' '.join(fault.split()))}. Nothing was "
        "imported; give the data set's own train.h5 or test.h5."
    )

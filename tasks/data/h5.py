"""Read the Kaggle pair `train.h5` and `test.h5`.

The HDF5 library parses a file's every structure in C, so a crafted file may crash,
hang or exhaust the process that opens it. That process is a child with limits
(`python -m tasks.data.h5 FILE FOLDER`), which leaves plain arrays behind.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.folders import Item
from tasks.data.images import MAX_PIXELS, encode, printable
from tasks.errors import DataError, SourceError
from tasks.params import LABELS
from tasks.project import FOLDERS
from tasks.stage import REFUSED, confine, refuse, run_confined

if TYPE_CHECKING:
    import h5py

MAX_TOTAL = 8 * 2**30
MAX_PHOTOS = 1_000_000
MAX_RATIO = 100
"""Of a file above `RATIO_FROM` bytes of photos; one may state rows that it does not hold."""

RATIO_FROM = 64 * 2**20
MEMORY = 4 * 2**30
SECONDS = 300
_ROWS = 64
_UNWRITABLE = 4


def h5_items(path: Path, folder: Path) -> list[Item]:
    """Read a file's photos and labels.

    Args:
        path: has `train_set_x` and `train_set_y`, or `test_set_x` and `test_set_y`, or
            all four: photos uint8 (n, height, width, 3), labels integers (n,) or (1, n).
        folder: an empty folder for the unpacked arrays; they are mapped, not loaded.

    Returns:
        One item for each photo.

    Raises:
        SourceError: the file is refused as a whole.
    """
    _unpack(path, folder)
    items = []
    for split in FOLDERS:
        if not (folder / f"{split}_y.npy").exists():
            continue
        photos = np.load(folder / f"{split}_x.npy", mmap_mode="r")
        labels = np.load(folder / f"{split}_y.npy")
        for row, label in enumerate(labels.tolist()):
            known = str(label) in LABELS
            items.append(
                Item(
                    f"{split}_set_x/{row}",
                    split,
                    str(label) if known else None,
                    partial(_photo, photos, row),
                    None if known else f"label outside 0 to 5: {label}",
                )
            )
    return items


def _photo(photos: NDArray[np.uint8], row: int, limit: int) -> bytes:
    return encode(np.ascontiguousarray(photos[row]))[:limit]


def _unpack(path: Path, folder: Path) -> None:
    try:
        child = run_confined("tasks.data.h5", [str(path.resolve()), str(folder)], SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _refused(path, f"takes more than {SECONDS} seconds to read") from error
    told = " ".join(child.stderr.decode(errors="replace").split())
    if child.returncode == _UNWRITABLE:
        raise DataError(
            f"Arrays cannot be unpacked ({told}). Received: '{folder}'. Make room and repeat."
        )
    if child.returncode == REFUSED:
        raise _refused(path, told)
    if child.returncode:
        raise _refused(path, f"is damaged (its reader ended with {child.returncode})")


def _refused(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"HDF5 file {printable(fault)}. Received: '{printable(str(path))}'. "
        "Nothing was taken; give the data set's own train.h5 or test.h5."
    )


class _UnwritableError(Exception):
    """The child cannot leave its arrays; becomes a `DataError` in the parent."""


class _RefusedError(Exception):
    """Why the child refuses the file; becomes a `SourceError` in the parent."""


def _main(path: str, folder: Path) -> None:
    confine(MEMORY, SECONDS, 2 * MAX_TOTAL)
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_links(file)
            splits = [split for split in FOLDERS if f"{split}_set_x" in file]
            if not splits:
                raise _RefusedError("has neither train_set_x nor test_set_x")
            for split in splits:
                _copy(file, split, folder, max(RATIO_FROM, MAX_RATIO * Path(path).stat().st_size))
    except _RefusedError as error:
        refuse(str(error))
    except _UnwritableError as error:
        print(error, file=sys.stderr)
        sys.exit(_UNWRITABLE)
    except Exception as error:  # a damaged file raises anything
        refuse(f"is damaged ({' '.join(str(error).split())[:160]})")


def _check_links(file: "h5py.File") -> None:
    import h5py

    for name in file:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise _RefusedError(f"has a link that may lead out of it ('{name}')")


def _copy(file: "h5py.File", split: str, folder: Path, limit: int) -> None:
    photos = _dataset(file, f"{split}_set_x")
    labels = _dataset(file, f"{split}_set_y")
    _check_photos(photos, min(limit, MAX_TOTAL))
    _check_labels(labels)
    if labels.size != len(photos):
        raise _RefusedError(f"has {len(photos)} photos but {labels.size} labels ('{labels.name}')")
    header = {"descr": "|u1", "fortran_order": False, "shape": photos.shape}
    # Written, not mapped: on a full disk a write fails, but a mapped page kills.
    with _writing(), (folder / f"{split}_x.npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
    for start in range(0, len(photos), _ROWS):
        rows = np.ascontiguousarray(photos[start : start + _ROWS])
        with _writing(), (folder / f"{split}_x.npy").open("ab") as out:
            out.write(rows.data)
    with _writing():
        np.save(folder / f"{split}_y.npy", np.asarray(labels[...]).reshape(-1).astype(np.int64))


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnwritableError(str(error.strerror)) from error


def _dataset(file: "h5py.File", name: str) -> Any:
    import h5py

    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise _RefusedError(f"has no data set '{name}'")
    if dataset.external or dataset.is_virtual:
        raise _RefusedError(f"keeps '{name}' in another file")
    return dataset


def _check_photos(photos: Any, limit: int) -> None:
    if photos.dtype != np.uint8:
        raise _RefusedError(f"holds {photos.dtype} photos, not uint8 ('{photos.name}')")
    if photos.ndim != 4 or photos.shape[3] != 3 or 0 in photos.shape:
        raise _RefusedError(
            f"holds photos of shape {photos.shape}, not (n, height, width, 3) ('{photos.name}')"
        )
    count, height, width, _ = photos.shape
    if count > MAX_PHOTOS or height * width > MAX_PIXELS or photos.size > limit:
        raise _RefusedError(f"holds too much: {photos.shape} ('{photos.name}')")


def _check_labels(labels: Any) -> None:
    if labels.dtype.kind not in "iu":
        raise _RefusedError(f"holds {labels.dtype} labels, not integers ('{labels.name}')")
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[0] != 1):
        raise _RefusedError(f"holds labels of shape {labels.shape}, not (n,) ('{labels.name}')")


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))

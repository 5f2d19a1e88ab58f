"""The numbers of an HDF5 file that nobody vouches for, looked at before they are read.

Runs in the limited child of `tasks.network.foreign` only.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import h5py

MAX_WEIGHTS = 64 << 20
"""Bytes; those of EfficientNetB0 are 16 million, in three copies at most while training."""

MAX_ARRAYS = 2_000
MAX_DEPTH = 12
_NAMES = re.compile(r"(layer|weight)_names\d{0,3}")
_LONGEST_NAME = 256


class RefusedError(Exception):
    """Why the child refuses the file; becomes a `ModelError` in the parent."""


def copy_arrays(source: "h5py.File", target: "h5py.File") -> None:
    """Copy all arrays under their names, and the names that Keras finds them by.

    Raises:
        RefusedError: there is something else in it, or too much.
    """
    _copy_group(source, target, 0, [0, 0])


def _copy_group(source: "h5py.Group", target: "h5py.Group", depth: int, total: list[int]) -> None:
    """Copy arrays, checking each before it is read.

    Args:
        source: group of the file.
        target: the same group of the copy.
        depth: how far down it lies.
        total: number of arrays and bytes so far.
    """
    import h5py

    if depth > MAX_DEPTH:
        raise RefusedError("nests its arrays too deep")
    _copy_names(source, target)
    for name in source:
        if not isinstance(source.get(name, getlink=True), h5py.HardLink):
            raise RefusedError(f"has a link that may lead out of it ('{name[:60]}')")
        found = source[name]
        total[0] += 1
        if total[0] > MAX_ARRAYS:
            raise RefusedError(f"holds more than {MAX_ARRAYS} arrays")
        if isinstance(found, h5py.Dataset):
            target[name] = _array(found, total)
        else:
            _copy_group(found, target.create_group(name), depth + 1, total)


def _copy_names(source: "h5py.Group", target: "h5py.Group") -> None:
    """Copy the attributes by which Keras's older form finds its arrays, and no other."""
    for name in filter(_NAMES.fullmatch, source.attrs):
        found = source.attrs.get_id(name)
        if len(found.shape) != 1 or found.shape[0] > MAX_ARRAYS:
            raise RefusedError(f"names more than {MAX_ARRAYS} arrays")
        # An empty list has the type of numbers.
        text = found.dtype.kind in "SO" and found.dtype.itemsize <= _LONGEST_NAME
        if found.shape[0] and not text:
            raise RefusedError(f"names its arrays with {found.dtype}")
        names = [
            str(word, "utf-8") if isinstance(word, bytes) else word for word in source.attrs[name]
        ]
        if any(len(word) > _LONGEST_NAME or ".." in word for word in names):
            raise RefusedError("names its arrays in a way that Keras does not")
        target.attrs[name] = np.array([word.encode() for word in names], "S")


def _array(dataset: "h5py.Dataset", total: list[int]) -> Any:
    """One array, whose type and size are looked at before memory is taken for it."""
    if dataset.external or dataset.is_virtual:
        raise RefusedError(f"keeps '{dataset.name[:60]}' in another file")
    if dataset.dtype.kind not in "fiu":
        raise RefusedError(f"holds {dataset.dtype}, not numbers ('{dataset.name[:60]}')")
    total[1] += dataset.size * dataset.dtype.itemsize
    if total[1] > MAX_WEIGHTS:
        raise RefusedError(f"holds too much: {dataset.shape} ('{dataset.name[:60]}')")
    values = dataset[()]
    if not np.isfinite(values).all():
        raise RefusedError(f"holds numbers that are not finite ('{dataset.name[:60]}')")
    return values

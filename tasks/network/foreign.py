"""Model files that nobody vouches for.

A file of no verified release may crash, hang or exhaust whatever parses it, or name layers
that run code. So a child with limits reads it first (`python -m tasks.network.foreign FILE COPY
SIZE`) and leaves what is safe to load: of a `.keras` or `.h5` file its numbers alone,
rewritten; of a `.pb` file a copy that was run once. The file's own description of layers
is only looked at, to refuse what ours could not stand for.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from tasks.confined import REFUSED, confine, refuse, run_confined
from tasks.errors import ModelError
from tasks.network.foreign_arrays import MAX_WEIGHTS, RefusedError, copy_arrays

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
            child = run_confined("tasks.network.foreign", asked, SECONDS)
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
    from tasks.network.engine import Engine

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

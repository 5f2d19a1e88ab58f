"""Stage: compute the frozen trunk's activations once for each photo and augmented copy.

Only what is missing is computed, here or on a cluster. `features.npy` is float16 (rows, h, w,
192); `index.json` names rows and what they depend on. Mode `end_to_end` needs no rows.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import INDEX, SYNTHETIC, Dataset, open_dataset
from tasks.errors import DataError, ModelError
from tasks.io import atomic_directory, read_json, sha256, write_json
from tasks.model.augment import augment
from tasks.model.files import TRUNK_FILE
from tasks.model.inference import Engine
from tasks.params import BACKBONE, INPUT_SIZE, AugmentationParams, Params
from tasks.stage import Context
from tasks.training.plan import training_rows

ROWS = "features.npy"
DTYPE = np.dtype("<f2")
SHARD_ROWS = 512  # two seconds of work on two cores, 10 MB of results
CODE = ("features.py", "model/augment.py", "model/inference.py")

Row = NDArray[np.float16]
CacheKey = dict[str, Any]  # everything besides photo and copy that a row depends on; JSON

_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What a row was computed from: a photo's name, the copy's number, and the pixels' digest."""

    name: str
    copy: int
    pixels: str


@dataclass(frozen=True, eq=False)
class Features:
    """Rows of a store, which are read from disk as they are used."""

    keys: list[Key]
    rows: NDArray[Any]
    cache_key: CacheKey

    @cached_property
    def numbers(self) -> dict[tuple[str, int], int]:
        """Row of each photo's name and copy; copy 0 is the photo itself."""
        return {(key.name, key.copy): number for number, key in enumerate(self.keys)}

    def batch(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(self.rows[rows], np.float32)


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows to compute, and the photo of each; uint8, (n, d, d, 3), RGB."""

    keys: Sequence[Key]
    pictures: NDArray[np.uint8]
    seed: int
    augmentation: AugmentationParams


Runner = Callable[[Iterable[Shard], Path], Iterator[tuple[Key, Row]]]
"""Computes shards with the trunk in a file; yields the rows in order."""


def run_here(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
    trunk = Engine(graph)
    for shard in shards:
        yield from zip(shard.keys, compute(shard, trunk), strict=True)


runner: ContextVar[Runner] = ContextVar("runner", default=run_here)
"""What computes the shards; the flow sets it."""


def run(
    context: Context,
    item: str | None = None,
    size: int = INPUT_SIZE,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Bring the stored activations up to date, and report in `.local/features.json` on it.

    Every `shard_rows` that are computed are saved, so that a run that is killed resumes.
    """
    project, params = context.project, context.params
    trunk = project.weights(BACKBONE) / TRUNK_FILE
    dataset = open_dataset(project.dataset)
    cached = params.training.mode == "cached"
    wanted = dict(sorted(_wanted_rows(dataset, params))) if cached else {}
    cache_key, shape = _cache_key(params, trunk), (size // 32, size // 32, 192)
    stored, partial = _open_if_valid(project.features, cache_key), project.features_partial
    rows: dict[Key, Row] = {}
    for part in (stored, *(_open_if_valid(one, cache_key) for one in partial.glob("*"))):
        if part:
            rows |= zip(part.keys, part.rows, strict=True)
    missing = [key for key in wanted if key not in rows]
    speed = 0.0
    if missing:
        _log.info("Features: %d of %d rows to compute.", len(missing), len(wanted))
        parts = [missing[at : at + shard_rows] for at in range(0, len(missing), shard_rows)]
        pictures = (dataset.images[[wanted[key] for key in keys]] for keys in parts)
        recipe = params.seed, params.augmentation
        shards = (Shard(*one, *recipe) for one in zip(parts, pictures, strict=True))
        made, start, chunk = runner.get()(shards, trunk), time.perf_counter(), []
        for done, row in enumerate(made, start=1):
            chunk.append(row)
            if len(chunk) == shard_rows or done == len(missing):
                folder = partial / f"{len(list(partial.glob('*'))):06d}"
                _write(folder, cache_key, shape, chunk)
                saved = open_features(folder)
                rows |= zip(saved.keys, saved.rows, strict=True)
                chunk = []
            context.progress("features", done, len(missing))
        speed = len(missing) / (time.perf_counter() - start)
    if missing or stored is None or stored.keys != list(wanted):
        _write(project.features, cache_key, shape, [(key, rows[key]) for key in wanted])
    shutil.rmtree(partial, ignore_errors=True)
    report = {
        "computed": len(missing),
        "reused": len(wanted) - len(missing),
        "images_per_second": speed,
        "views": params.features.augmented_copies,
    }
    write_json(project.features_report, report)


def _wanted_rows(dataset: Dataset, params: Params) -> Iterator[tuple[Key, int]]:
    """Every row that a phase reads, and the dataset row of its photo."""
    largest = max(phase.data_fraction for phase in params.phases.values())
    train = training_rows(dataset, largest, params.seed)
    copies = params.features.augmented_copies
    for photos, last in ((train, copies), (dataset.rows("val"), 0)):
        for photo in photos:
            pixels = hashlib.blake2b(dataset.images[photo].tobytes(), digest_size=16).hexdigest()
            own = 0 if dataset.splits[photo] == SYNTHETIC else last
            for copy in range(own + 1):
                yield Key(dataset.names[photo], copy, pixels), int(photo)


def _cache_key(params: Params, trunk: Path) -> CacheKey:
    """Other versions of the libraries may round differently."""
    import openvino

    return {
        "augmentation": params.augmentation.model_dump(),
        "code": {name: sha256(Path(__file__).parent / name) for name in CODE},
        "engine": openvino.__version__,
        "opencv": cv2.__version__,
        "seed": params.seed,
        "trunk": sha256(trunk),
    }


def open_features(folder: Path) -> Features:
    """Open a store; DataError if it is missing or damaged."""
    try:
        index = read_json(folder / INDEX)
        keys = [Key(*key) for key in index["keys"]]
        if sha256(folder / ROWS) != index["sha256"]:
            raise ValueError(f"{ROWS} and {INDEX} do not match")
        rows = np.load(folder / ROWS, mmap_mode="r" if keys else None)
        return Features(keys, rows, index["cache_key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The features in '{folder}' cannot be opened ({error}). Run the features stage again."
        ) from error


def _open_if_valid(folder: Path, cache_key: CacheKey) -> Features | None:
    with suppress(DataError):
        if (features := open_features(folder)).cache_key == cache_key:
            return features
    return None


def _write(
    folder: Path, cache_key: CacheKey, shape: tuple[int, ...], rows: Sequence[tuple[Key, Row]]
) -> None:
    """Write a store atomically; `shape` is that of a row."""
    with atomic_directory(folder) as new:
        # Not a memory map: a full disk would end the process instead of raising OSError.
        with (new / ROWS).open("wb") as file:
            header = {"descr": DTYPE.str, "fortran_order": False, "shape": (len(rows), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(row.tobytes() for _, row in rows)
        index = {"cache_key": cache_key, "keys": [key for key, _ in rows]}
        write_json(new / INDEX, index | {"sha256": sha256(new / ROWS)})


def compute(shard: Shard, trunk: Engine) -> Iterator[Row]:
    """Yield the activations of a shard's rows, float16 (h, w, 192), in order."""
    copies = (
        augment(picture, key.name, key.copy, shard.seed, shard.augmentation, trunk.size)
        for key, picture in zip(shard.keys, shard.pictures, strict=True)
    )
    cv2.setNumThreads(1)  # the cores are busy with the trunk
    for activations in trunk.stream(copies):
        with np.errstate(over="ignore"):
            row: Row = activations.astype(DTYPE)
        if not np.isfinite(row).all():
            raise ModelError(
                f"The trunk's activations, up to {np.abs(activations).max()}, do not fit "
                "float16. Remove artifacts/weights/backbone and run its stage again."
            )
        yield row


def compute_anywhere(shard: Shard, graph: bytes) -> NDArray[np.float16]:
    """Compute a shard without a checkout, with the trunk's file content; float16."""
    return np.stack(list(compute(shard, _cached_trunk(graph))))


@lru_cache(maxsize=1)
def _cached_trunk(graph: bytes) -> Engine:
    with TemporaryDirectory() as folder:
        path = Path(folder) / TRUNK_FILE
        path.write_bytes(graph)
        return Engine(path)

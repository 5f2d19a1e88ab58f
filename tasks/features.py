"""Stage: compute the frozen trunk's activations once for each photo and augmented copy.

Only what is missing is computed, and what is written does not depend on what was cached. With
`training.mode: end_to_end` the store is empty.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2

from tasks.data.dataset import SYNTHETIC, Dataset, open_dataset
from tasks.errors import BackboneError, DataError
from tasks.io import sha256, write_json
from tasks.model.activations import (
    SHARD_ROWS,
    CacheKey,
    Features,
    Key,
    Row,
    cut,
    open_features,
    runner,
    write_features,
)
from tasks.model.augment import INPUT_SIZE
from tasks.model.files import TRUNK_FILE
from tasks.params import BACKBONE, Params
from tasks.stage import Context, stage_main
from tasks.training.plan import training_rows

CODE = ("activations.py", "augment.py", "inference.py")
_log = logging.getLogger(__name__)


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/features/`, and a report to `.local/features.json`."""
    write_json(context.project.features_report, extract(context))


def extract(
    context: Context, size: int = INPUT_SIZE, shard_rows: int = SHARD_ROWS
) -> dict[str, Any]:
    """Bring the stored activations up to date; rows computed and reused, and the speed.

    Every `shard_rows` that are computed are saved, so that a run that is killed resumes.
    """
    project, params = context.project, context.params
    trunk = project.weights(BACKBONE) / TRUNK_FILE
    if not trunk.is_file():
        raise BackboneError(f"The trunk '{trunk}' does not exist. Run the backbone stage first.")
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
        pictures = ((key, dataset.images[wanted[key]]) for key in missing)
        shards = cut(pictures, params.seed, params.augmentation, shard_rows)
        made, start, chunk = runner.get()(shards, trunk), time.perf_counter(), []
        for done, row in enumerate(made, start=1):
            chunk.append(row)
            if len(chunk) == shard_rows or done == len(missing):
                folder = partial / f"{len(list(partial.glob('*'))):06d}"
                write_features(folder, cache_key, shape, chunk)
                saved = open_features(folder)
                rows |= zip(saved.keys, saved.rows, strict=True)
                chunk = []
            context.progress("features", done, len(missing))
        speed = len(missing) / (time.perf_counter() - start)
    if missing or stored is None or stored.keys != list(wanted):
        write_features(project.features, cache_key, shape, [(key, rows[key]) for key in wanted])
    shutil.rmtree(partial, ignore_errors=True)
    return {
        "computed": len(missing),
        "reused": len(wanted) - len(missing),
        "images_per_second": speed,
        "views": params.features.augmented_copies,
    }


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
        "code": {name: sha256(Path(__file__).parent / "model" / name) for name in CODE},
        "engine": openvino.__version__,
        "opencv": cv2.__version__,
        "seed": params.seed,
        "trunk": sha256(trunk),
    }


def _open_if_valid(folder: Path, cache_key: CacheKey) -> Features | None:
    with suppress(DataError):
        if (features := open_features(folder)).cache_key == cache_key:
            return features
    return None


if __name__ == "__main__":
    stage_main(run)

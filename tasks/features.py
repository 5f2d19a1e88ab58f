"""Stage: compute the frozen trunk's activations once for each photo and augmented copy.

A row is cached under its photo, copy and everything else that it depends on; the next run
computes only what is missing or damaged. What is written depends on photos and parameters
alone, not on what was cached. With `training.mode: end_to_end` the store is empty.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from tasks.data.dataset import SYNTHETIC, Dataset, open_dataset
from tasks.errors import BackboneError, DataError
from tasks.io import sha256, write_json
from tasks.model.augment import INPUT_SIZE
from tasks.model.feature_store import (
    DTYPE,
    CacheKey,
    Features,
    Key,
    PartialFeatures,
    Row,
    check_space,
    digest,
    feature_shape,
    open_features,
    write_features,
)
from tasks.model.inference import engine_version
from tasks.model.shards import SHARD_ROWS, Runner, cut, runner
from tasks.model.weights import TRUNK_FILE
from tasks.params import BACKBONE, Params
from tasks.scoring.photo_sheets import draw_augmentation
from tasks.stage import Context, stage_main
from tasks.training.plan import training_rows

_CODE = ("model/augment.py", "model/inference.py", "model/shards.py")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureReport:
    """Rows computed and reused, rows per second, and augmented copies of each photo."""

    computed: int
    reused: int
    images_per_second: float
    views: int


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/features/`, `plots/views.png`, and a report to `.local/features.json`."""
    project, params = context.project, context.params
    try:
        report = extract(context)
        copies = params.features.augmented_copies if params.training.mode == "cached" else 0
        dataset = open_dataset(project.dataset)
        path = project.plots / "views.png"
        draw_augmentation(path, dataset, copies, params.seed, params.augmentation)
    except OSError as error:
        raise DataError(
            f"The features cannot be written to '{project.features}' ({error.strerror}). Make "
            "room, or correct its permissions, and run again: what was computed is kept."
        ) from error
    write_json(project.features_report, asdict(report))


def extract(
    context: Context,
    size: int = INPUT_SIZE,
    run_shards: Runner | None = None,
    shard_rows: int = SHARD_ROWS,
) -> FeatureReport:
    """Bring the cached activations up to date.

    Args:
        size: side of the trunk's input in pixels.
        run_shards: computes the missing rows; `tasks.model.shards.runner` by default.
        shard_rows: rows that are computed and saved together.
    """
    project, params = context.project, context.params
    dataset = open_dataset(project.dataset)
    cached = params.training.mode == "cached"
    wanted = dict(sorted(_wanted_rows(dataset, params))) if cached else {}
    cache_key, shape = _cache_key(context, size), feature_shape(size)
    stored = _stored(project.features, cache_key)
    partial = PartialFeatures(project.features_partial, cache_key)

    def find(key: Key) -> Row | None:
        row = stored.get(key) if stored else None
        return partial.get(key) if row is None else row

    missing = [key for key in wanted if find(key) is None]
    speed = 0.0
    if missing:
        row_bytes = int(np.prod(shape)) * DTYPE.itemsize
        # Missing rows lie in the partial files until the store is written.
        needed = (len(wanted) + len(missing)) * row_bytes
        check_space(project.artifacts, needed)
        _log.info(
            "Features: %d of %d rows to compute; %.1f MB on disk, %.1f MB while they are written.",
            len(missing),
            len(wanted),
            len(wanted) * row_bytes / 1e6,
            needed / 1e6,
        )
        pictures = ((key, dataset.images[wanted[key]]) for key in missing)
        shards = cut(pictures, params.seed, params.augmentation, size, shard_rows)
        rows = (run_shards or runner.get())(shards, _trunk(context))
        speed = _compute(context, rows, len(missing), partial, shard_rows)
    if missing or stored is None or stored.keys != list(wanted):
        rows = ((key, _require(find(key), key)) for key in wanted)
        write_features(project.features, cache_key, shape, rows, len(wanted))
    partial.remove()
    copies = params.features.augmented_copies
    return FeatureReport(len(missing), len(wanted) - len(missing), speed, copies)


def _wanted_rows(dataset: Dataset, params: Params) -> Iterator[tuple[Key, int]]:
    """Every row that a phase reads, and the dataset row of its photo.

    Test photos are scored by the assembled model and need no row.
    """
    largest = max(phase.data_fraction for phase in params.phases.values())
    train = training_rows(dataset, largest, params.seed)
    copies = params.features.augmented_copies
    for photos, last in ((train, copies), (dataset.rows("val"), 0)):
        for photo in photos:
            pixels = digest(dataset.images[photo].tobytes())
            own = 0 if dataset.splits[photo] == SYNTHETIC else last
            for copy in range(own + 1):
                yield Key(dataset.names[photo], copy, pixels), int(photo)


def _cache_key(context: Context, size: int) -> CacheKey:
    params, trunk = context.params, _trunk(context)
    if not trunk.is_file():
        raise BackboneError(f"The trunk '{trunk}' does not exist. Run the backbone stage first.")
    return {
        "augmentation": params.augmentation.model_dump(),
        "code": {name: sha256(Path(__file__).parent / name) for name in _CODE},
        "engine": engine_version(),
        "opencv": cv2.__version__,
        "seed": params.seed,
        "size": size,
        "trunk": sha256(trunk),
    }


def _trunk(context: Context) -> Path:
    return context.project.weights(BACKBONE) / TRUNK_FILE


def _stored(folder: Path, cache_key: CacheKey) -> Features | None:
    try:
        features = open_features(folder)
    except DataError:
        return None
    return features if features.cache_key == cache_key else None


def _compute(
    context: Context,
    rows: Iterator[tuple[Key, Row]],
    count: int,
    partial: PartialFeatures,
    shard_rows: int,
) -> float:
    """Save rows as they are computed; return rows per second."""
    start = time.perf_counter()

    def counted() -> Iterator[tuple[Key, Row]]:
        for done, row in enumerate(rows, start=1):
            yield row
            context.progress("features", done, count)

    computed = counted()
    while chunk := list(islice(computed, shard_rows)):
        keys, values = zip(*chunk, strict=True)
        partial.add(keys, np.stack(values))
    return count / (time.perf_counter() - start)


def _require(row: Row | None, key: Key) -> Row:
    if row is None:
        raise DataError(
            f"Copy {key.copy} of '{key.name}' was damaged while the features were written. Check "
            "the disk, and run the features stage again."
        )
    return row


if __name__ == "__main__":
    stage_main(run)

"""Stage: the frozen trunk's activations, computed once for each photo and view.

Everything below the cut is the same function in all phases and epochs, so what it
gives is stored under the photo, the view and the recipe it was made by. The next
run computes only what is not there, or damaged. What is written depends on the
photos and the parameters alone, not on what was there before. `training.mode:
end_to_end` reads no features; the store is empty then.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2

from tasks.data.dataset import SYNTHETIC, Dataset, open_dataset
from tasks.errors import BackboneError, DataError
from tasks.io import write_json
from tasks.model.augment import INPUT_SIZE
from tasks.model.feature_store import (
    Journal,
    Key,
    Recipe,
    Row,
    StoredRows,
    check_space,
    digest,
    open_rows,
    row_bytes,
    write_rows,
)
from tasks.model.inference import engine_version
from tasks.model.shards import Runner, cut, runner
from tasks.model.weights import TRUNK_FILE
from tasks.params import BACKBONE, Params
from tasks.project import Project
from tasks.scoring.plots import draw_views
from tasks.stage import Context, stage_main
from tasks.training.plan import training_rows

CHANNELS = 192
STRIDE = 32
"""Pixels of the input to one place of the trunk's output."""

_CODE = ("model/augment.py", "model/inference.py", "model/shards.py")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureReport:
    """What one run of the stage did.

    Args:
        computed: rows computed in this run.
        reused: rows taken from an earlier one.
        images_per_second: rows computed a second, views included; 0 if none.
        views: augmented views of each training photo.
    """

    computed: int
    reused: int
    images_per_second: float
    views: int


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/features/` and `plots/views.png`; how it went to `.local/features.json`."""
    try:
        report = extract(context)
        _draw(context)
    except OSError as error:
        raise DataError(
            f"The features cannot be written ({error.strerror}). Received: "
            f"'{context.project.features}'. Make room, or mend its permissions, and run again: "
            "what was computed is kept."
        ) from error
    write_json(context.project.features_report, asdict(report))


def extract(
    context: Context,
    size: int = INPUT_SIZE,
    run_shards: Runner | None = None,
) -> FeatureReport:
    """Bring the stored activations up to date.

    Args:
        context: where, and with which parameters.
        size: side of the trunk's input in pixels.
        run_shards: computes the rows that are missing; None for `tasks.model.shards.runner`.

    Returns:
        What was computed and what was there.

    Raises:
        BackboneError: the backbone stage has not run.
        DataError: there are no preprocessed photos, or too little disk.
    """
    project, views = context.project, context.params.features.augmented_copies
    dataset = open_dataset(project.dataset)
    cached = context.params.training.mode == "cached"
    wanted = dict(sorted(_wanted(dataset, context.params))) if cached else {}
    recipe = _recipe(context, size)
    shape = (size // STRIDE, size // STRIDE, CHANNELS)
    stored = _stored(project.features, recipe, shape)
    with Journal(project.features_journal, recipe, shape) as journal:
        sources = [rows for rows in (stored, journal.rows) if rows is not None]
        missing = [key for key in wanted if _find(sources, key) is None]
        speed = 0.0
        if missing:
            _announce(project.artifacts, len(wanted), len(missing), row_bytes(shape))
            pictures = ((key, dataset.images[wanted[key]]) for key in missing)
            shards = cut(pictures, context.params.seed, context.params.augmentation, size)
            rows = (run_shards or runner.get())(shards, _trunk(project))
            speed = _keep(context, rows, len(missing), journal)
        if missing or stored is None or not stored.intact or list(stored.places) != list(wanted):
            found = ((key, _found(sources, key)) for key in wanted)
            write_rows(project.features, recipe, shape, found, len(wanted))
        journal.drop()
    return FeatureReport(len(missing), len(wanted) - len(missing), speed, views)


def _wanted(dataset: Dataset, params: Params) -> Iterator[tuple[Key, int]]:
    """Name every row that a phase reads, and the photo it is of.

    Test photos are scored through the assembled model and need no row.
    """
    largest = max(phase.data_fraction for phase in params.phases.values())
    train = training_rows(dataset, largest, params.seed)
    for photos, views in ((train, params.features.augmented_copies), (dataset.rows("val"), 0)):
        for photo in photos:
            numbers = range(1 if dataset.splits[photo] == SYNTHETIC else views + 1)
            pixels = digest(dataset.images[photo].tobytes())
            for number in numbers:
                yield Key(dataset.names[photo], number, pixels), int(photo)


def _draw(context: Context) -> None:
    params = context.params
    views = params.features.augmented_copies if params.training.mode == "cached" else 0
    dataset, path = open_dataset(context.project.dataset), context.project.plots / "views.png"
    draw_views(path, dataset, views, params.seed, params.augmentation)


def _recipe(context: Context, size: int) -> Recipe:
    params = context.params
    return {
        "augmentation": params.augmentation.model_dump(),
        "code": {name: _sha256(Path(__file__).parent / name) for name in _CODE},
        "engine": engine_version(),
        "opencv": cv2.__version__,
        "seed": params.seed,
        "size": size,
        "trunk": _sha256(_trunk(context.project)),
    }


def _trunk(project: Project) -> Path:
    return project.weights(BACKBONE) / TRUNK_FILE


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackboneError(
            f"The backbone's trunk cannot be read ({error.strerror}). Received: '{path}'. "
            "Run the backbone stage first."
        ) from error


def _stored(folder: Path, recipe: Recipe, shape: tuple[int, ...]) -> StoredRows | None:
    try:
        made_by, rows = open_rows(folder)
    except DataError:
        return None
    return rows if made_by == recipe and rows.shape == shape else None


def _find(sources: list[StoredRows], key: Key) -> Row | None:
    for rows in sources:
        row = rows.read(key)
        if row is not None:
            return row
    return None


def _found(sources: list[StoredRows], key: Key) -> Row:
    row = _find(sources, key)
    if row is None:
        raise DataError(
            f"A row was damaged while the features were written. Received: view {key.view} of "
            f"'{key.name}'. Check the disk, and run the features stage again."
        )
    return row


def _announce(folder: Path, wanted: int, missing: int, size: int) -> None:
    """Tell the disk that is needed: each missing row lies in the journal for a while."""
    needed = (wanted + missing) * size
    check_space(folder, needed)
    _log.info(
        "Features: %d of %d rows to compute; %.1f MB on disk, %.1f MB while they are written.",
        missing,
        wanted,
        wanted * size / 1e6,
        needed / 1e6,
    )


def _keep(context: Context, rows: Iterable[tuple[Key, Row]], count: int, journal: Journal) -> float:
    """Add rows to the journal as they come, and return how many a second."""
    began = time.perf_counter()
    for done, (key, row) in enumerate(rows, 1):
        journal.add(key, row)
        context.progress("features", done, count)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    stage_main(run)

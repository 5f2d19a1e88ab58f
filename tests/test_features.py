import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.backbone import write_backbone
from tasks.data.dataset import open_dataset
from tasks.errors import BackboneError, DataError, ModelError
from tasks.features import FeatureReport, run
from tasks.features import extract as extract_features
from tasks.io import write_json
from tasks.model.augment import augment, enlarge
from tasks.model.feature_store import (
    INDEX,
    ROWS,
    Key,
    PartialFeatures,
    Row,
    check_space,
    feature_shape,
    open_features,
    write_features,
)
from tasks.model.inference import QUEUE, Engine
from tasks.model.network import build_backbone, build_trunk
from tasks.model.shards import Shard, compute, load_trunk
from tasks.model.weights import BACKBONE_FILE, TRUNK_FILE, get_weights
from tasks.params import LABELS, Params, load_params
from tasks.project import Project
from tasks.scoring import photo_sheets
from tasks.scoring.photo_sheets import draw_augmentation
from tasks.stage import Context
from tasks.training.plan import plan_phase
from tests.fixtures.photos import CHECKOUT, photo

SIZE = 32
DETAIL = 24
VIEWS = 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the backbone stage writes, of an untrained network at a small size."""
    folder = tmp_path_factory.mktemp("backbone")
    write_backbone(folder, _untrained(0), SIZE)
    return folder


def _untrained(seed: int) -> dict[str, np.ndarray]:
    """Weights with batch norm statistics that do something."""
    random = np.random.default_rng(seed)
    weights = get_weights(build_backbone(SIZE).layers)
    for name, value in weights.items():
        if name.endswith(("gamma", "moving_variance")):
            weights[name] = random.uniform(0.7, 1.4, value.shape).astype(np.float32)
        elif name.endswith(("beta", "moving_mean")):
            weights[name] = random.normal(0, 0.2, value.shape).astype(np.float32)
        elif name.endswith("kernel"):
            weights[name] = random.normal(0, np.std(value), value.shape).astype(np.float32)
    return weights


@pytest.fixture
def context(tmp_path: Path, backbone: Path) -> Context:
    """Four train photos, two val photos, two test photos."""
    context = _context(tmp_path, backbone)
    _photos(context.project, range(4), range(10, 12), range(20, 22))
    return context


def _context(root: Path, backbone: Path) -> Context:
    project = Project(root)
    shutil.copytree(backbone, project.weights("backbone"))
    params = load_params(CHECKOUT.params)
    return Context(project, params.model_copy(update={"features": _views(VIEWS, params)}))


@cache
def _engine_of(graph: bytes, size: int) -> Engine:
    with TemporaryDirectory() as folder:
        path = Path(folder) / TRUNK_FILE
        path.write_bytes(graph)
        return load_trunk(path, size)


def extract(context: Context) -> FeatureReport:
    """Run the stage at a small size, building the engine once for each backbone."""

    def run(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
        trunk = _engine_of(graph.read_bytes(), SIZE)
        for shard in shards:
            yield from zip(shard.keys, compute(shard, trunk), strict=True)

    return extract_features(context, SIZE, run, shard_rows=4)


def _views(views: int, params: Params) -> Any:
    return params.features.model_copy(update={"augmented_copies": views})


def _name(number: int) -> str:
    """A photo's name; the order of names is not that of numbers, as with digests."""
    return f"{number * 37 % 101:03d}.png"


def _photos(project: Project, train: range, val: range, test: range) -> None:
    """Write a data set as the preprocess stage does; a photo is known by its number."""
    numbered = (
        [("test", n) for n in test] + [("train", n) for n in train] + [("val", n) for n in val]
    )
    images = np.stack([photo(n % 6, n, DETAIL) for _, n in numbered])
    project.dataset.mkdir(parents=True, exist_ok=True)
    np.save(project.dataset / "images.npy", images)
    photos = [{"name": _name(n), "label": LABELS[n % 6], "split": split} for split, n in numbered]
    write_json(project.dataset / "index.json", {"image_size": DETAIL, "photos": photos})


def _counts(report: FeatureReport) -> tuple[int, int]:
    return report.computed, report.reused


def _content(project: Project) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(project.features.iterdir())}


def _afresh(context: Context, folder: Path) -> dict[str, bytes]:
    """What the stage writes where nothing was before."""
    project = Project(folder)
    for made in (context.project.dataset, context.project.weights("backbone")):
        shutil.copytree(made, folder / made.relative_to(context.project.root))
    extract(replace(context, project=project))
    return _content(project)


def test_train_photos_have_all_copies_and_val_photos_the_plain_one(context: Context) -> None:
    report = extract(context)
    features = open_features(context.project.features)
    assert _counts(report) == (4 * 3 + 2, 0)
    assert report.images_per_second > 0
    assert report.views == VIEWS
    assert len(features) == 14
    assert features.batch([features.row(_name(3), view) for view in range(3)]).shape == (
        3,
        1,
        1,
        192,
    )
    assert features.batch([features.row(_name(10), 0)]).dtype == np.float16
    assert features.batch([]).shape == (0, 1, 1, 192)
    for name, view in ((_name(10), 1), (_name(3), 3), (_name(20), 0), ("none.png", 0)):
        with pytest.raises(DataError, match="Run the features stage again"):
            features.row(name, view)


def test_rows_are_what_keras_computes(context: Context, backbone: Path) -> None:
    extract(context)
    features = open_features(context.project.features)
    stored = features.batch([features.row(_name(n), 0) for n in range(4)])
    plain = enlarge(np.stack([photo(n % 6, n, DETAIL) for n in range(4)]), SIZE)
    trunk = build_trunk(backbone / BACKBONE_FILE, SIZE)
    expected = np.asarray(trunk(plain.astype(np.float32), training=False))
    assert expected.std() > 0.01
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_when_nothing_changed(context: Context) -> None:
    extract(context)
    before = {file: file.stat().st_mtime_ns for file in context.project.features.iterdir()}
    assert extract(context) == FeatureReport(0, 14, 0.0, VIEWS)
    assert {file: file.stat().st_mtime_ns for file in context.project.features.iterdir()} == before


def test_only_added_photos_are_computed(context: Context, tmp_path: Path) -> None:
    extract(context)
    _photos(context.project, range(6), range(10, 13), range(20, 22))
    assert _counts(extract(context)) == (2 * 3 + 1, 14)
    assert _content(context.project) == _afresh(context, tmp_path / "afresh")


def test_more_copies_keep_the_ones_there_are(context: Context) -> None:
    extract(context)
    more = context.params.model_copy(update={"features": _views(3, context.params)})
    assert _counts(extract(replace(context, params=more))) == (4, 14)


def test_other_augmentation_computes_everything_anew(context: Context, tmp_path: Path) -> None:
    extract(context)
    stronger = context.params.augmentation.model_copy(update={"rotation": 45.0})
    changed = replace(context, params=context.params.model_copy(update={"augmentation": stronger}))
    assert _counts(extract(changed)) == (14, 0)
    assert _content(changed.project) == _afresh(changed, tmp_path / "afresh")


def test_another_backbone_computes_everything_anew(context: Context) -> None:
    extract(context)
    write_backbone(context.project.weights("backbone"), _untrained(1), SIZE)
    assert _counts(extract(context)) == (14, 0)


def test_another_picture_under_the_same_name_is_computed(context: Context) -> None:
    extract(context)
    images = np.load(context.project.dataset / "images.npy")
    images[2] = 255 - images[2]
    np.save(context.project.dataset / "images.npy", images)
    assert _counts(extract(context)) == (3, 11)


@pytest.mark.parametrize("row", [0, 5, 13])
def test_a_flipped_bit_is_found_and_only_that_row_recomputed(context: Context, row: int) -> None:
    extract(context)
    before = _content(context.project)
    _flip(context.project.features / ROWS, 128 + row * 384 + 100)
    features = open_features(context.project.features)
    others = [number for number in range(14) if number != row]
    assert np.isfinite(features.batch(others)).all()
    with pytest.raises(DataError, match="do not match their digest"):
        features.batch([row])
    assert _counts(extract(context)) == (1, 13)
    assert _content(context.project) == before


@pytest.mark.parametrize(
    ("damage", "computed"),
    [
        (lambda folder: _flip(folder / ROWS, 65), 14),
        (lambda folder: (folder / ROWS).write_bytes((folder / ROWS).read_bytes()[:-400]), 14),
        (lambda folder: (folder / ROWS).write_bytes((folder / ROWS).read_bytes() + b"x"), 14),
        (lambda folder: (folder / ROWS).unlink(), 14),
        (lambda folder: (folder / INDEX).write_text("{"), 14),
        (lambda folder: (folder / INDEX).write_text("[]"), 14),
        (lambda folder: (folder / INDEX).unlink(), 14),
        (shutil.rmtree, 14),
    ],
    ids=["header", "cut", "longer", "no rows", "torn index", "odd index", "no index", "gone"],
)
def test_any_damage_is_recomputed_to_the_same_bytes(
    context: Context, damage: Callable[[Path], Any], computed: int
) -> None:
    extract(context)
    before = _content(context.project)
    damage(context.project.features)
    assert extract(context).computed == computed
    assert _content(context.project) == before


def _flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


@given(
    history=st.lists(
        st.tuples(st.integers(0, 3), st.integers(4, 8), st.integers(0, 3), st.integers(0, 3)),
        min_size=2,
        max_size=4,
    )
)
@settings(max_examples=8, deadline=None)
def test_bytes_do_not_depend_on_what_was_there_before(
    backbone: Path, history: list[tuple[int, int, int, int]]
) -> None:
    with TemporaryDirectory() as folder:
        now = _context(Path(folder) / "now", backbone)
        for first, last, held_out, views in history:
            _photos(now.project, range(first, last), range(10, 10 + held_out), range(20, 21))
            features = _views(views, now.params)
            now = replace(now, params=now.params.model_copy(update={"features": features}))
            report = extract(now)
        assert sum(_counts(report)) == (last - first) * (views + 1) + held_out
        assert _content(now.project) == _afresh(now, Path(folder) / "afresh")


@pytest.mark.parametrize("fractions", [(0.1, 0.1, 0.5), (0.6, 0.1, 0.3), (0.1, 0.1, 1.0)])
def test_photos_that_no_phase_reads_are_left_out(
    context: Context, fractions: tuple[float, ...]
) -> None:
    _photos(context.project, range(12), range(50, 52), range(60, 62))
    params = context.params
    phases = {
        name: phase.model_copy(update={"data_fraction": fraction})
        for (name, phase), fraction in zip(params.phases.items(), fractions, strict=True)
    }
    params = params.model_copy(update={"phases": phases})
    extract(replace(context, params=params))
    dataset = open_dataset(context.project.dataset)
    plans = [plan_phase(params, name, dataset) for name in phases]
    read = {dataset.names[row] for plan in plans for row in plan.train}
    assert len(read) == (12 if max(fractions) == 1 else 6)
    features = open_features(context.project.features)
    assert len(features) == len(read) * (VIEWS + 1) + 2
    for name in read:
        features.row(name, VIEWS)


def test_what_is_missing_is_named(context: Context, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Run the features stage"):
        open_features(tmp_path)
    (context.project.weights("backbone") / TRUNK_FILE).unlink()
    with pytest.raises(BackboneError, match="Run the backbone stage"):
        extract(context)


def test_training_end_to_end_has_no_features(context: Context) -> None:
    extract(context)
    plain = context.params.training.model_copy(update={"mode": "end_to_end"})
    changed = replace(context, params=context.params.model_copy(update={"training": plain}))
    assert extract(changed) == FeatureReport(0, 0, 0.0, VIEWS)
    assert len(open_features(context.project.features)) == 0
    assert _counts(extract(context)) == (14, 0)


def test_importing_the_stage_loads_no_engine() -> None:
    program = (
        "import sys, tasks.features; "
        "print([m for m in ('tensorflow', 'keras', 'openvino') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr


def test_progress_counts_every_row(context: Context) -> None:
    told: list[tuple[str, int, int]] = []
    extract(replace(context, progress=lambda *what: told.append(what)))
    assert told == [("features", done, 14) for done in range(1, 15)]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(DataError, match=r"need 1000000000\.0 MB"):
        check_space(tmp_path, 10**15)


def test_engine_agrees_with_keras_and_ignores_its_neighbours(backbone: Path) -> None:
    trunk = build_trunk(backbone / BACKBONE_FILE, SIZE)
    pictures = enlarge(np.stack([photo(n % 6, n, DETAIL) for n in range(8)]), SIZE)
    one, three = (load_trunk(backbone / TRUNK_FILE, SIZE, cores) for cores in (1, 3))
    alone = [one(picture) for picture in pictures]
    turned = [three(picture) for picture in pictures[::-1]][::-1]
    assert np.array_equal(alone, turned)
    expected = np.asarray(trunk(pictures.astype(np.float32), training=False))
    np.testing.assert_allclose(np.stack(alone), expected, rtol=1e-3, atol=1e-3)


def test_a_stream_gives_each_pictures_result_and_takes_few_ahead(backbone: Path) -> None:
    trunk = load_trunk(backbone / TRUNK_FILE, SIZE, cores=2)
    pictures = enlarge(np.stack([photo(n % 6, n, DETAIL) for n in range(40)]), SIZE)
    taken = 0

    def coming() -> Iterator[np.ndarray]:
        nonlocal taken
        for picture in pictures:
            taken += 1
            yield picture

    for done, row in enumerate(trunk.stream(coming())):
        assert np.array_equal(row, trunk(pictures[done]))
        assert taken <= done + 1 + 2 * QUEUE
    assert taken == done + 1 == len(pictures)
    assert list(trunk.stream([])) == []


def test_a_stream_that_fails_or_is_left_does_not_disturb_the_next(backbone: Path) -> None:
    trunk = load_trunk(backbone / TRUNK_FILE, SIZE, cores=2)
    picture = enlarge(photo(0, 0, DETAIL)[np.newaxis], SIZE)[0]
    alone = trunk(picture)

    def torn() -> Iterator[np.ndarray]:
        yield from [255 - picture] * 5
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(trunk.stream(torn()))
    left = trunk.stream([255 - picture] * 20)
    assert not np.array_equal(next(left), alone)
    del left
    assert all(np.array_equal(row, alone) for row in trunk.stream([picture] * 20))


def test_engine_refuses_activations_that_float16_cannot_hold(tmp_path: Path) -> None:
    weights = _untrained(2)
    weights["block6d_project_bn/gamma"] = weights["block6d_project_bn/gamma"] * 1e9
    write_backbone(tmp_path, weights, SIZE)
    with pytest.raises(ModelError, match="do not fit float16"):
        load_trunk(tmp_path / TRUNK_FILE, SIZE)


def test_engine_refuses_a_trunk_of_another_size(backbone: Path) -> None:
    with pytest.raises(ModelError, match="takes pictures of 32 pixels, not of 224"):
        load_trunk(backbone / TRUNK_FILE, 224)


def test_the_stage_reports_beside_its_output(context: Context) -> None:
    """The one run at full size: what `python -m tasks.features` does."""
    write_backbone(context.project.weights("backbone"), _untrained(0))
    _photos(context.project, range(1), range(10, 11), range(20, 21))
    run(context)
    report = json.loads(context.project.features_report.read_text())
    speed = report.pop("images_per_second")
    assert report == {"computed": 4, "reused": 0, "views": VIEWS}
    assert speed > 0
    features = open_features(context.project.features)
    assert features.batch(range(4)).shape == (4, *feature_shape(224))


def test_the_stage_says_in_one_line_what_cannot_be_written(context: Context) -> None:
    context.project.features_partial.write_text("a file")
    with pytest.raises(
        DataError, match=r"cannot be written to .*\((File exists|Not a directory)\)"
    ):
        run(context)


def test_a_stopped_run_is_continued(context: Context, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(replace(context, progress=stop))
    assert not context.project.features.exists()
    (context.project.features_partial / "000002.npy").write_bytes(b"torn")
    assert _counts(extract(context)) == (6, 8)
    assert not context.project.features_partial.exists()
    assert _content(context.project) == _afresh(context, tmp_path / "afresh")


def test_partial_rows_of_another_cache_key_are_dropped(tmp_path: Path) -> None:
    rows, key = np.arange(4, dtype=np.float16).reshape(1, 1, 1, 4), Key("a.png", 0, "p")
    PartialFeatures(tmp_path, {"seed": 1}).add([key], rows)
    kept = PartialFeatures(tmp_path, {"seed": 1}).get(key)
    assert kept is not None
    assert np.array_equal(kept, rows[0])
    assert PartialFeatures(tmp_path, {"seed": 2}).get(key) is None


def test_the_index_names_rows_as_numpy_reads_them(tmp_path: Path) -> None:
    rows = {
        Key(f"{name}.png", copy, "p"): np.full((1, 1, 4), 10 * name + copy, np.float16)
        for name in range(3)
        for copy in range(2)
    }
    write_features(tmp_path / "store", {"seed": 1}, (1, 1, 4), rows.items(), len(rows))
    features = open_features(tmp_path / "store")
    assert np.array_equal(np.load(tmp_path / "store" / ROWS), features.batch(range(6)))
    assert features.batch([features.row("2.png", 1)]).ravel().tolist() == [21] * 4
    assert features.cache_key == {"seed": 1}


def test_the_sheet_shows_each_class_and_its_copies(context: Context, tmp_path: Path) -> None:
    dataset, path = open_dataset(context.project.dataset), tmp_path / "plots" / "views.png"
    augmentation = context.params.augmentation
    draw_augmentation(path, dataset, 2, 20, augmentation)
    sheet = np.asarray(Image.open(path))
    cell = photo_sheets.SIDE + 3
    assert sheet.shape == (6 * cell - 3, photo_sheets.PHOTOS * 3 * cell - 3, 3)
    row = dataset.rows("train")[dataset.labels[dataset.rows("train")] == 1][0]
    expected = augment(
        np.asarray(dataset.images[row]), dataset.names[row], 2, 20, augmentation, photo_sheets.SIDE
    )
    corner = sheet[cell : cell + photo_sheets.SIDE, 2 * cell : 2 * cell + photo_sheets.SIDE]
    assert np.array_equal(corner, expected)

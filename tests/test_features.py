"""The features stage: what it computes, what it reuses, here and on a cluster."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.dask import check_scheduler, shard_runner
from flows.local.processes import choose_ports
from tasks import features as stage
from tasks.backbone import write_backbone
from tasks.data.dataset import open_dataset
from tasks.errors import BackboneError, DataError, ModelError, ServiceError
from tasks.io import write_json
from tasks.model.augment import enlarge
from tasks.model.feature_store import INDEX, ROWS, Key, Row, open_features
from tasks.model.files import BACKBONE_FILE, TRUNK_FILE, get_weights
from tasks.model.inference import QUEUE, Engine
from tasks.model.network import build_backbone, build_trunk
from tasks.model.shards import Shard, compute, cut, run_here
from tasks.params import load_params
from tasks.project import Project
from tasks.stage import Context
from tasks.training.plan import plan_phase
from tests.fixtures.dask_cluster import DaskCluster
from tests.fixtures.models import SIZE, changed
from tests.fixtures.photos import CHECKOUT, LABELS, photo

DETAIL = 24
COPIES = 2
HELD = 4 * (COPIES + 1) + 2
"""Rows of `context`: four train photos with their copies, and two val photos."""
ENGINES: dict[bytes, Engine] = {}


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


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the backbone stage writes, of an untrained network at a small size."""
    folder = tmp_path_factory.mktemp("backbone")
    write_backbone(folder, _untrained(0), SIZE)
    return folder


@pytest.fixture
def context(tmp_path: Path, backbone: Path) -> Context:
    return _context(tmp_path, backbone)


def _context(root: Path, backbone: Path) -> Context:
    """Four train photos, two val photos, two test photos."""
    project = Project(root)
    shutil.copytree(backbone, project.weights("backbone"))
    _photos(project, range(4), range(10, 12), range(20, 22))
    context = Context(project, load_params(CHECKOUT.params))
    return changed(context, "features", augmented_copies=COPIES)


def _name(number: int) -> str:
    """A photo's name; the order of names is not that of numbers, as with digests."""
    return f"{number * 37 % 101:03d}.png"


def _photos(project: Project, train: range, val: range, test: range) -> None:
    """Write a data set as the preprocess stage does; a photo is known by its number."""
    splits = {"test": test, "train": train, "val": val}
    numbered = [(split, n) for split, numbers in splits.items() for n in numbers]
    project.dataset.mkdir(parents=True, exist_ok=True)
    images = np.stack([photo(n % 6, n, DETAIL) for _, n in numbered])
    np.save(project.dataset / "images.npy", images)
    photos = [{"name": _name(n), "label": LABELS[n % 6], "split": split} for split, n in numbered]
    write_json(
        project.dataset / "index.json", {"image_size": DETAIL, "labels": LABELS, "photos": photos}
    )


def extract(context: Context) -> tuple[int, int]:
    """Run the stage, building the engine once for each backbone; rows computed and reused."""

    def run(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
        content = graph.read_bytes()
        trunk = ENGINES[content] = ENGINES.get(content) or Engine(graph)
        for shard in shards:
            yield from zip(shard.keys, compute(shard, trunk), strict=True)

    report = stage.extract(context, SIZE, run, shard_rows=4)
    return report["computed"], report["reused"]


def _content(project: Project) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(project.features.iterdir())}


def _from_scratch(context: Context, folder: Path) -> dict[str, bytes]:
    """What the stage writes where nothing was before."""
    project = Project(folder)
    for made in (context.project.dataset, context.project.weights("backbone")):
        shutil.copytree(made, folder / made.relative_to(context.project.root))
    extract(replace(context, project=project))
    return _content(project)


def test_train_photos_have_all_copies_and_val_photos_one(context: Context, backbone: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    context = replace(context, progress=lambda *what: progress.append(what))
    assert extract(context) == (HELD, 0)
    assert progress == [("features", done, HELD) for done in range(1, HELD + 1)]
    features = open_features(context.project.features)
    assert len(features.keys) == HELD
    assert features.rows.dtype == np.float16
    for name, copy in ((_name(10), 1), (_name(3), COPIES + 1), (_name(20), 0), ("none.png", 0)):
        with pytest.raises(DataError, match="Run the features stage again"):
            features.row(name, copy)
    stored = features.batch(np.array([features.row(_name(n), 0) for n in range(4)]))
    plain = enlarge(np.stack([photo(n % 6, n, DETAIL) for n in range(4)]), SIZE)
    trunk = build_trunk(backbone / BACKBONE_FILE, SIZE)
    expected = np.asarray(trunk(plain.astype(np.float32), training=False))
    assert expected.std() > 0.01
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_when_nothing_changed(context: Context) -> None:
    extract(context)
    before = {file: file.stat().st_mtime_ns for file in context.project.features.iterdir()}
    assert extract(context) == (0, HELD)
    assert {file: file.stat().st_mtime_ns for file in context.project.features.iterdir()} == before


def _more_photos(context: Context) -> Context:
    _photos(context.project, range(6), range(10, 13), range(20, 22))
    return context


def _another_backbone(context: Context) -> Context:
    write_backbone(context.project.weights("backbone"), _untrained(1), SIZE)
    return context


def _another_picture(context: Context) -> Context:
    images = np.load(context.project.dataset / "images.npy")
    images[2] = 255 - images[2]
    np.save(context.project.dataset / "images.npy", images)
    return context


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_more_photos, (2 * 3 + 1, HELD)),
        (lambda context: changed(context, "features", augmented_copies=3), (4, HELD)),
        (lambda context: changed(context, "augmentation", rotation=45.0), (HELD, 0)),
        (_another_backbone, (HELD, 0)),
        (_another_picture, (3, HELD - 3)),
        (lambda context: changed(context, "training", mode="end_to_end"), (0, 0)),
    ],
    ids=["photos", "copies", "augmentation", "backbone", "picture", "end to end"],
)
def test_only_what_changed_is_computed_and_the_bytes_are_those_of_a_first_run(
    context: Context, tmp_path: Path, change: Callable[[Context], Context], expected: Any
) -> None:
    extract(context)
    context = change(context)
    assert extract(context) == expected
    assert _content(context.project) == _from_scratch(context, tmp_path / "scratch")


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _flip(folder / ROWS, 65),
        lambda folder: _flip(folder / ROWS, 128 + 5 * 384 + 100),
        lambda folder: (folder / ROWS).write_bytes((folder / ROWS).read_bytes()[:-400]),
        lambda folder: (folder / ROWS).unlink(),
        lambda folder: (folder / INDEX).write_text("{"),
        lambda folder: (folder / INDEX).write_text("[]"),
        shutil.rmtree,
    ],
    ids=["header", "bit", "cut", "no rows", "torn index", "odd index", "gone"],
)
def test_a_damaged_store_is_found_and_computed_again(
    context: Context, damage: Callable[[Path], Any]
) -> None:
    extract(context)
    before = _content(context.project)
    damage(context.project.features)
    with pytest.raises(DataError, match="Run the features stage again"):
        open_features(context.project.features)
    assert extract(context) == (HELD, 0)
    assert _content(context.project) == before


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
        for first, last, held_out, copies in history:
            _photos(now.project, range(first, last), range(10, 10 + held_out), range(20, 21))
            now = changed(now, "features", augmented_copies=copies)
            counts = extract(now)
        assert sum(counts) == (last - first) * (copies + 1) + held_out
        assert _content(now.project) == _from_scratch(now, Path(folder) / "scratch")


def test_an_interrupted_stage_keeps_what_it_computed(context: Context, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(replace(context, progress=stop))
    assert not context.project.features.exists()
    (torn,) = context.project.features_partial.glob("000001")
    _flip(torn / ROWS, 200)
    (context.project.features_partial / ".000002.x.part").mkdir()
    assert extract(context) == (HELD - 4, 4)
    assert not context.project.features_partial.exists()
    assert _content(context.project) == _from_scratch(context, tmp_path / "scratch")


@pytest.mark.parametrize("fractions", [(0.1, 0.1, 0.5), (0.6, 0.1, 0.3), (0.1, 0.1, 1.0)])
def test_photos_that_no_phase_reads_are_left_out(
    context: Context, fractions: tuple[float, ...]
) -> None:
    _photos(context.project, range(12), range(50, 52), range(60, 62))
    phases = {
        name: phase.model_copy(update={"data_fraction": fraction})
        for (name, phase), fraction in zip(context.params.phases.items(), fractions, strict=True)
    }
    params = context.params.model_copy(update={"phases": phases})
    extract(replace(context, params=params))
    dataset = open_dataset(context.project.dataset)
    plans = [plan_phase(params, name, dataset) for name in phases]
    read = {dataset.names[row] for plan in plans for row in plan.train}
    assert len(read) == (12 if max(fractions) == 1 else 6)
    features = open_features(context.project.features)
    assert len(features.keys) == len(read) * (COPIES + 1) + 2
    for name in read:
        features.row(name, COPIES)


def test_what_stops_the_stage_is_named(
    context: Context, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(DataError, match=r"need 0\.0 MB of disk, but .* has 0\.0 MB free"):
        extract(context)
    monkeypatch.undo()
    weights = _untrained(0)
    weights["block6d_project_bn/gamma"] *= np.float32(1e9)
    write_backbone(context.project.weights("backbone"), weights, SIZE)
    with pytest.raises(ModelError, match="do not fit float16"):
        extract(context)
    (context.project.weights("backbone") / TRUNK_FILE).unlink()
    with pytest.raises(BackboneError, match="Run the backbone stage"):
        extract(context)
    context.project.artifacts.joinpath("plots").write_text("a file where a folder belongs")
    shutil.copy(backbone / TRUNK_FILE, context.project.weights("backbone"))
    with pytest.raises(DataError, match="what was computed is kept"):
        stage.run(changed(context, "training", mode="end_to_end"))


def test_a_stream_gives_each_pictures_result_and_reads_few_ahead(backbone: Path) -> None:
    one, two = (Engine(backbone / TRUNK_FILE, cores) for cores in (1, 2))
    pictures = enlarge(np.stack([photo(n % 6, n, DETAIL) for n in range(40)]), SIZE)
    taken = 0

    def coming() -> Iterator[np.ndarray]:
        nonlocal taken
        for picture in pictures:
            taken += 1
            yield picture

    for done, row in enumerate(two.stream(coming())):
        assert np.array_equal(row, one(pictures[done]))
        assert taken <= done + 1 + 2 * QUEUE
    assert taken == done + 1 == len(pictures)
    assert list(two.stream([])) == []


Shards = Callable[[], Iterator[Shard]]


@pytest.fixture
def shards(context: Context) -> Shards:
    """Eight shards of eight rows: every photo in eight copies."""
    dataset = open_dataset(context.project.dataset)
    pictures = [
        (Key(name, number, ""), image)
        for name, image in zip(dataset.names, dataset.images, strict=True)
        for number in range(8)
    ]
    return lambda: cut(pictures, 7, context.params.augmentation, rows=8)


def rows_of(made: Iterator[tuple[Key, Any]]) -> dict[Key, bytes]:
    return {key: row.tobytes() for key, row in made}


@pytest.mark.slow
def test_a_cluster_whose_workers_die_and_join_gives_the_same_bytes(
    backbone: Path, shards: Shards, dask_cluster: DaskCluster
) -> None:
    address, graph = dask_cluster.address, backbone / TRUNK_FILE
    workers = [dask_cluster.start_worker(), dask_cluster.start_worker()]
    alone = rows_of(run_here(shards(), graph))
    assert rows_of(shard_runner(None)(shards(), graph)) == alone
    made = shard_runner(address)(shards(), graph)
    first, row = next(made)
    workers[0].kill()
    dask_cluster.start_worker()
    workers[1].kill()
    assert {first: row.tobytes(), **rows_of(made)} == alone


@pytest.mark.slow
def test_a_cluster_without_workers_is_waited_for_and_one_that_is_lost_is_named(
    backbone: Path, shards: Shards, dask_cluster: DaskCluster, caplog: pytest.LogCaptureFixture
) -> None:
    address = dask_cluster.address
    check_scheduler(address, 10)
    notice = f"The Dask cluster at {address} has no worker; waiting for one."

    def join_after_the_notice() -> None:
        deadline = time.monotonic() + 60
        while notice not in caplog.messages:
            assert time.monotonic() < deadline, caplog.messages
            time.sleep(0.1)
        dask_cluster.start_worker()

    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join_after_the_notice)
        made = shard_runner(address, patience=5)(shards(), backbone / TRUNK_FILE)
        next(made)
        joined.result()
        dask_cluster.scheduler.kill()
        with pytest.raises(ServiceError, match=f"answers at {address}"):
            list(made)


def test_a_cluster_that_is_not_there_is_named(backbone: Path, shards: Shards) -> None:
    address = f"tcp://127.0.0.1:{choose_ports(1)[0]}"
    with pytest.raises(ServiceError, match=f"answers at {address}"):
        next(shard_runner(address, patience=2)(shards(), backbone / TRUNK_FILE))

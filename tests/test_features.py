"""The features stage: what it computes, what it reuses, here and on a cluster."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorflow.core.framework.graph_pb2 import GraphDef

from flows.dask import shard_runner
from tasks import features as stage
from tasks.data.dataset import INDEX, open_dataset
from tasks.errors import DataError, ModelError, ServiceError
from tasks.features import ROWS, Key, Shard, open_features
from tasks.io import read_json
from tasks.model.augment import enlarge
from tasks.model.files import BACKBONE_FILE, TRUNK_FILE
from tasks.model.network import build_trunk
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.models import SIZE, changed, copied, with_phases

COPIES = 2
EVERY = 24 * (COPIES + 1) + 12
"""Rows of `context`: 24 train photos with their copies, and 12 val photos."""


@pytest.fixture
def context(repo: Context, tmp_path: Path) -> Context:
    return changed(copied(repo, tmp_path / "checkout"), "features", augmented_copies=COPIES)


def extract(context: Context) -> tuple[int, int]:
    """Run the stage; rows computed and reused."""
    stage.run(context, size=SIZE, shard_rows=20)
    report = read_json(context.project.features_report)
    return report["computed"], report["reused"]


def stored(project: Project) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(project.features.iterdir())}


def test_train_photos_have_all_copies_and_val_photos_one(context: Context) -> None:
    assert extract(context) == (EVERY, 0)
    features = open_features(context.project.features)
    dataset = open_dataset(context.project.dataset)
    own = zip(dataset.names, dataset.splits, strict=True)
    assert set(features.numbers) == {
        (name, copy) for name, split in own for copy in range(COPIES * (split == "train") + 1)
    }
    rows = features.batch(np.array([features.numbers[name, 0] for name in dataset.names]))
    plain = enlarge(dataset.images, SIZE).astype(np.float32)
    trunk = build_trunk(context.project.weights("backbone") / BACKBONE_FILE, SIZE)
    expected = np.asarray(trunk(plain, training=False))
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=0.01 * expected.std())
    before = (context.project.features / ROWS).stat()
    assert extract(context) == (0, EVERY)
    assert (context.project.features / ROWS).stat() == before


def another_picture(context: Context) -> Context:
    images = np.load(context.project.dataset / "images.npy")
    images[2] = 255 - images[2]
    np.save(context.project.dataset / "images.npy", images)
    return context


def another_trunk(context: Context, factor: float = 1.1) -> Context:
    """Scale the kernel of the trunk's last convolution."""
    path = context.project.weights("backbone") / TRUNK_FILE
    graph = GraphDef.FromString(path.read_bytes())
    names = [node for node in graph.node if "block6d_project_conv" in node.name]
    kernel = next(node for node in names if node.op == "Const").attr["value"].tensor
    values = np.frombuffer(kernel.tensor_content, "f4") * np.float32(factor)
    kernel.tensor_content = values.tobytes()
    path.write_bytes(graph.SerializeToString())
    return context


CHANGES: dict[str, tuple[Callable[[Context], Context], tuple[int, int]]] = {
    "copies": (lambda one: changed(one, "features", augmented_copies=3), (24, EVERY)),
    "augmentation": (lambda one: changed(one, "augmentation", rotation=45.0), (EVERY, 0)),
    "trunk": (another_trunk, (EVERY, 0)),
    "picture": (another_picture, (COPIES + 1, EVERY - COPIES - 1)),
    "fraction": (lambda one: with_phases(one, data_fraction=0.5), (0, EVERY - 12 * (COPIES + 1))),
    "mode": (lambda one: changed(one, "training", mode="end_to_end"), (0, 0)),
}
"""What changes, and the rows that are computed and reused then."""


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_only_what_changed_is_computed(context: Context, change: Any, expected: Any) -> None:
    extract(context)
    context = change(context)
    assert extract(context) == expected
    found = stored(context.project)
    shutil.rmtree(context.project.features)
    assert sum(extract(context)) == sum(expected)
    assert stored(context.project) == found


def test_a_damaged_or_interrupted_store_is_completed(context: Context) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 50:
            raise KeyboardInterrupt

    extract(context)
    folder, before = context.project.features, stored(context.project)
    cut_off = before[ROWS][:-1]
    for name, content in ((ROWS, cut_off), (ROWS, cut_off + b"x"), (INDEX, b"{")):
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match="Run the features stage again"):
            open_features(folder)
        with pytest.raises(KeyboardInterrupt):
            extract(replace(context, progress=stop))
        partial = context.project.features_partial
        (partial / "000001" / ROWS).write_bytes(cut_off)
        (partial / ".000002.x.part").mkdir()
        assert extract(context) == (EVERY - 20, 20)
        assert not partial.exists()
        assert stored(context.project) == before
    with pytest.raises(ModelError, match="do not fit float16"):
        extract(another_trunk(context, 1e9))


def rows_of(repo: Context, address: str | None) -> Iterator[tuple[Key, bytes]]:
    """Every photo in two copies, computed in eight shards."""
    dataset = open_dataset(repo.project.dataset)
    graph = repo.project.weights("backbone") / TRUNK_FILE
    keys = [Key(name, copy, "") for name in dataset.names for copy in range(2)]
    pictures, recipe = np.repeat(dataset.images, 2, axis=0), (7, repo.params.augmentation)
    parts = [slice(start, start + 9) for start in range(0, len(keys), 9)]
    shards = (Shard(keys[part], pictures[part], *recipe) for part in parts)
    return ((key, row.tobytes()) for key, row in shard_runner(address, patience=5)(shards, graph))


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes(repo: Context) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        made = rows_of(repo, address)
        rows = [next(made)]
        for worker in cluster.workers.values():  # their nannies start others
            os.kill(worker.pid, signal.SIGKILL)
        rows += made
        assert rows == list(rows_of(repo, None))
        made = rows_of(repo, address)
        next(made)
    with pytest.raises(ServiceError, match=f"answers at {address}"):
        list(made)
    with pytest.raises(ServiceError, match=f"answers at {address}"):
        next(rows_of(repo, address))

"""Shards of features: the same rows wherever they are computed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.dask import check_scheduler, shard_runner
from flows.local.processes import choose_ports
from tasks.data.dataset import open_dataset
from tasks.errors import ServiceError
from tasks.model.export import export_graph
from tasks.model.feature_store import Key
from tasks.model.shards import Shard, cut, run_here
from tasks.stage import Context
from tests.fixtures.dask_cluster import DaskCluster
from tests.fixtures.models import SIZE

Shards = Callable[[], Iterator[Shard]]


@pytest.fixture(scope="module")
def graph(workshop: Callable[..., Context], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workshop's trunk, frozen, at 32 x 32."""
    from tasks.model.network import build_trunk
    from tasks.model.weights import BACKBONE_FILE

    trunk = build_trunk(workshop().project.weights("backbone") / BACKBONE_FILE, SIZE)
    path = tmp_path_factory.mktemp("trunk") / "trunk.pb"
    path.write_bytes(export_graph(trunk))
    return path


@pytest.fixture(scope="module")
def shards(workshop: Callable[..., Context]) -> Shards:
    """Twelve shards of 24 rows: every photo in eight views."""
    context = workshop()
    dataset = open_dataset(context.project.dataset)
    pictures = [
        (Key(name, number, ""), image)
        for name, image in zip(dataset.names, dataset.images, strict=True)
        for number in range(8)
    ]
    return lambda: cut(pictures, 7, context.params.augmentation, SIZE, rows=24)


def rows_of(made: Iterator[tuple[Key, Any]]) -> dict[Key, bytes]:
    return {key: row.tobytes() for key, row in made}


@given(count=st.integers(0, 40), rows=st.integers(1, 12))
def test_every_row_is_in_one_shard_and_none_is_too_large(count: int, rows: int) -> None:
    keys = [Key("photo", number, "") for number in range(count)]
    picture = np.zeros((2, 2, 3), np.uint8)
    made = list(cut(((key, picture) for key in keys), 0, None, 2, rows))  # type: ignore[arg-type]
    assert [key for shard in made for key in shard.keys] == keys
    assert all(len(shard.keys) == len(shard.pictures) <= rows for shard in made)


@pytest.mark.slow
def test_a_cluster_whose_workers_die_and_join_gives_the_same_bytes(
    graph: Path, shards: Shards, dask_cluster: DaskCluster
) -> None:
    address = dask_cluster.address
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
    graph: Path,
    shards: Shards,
    dask_cluster: DaskCluster,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = dask_cluster.address
    check_scheduler(address, 10)
    told = f"The Dask cluster at {address} has no worker; waiting for one."

    def join_once_told() -> None:
        deadline = time.monotonic() + 60
        while told not in caplog.messages:
            assert time.monotonic() < deadline, caplog.messages
            time.sleep(0.1)
        dask_cluster.start_worker()

    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join_once_told)
        made = shard_runner(address, patience=5)(shards(), graph)
        next(made)
        joined.result()
        dask_cluster.scheduler.kill()
        with pytest.raises(ServiceError, match=f"{address} does not answer"):
            list(made)


def test_a_cluster_that_is_not_there_is_named(graph: Path, shards: Shards, tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{choose_ports(tmp_path, 'dask', 1)[0]}"
    with pytest.raises(ServiceError, match=f"{address} does not answer"):
        next(shard_runner(address, patience=2)(shards(), graph))

"""SIGKILL at every point between the first upload and the alias, and then once more."""

import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest
from mlflow import MlflowClient

from tasks.releases.champion import Champion, read_champion
from tasks.releases.release import fetch, verify
from tasks.services.mlflow import CHAMPION, Registry, credentials_of
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import publishing
from tests.fixtures.faults import Exchange, Proxy, on, proxy_to
from tests.fixtures.forkserver import Started
from tests.fixtures.publishing import FILES, write_files
from tests.fixtures.servers import MlflowServer

Point = tuple[str, str, int]
"""A request, whether to kill before, during or after it, and which one of those alike."""

ALIAS = "POST .*/registered-models/alias$"
POINTER = "PUT .*/champion.json$"
NAMES = ("labels.json", "model.keras", "manifest.json", "champion.json")
PUBLISHING: list[Point] = [
    ("GET .*list-type", "before", 1),
    *((f"PUT .*/{name}$", when, 1) for name in NAMES for when in ("before", "during", "after")),
    ("PUT .*/model_card.md$", "after", 1),
    # Reading back what was uploaded, and reading all of it once more before the pointer.
    *(("GET .*/model.keras$", "before", nth) for nth in (1, 2)),
    ("GET .*/champion.json$", "before", 1),
    *(("POST .*/model-versions/create$", when, 1) for when in ("before", "after")),
    *((ALIAS, when, nth) for nth in (1, 2) for when in ("before", "after")),
]
QUICKLY: list[Point] = [
    ("PUT .*/model.keras$", "during", 1),
    ("PUT .*/manifest.json$", "after", 1),
    (POINTER, "after", 1),
    (ALIAS, "before", 2),
]
"""One of each consequence: half a release, a complete one that nobody names, no alias."""
RECORDING: list[Point] = [
    ("POST .*/runs/create$", "after", 1),
    ("POST .*/logged-models$", "after", 1),
    ("PUT .*/data/model.keras$", "during", 1),
    ("PATCH .*/logged-models/m-[0-9a-f]+$", "before", 1),
    *(("POST .*/runs/outputs$", when, 1) for when in ("before", "after")),
    *(("POST .*/runs/update$", when, 1) for when in ("before", "after")),
]
UNNAMED = [(POINTER, "after", 1), (ALIAS, "before", 2)]
"""Between pointer and alias."""


def read_until(stopped: Event, storage: Storage, folder: Path) -> list[str]:
    """Ask again and again who is champion, and fetch it, with every byte compared."""
    seen = []
    while not stopped.wait(0.05):
        champion = read_champion(storage)
        assert champion
        found = fetch(storage, champion.pointer.release, folder)
        seen.append((found / "labels.json").read_text().split()[0])
        shutil.rmtree(found)
    return seen


def kill(start: Callable[[], Started], point: Point, *proxies: Proxy) -> None:
    """Publish, and be killed at a point."""
    request, when, nth = point
    process: Future[Started] = Future()

    def strike(exchange: Exchange) -> None:
        if when != "before":
            exchange.forward(0.5 if when == "during" else 1.0)
        os.kill(process.result(10).pid, signal.SIGKILL)
        exchange.reset()

    fault = on(request, strike, (nth,))
    with proxies[0].failing(fault), proxies[1].failing(fault):
        process.set_result(start())
        assert process.result().wait(60) == -signal.SIGKILL, point


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(QUICKLY, id="quickly"),
        pytest.param(PUBLISHING, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(RECORDING, id="recording", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_between_upload_and_alias_nothing_is_lost_or_half_seen(
    s3: S3Address, mlflow_server: MlflowServer, tmp_path: Path, points: list[Point]
) -> None:
    direct, run, champions, stopped = Storage(s3), None, list[Champion](), Event()
    folders = [write_files(tmp_path / f"{number:03d}") for number in range(len(points) + 1)]
    names = (f"signs-{s3.bucket}", mlflow_server.login)
    registry = Registry(mlflow_server.url, names[0], login=names[1])
    with (
        proxy_to(s3.endpoint_url) as storage,
        proxy_to(mlflow_server.url) as mlflow,
        ThreadPoolExecutor(1) as pool,
    ):
        address = replace(s3, endpoint_url=storage.url)
        try:
            for folder, point in zip(folders, [None, *points], strict=True):
                start = partial(publishing.start, folder, address, run, mlflow.url, *names)
                if point:
                    kill(start, point, storage, mlflow)
                assert start().wait(60) == 0
                champion, alias = read_champion(direct), registry.find(CHAMPION)
                assert champion
                assert alias
                assert alias.number == champion.pointer.version
                champions.append(champion)
                if not point:
                    reader = pool.submit(read_until, stopped, Storage(s3), tmp_path / "reader")
                    if points is not RECORDING:
                        run = publishing.record(registry, champion.pointer.release, folder)
        finally:
            stopped.set()
        seen = reader.result()
    assert seen == sorted(seen)
    assert len(seen) > len(points)
    # One release, one version, one move and one finished run each, however often it was tried.
    releases = [champion.pointer.release for champion in champions]
    assert len(set(releases)) == len(points) + 1
    assert [move.release for move in champions[-1].pointer.moves] == releases
    assert sorted(str(one.content_id) for one in registry.versions()) == sorted(releases)
    for release in releases:
        verify(direct, release)
    assert len(direct.keys("")) == 1 + len(releases) * (len(FILES) + 1)
    with credentials_of(None, registry.login):
        client = MlflowClient(registry.tracking_uri)
        experiment = client.get_experiment_by_name(registry.model_name).experiment_id
        runs = client.search_runs([experiment], "attributes.status = 'FINISHED'")
    assert len(runs) == (len(releases) if points is RECORDING else 1)
    # The next run says that it repairs the alias.
    pairs = zip(folders[1:], points, strict=True)
    repaired = [point for folder, point in pairs if (folder / "said").exists()]
    assert repaired == [point for point in points if point in UNNAMED]

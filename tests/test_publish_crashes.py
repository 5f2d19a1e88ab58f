"""SIGKILL at every point between the first upload and the alias, and then once more."""

import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import pytest

from tasks.releases.champion import Champion, read_champion
from tasks.releases.release import fetch, verify
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import publishing
from tests.fixtures.faults import Kill, Proxy, proxy_to
from tests.fixtures.publishing import FILES, Publisher, write_files
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
    *(
        (f"POST .*/runs/{part}$", when, 1)
        for part in ("outputs", "update")
        for when in ("before", "after")
    ),
]


@contextmanager
def reading(storage: Storage, folder: Path) -> Iterator[list[str]]:
    """Ask again and again who is champion, and fetch it, with every byte compared."""
    seen: list[str] = []
    stopped = Event()

    def read() -> None:
        while not stopped.wait(0.05):
            champion = read_champion(storage)
            assert champion is not None
            found = fetch(storage, champion.pointer.release, folder)
            seen.append((found / "labels.json").read_text().split()[0])
            shutil.rmtree(found)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            yield seen
        finally:
            stopped.set()
    reader.result()


@dataclass
class Services:
    """Real services behind proxies, and who publishes to them."""

    direct: Storage
    registry: Registry
    proxies: tuple[Proxy, Proxy]
    publisher: Publisher

    def kill(self, folder: Path, point: Point) -> None:
        """Publish, and be killed at a point."""
        kill = Kill(*point)
        for proxy in self.proxies:
            proxy.fault = kill
        with self.proxies[0].counting, self.proxies[1].counting:
            process = self.publisher.start(folder)
            kill.pid = process.pid
        code = process.wait(60)
        for proxy in self.proxies:
            proxy.fault = None
        assert code == -signal.SIGKILL, f"{point}: {code}"

    def publish(self, folder: Path) -> Champion:
        """Publish to the end and return the champion, which the alias names."""
        assert self.publisher.start(folder).wait(60) == 0
        champion, alias = read_champion(self.direct), self.registry.find(CHAMPION)
        assert champion is not None
        assert alias is not None
        assert alias.number == champion.pointer.version
        return champion


@pytest.fixture
def services(
    s3: S3Address, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Services]:
    for variable, value in mlflow_server.named.items():
        monkeypatch.setenv(variable, value)
    name, login = f"signs-{s3.bucket}", mlflow_server.login
    with proxy_to(s3.endpoint_url) as storage, proxy_to(mlflow_server.url) as registry:
        publisher = Publisher(replace(s3, endpoint_url=storage.url), registry.url, login, name)
        direct = (Storage(s3), Registry(mlflow_server.url, name, login=login))
        yield Services(*direct, (storage, registry), publisher)


@pytest.mark.parametrize(
    "points",
    [QUICKLY, pytest.param(PUBLISHING, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_killed_anywhere_between_upload_and_alias_nothing_is_lost_or_half_seen(
    services: Services, tmp_path: Path, points: list[Point]
) -> None:
    names = [f"{number:03d}" for number in range(len(points) + 1)]
    folders = [write_files(tmp_path / name, name) for name in names]
    champions = [services.publish(folders[0])]
    recorded = publishing.record(services.registry, champions[0].pointer.release, folders[0])
    services.publisher = replace(services.publisher, run=recorded)
    with reading(Storage(services.direct.address), tmp_path / "reader") as seen:
        for folder, point in zip(folders[1:], points, strict=True):
            services.kill(folder, point)
            champions.append(services.publish(folder))
    assert seen == sorted(seen)
    assert len(seen) > len(points)
    # One release, one version and one move each, however often it was tried.
    releases = [champion.pointer.release for champion in champions]
    assert len(set(releases)) == len(points) + 1
    assert [move.release for move in champions[-1].pointer.moves] == releases
    assert Counter(one.content_id for one in services.registry.versions()) == Counter(releases)
    for release in releases:
        verify(services.direct, release)
    assert len(services.direct.keys("")) == 1 + len(releases) * (len(FILES) + 1)
    # Killed between pointer and alias, which is said when the next run repairs it.
    pairs = zip(folders[1:], points, strict=True)
    repaired = [point for folder, point in pairs if (folder / "said").exists()]
    assert repaired == [(POINTER, "after", 1), (ALIAS, "before", 2)]


@pytest.mark.slow
def test_killed_anywhere_in_recording_one_finished_run_is_left(
    services: Services, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    folder = write_files(tmp_path / "only", "only")
    for point in RECORDING:
        services.kill(folder, point)
        assert read_champion(services.direct) is None
    champion = services.publish(folder)
    assert [one.content_id for one in services.registry.versions()] == [champion.pointer.release]
    client = MlflowClient(services.registry.tracking_uri)
    experiment = client.get_experiment_by_name(services.registry.model_name)
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    assert len(runs) == 1

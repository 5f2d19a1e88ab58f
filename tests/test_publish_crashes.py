"""SIGKILL at every point between the first upload and the alias, and then once more."""

import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import pytest

from tasks.releases.pointer import Champion, read_champion
from tasks.releases.release import fetch, verify
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import publishing
from tests.fixtures.faults import Kill, Proxy, proxy_to
from tests.fixtures.publishing import FILES, Publisher, started, write_files
from tests.fixtures.servers import MlflowServer

Point = tuple[str, str, int]
"""A request, whether to kill before, during or after it, and which one of those alike."""

UPLOADS = ("labels.json", "model.keras", "manifest.json", "champion.json")
PAUSE = 0.05
ALIAS = "POST .*/registered-models/alias$"
POINTER = "PUT .*/champion.json$"
PUBLISHING: list[Point] = [
    ("GET .*list-type", "before", 1),
    *((f"PUT .*/{name}$", when, 1) for name in UPLOADS for when in ("before", "during", "after")),
    ("PUT .*/model_card.md$", "after", 1),
    # Reading back what was uploaded, and reading all of it once more before the pointer.
    *(("GET .*/model.keras$", "before", nth) for nth in (2, 3)),
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
"""One of each consequence: half a release, a whole one that nobody names, no alias."""
RECORDING: list[Point] = [
    ("POST .*/runs/create$", "after", 1),
    ("POST .*/logged-models$", "after", 1),
    ("PUT .*/data/model.keras$", "during", 1),
    ("PATCH .*/logged-models/m-[0-9a-f]+$", "before", 1),
    ("POST .*/runs/outputs$", "before", 1),
    ("POST .*/runs/outputs$", "after", 1),
    ("POST .*/runs/update$", "before", 1),
    ("POST .*/runs/update$", "after", 1),
]


@dataclass
class Reader:
    """Asks again and again who is champion, fetches it and looks at every byte.

    As a context it does so in a thread of its own; afterwards `seen` holds what it
    got, in order.
    """

    storage: Storage
    folder: Path
    seen: list[str] = field(default_factory=list)
    fault: BaseException | None = None

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            while not self._stopped.is_set():
                champion = read_champion(self.storage)
                assert champion is not None
                found = fetch(self.storage, champion.pointer.release, self.folder)
                self.seen.append((found / "labels.json").read_text().split()[0])
                shutil.rmtree(found)
                time.sleep(PAUSE)
        except BaseException as error:
            self.fault = error


@dataclass
class Stage:
    """Real services behind proxies, and who publishes to them."""

    direct: Storage
    registry: Registry
    proxies: tuple[Proxy, Proxy]
    publisher: Publisher

    def killed(self, folder: Path, point: Point) -> None:
        """Publish, and be killed at a point."""
        kill = Kill(*point)
        for proxy in self.proxies:
            proxy.fault = kill
        with self.proxies[0].counting, self.proxies[1].counting:
            process = started(self.publisher, folder)
            kill.pid = process.pid
        code = process.wait(60)
        for proxy in self.proxies:
            proxy.fault = None
        assert code == -signal.SIGKILL, f"{point}: {code}"

    def published(self, folder: Path) -> Champion:
        """Publish to the end and return the champion."""
        assert started(self.publisher, folder).wait(60) == 0
        champion = read_champion(self.direct)
        assert champion is not None
        return champion

    def alias(self) -> int | None:
        """Number of the version that MLflow calls champion."""
        version = self.registry.version_by_alias(CHAMPION)
        return version and version.number


@pytest.fixture
def stage(
    s3: S3Address, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    for variable, value in mlflow_server.named.items():
        monkeypatch.setenv(variable, value)
    name, login = f"signs-{s3.bucket}", mlflow_server.login
    with proxy_to(s3.endpoint_url) as storage, proxy_to(mlflow_server.url) as registry:
        publisher = Publisher(replace(s3, endpoint_url=storage.url), registry.url, login, name)
        services = (Storage(s3), Registry(mlflow_server.url, name, login=login))
        yield Stage(*services, (storage, registry), publisher)


@pytest.mark.parametrize(
    "points",
    [QUICKLY, pytest.param(PUBLISHING, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_killed_anywhere_between_upload_and_alias_nothing_is_lost_or_half_seen(
    stage: Stage, tmp_path: Path, points: list[Point]
) -> None:
    names = [f"{number:03d}" for number in range(len(points) + 1)]
    folders = [write_files(tmp_path / name, name) for name in names]
    champions = [stage.published(folders[0])]
    recorded = publishing.record(stage.registry, champions[0].pointer.release, folders[0])
    stage.publisher = replace(stage.publisher, run=recorded)
    with Reader(Storage(stage.direct.address), tmp_path / "reader") as reader:
        for folder, point in zip(folders[1:], points, strict=True):
            stage.killed(folder, point)
            champions.append(stage.published(folder))
            assert stage.alias() == champions[-1].pointer.version, point
    assert reader.fault is None
    assert reader.seen == sorted(reader.seen)
    assert len(reader.seen) > len(points)
    # One release, one version and one move each, however often it was tried.
    releases = [champion.pointer.release for champion in champions]
    assert len(set(releases)) == len(points) + 1
    assert [move.release for move in champions[-1].pointer.moves] == releases
    assert Counter(one.content_id for one in stage.registry.versions()) == Counter(releases)
    for release in releases:
        verify(stage.direct, release)
    keys = [entry.key for entry in stage.direct.list("")]
    assert len(keys) == 1 + len(releases) * (len(FILES) + 1)
    bucket = stage.direct.address.bucket
    assert "Uploads" not in stage.direct._client.list_multipart_uploads(Bucket=bucket)
    # Killed between pointer and alias, which is said when the next run mends it.
    mended = [point for folder, point in zip(folders[1:], points, strict=True) if said(folder)]
    assert mended == [(POINTER, "after", 1), (ALIAS, "before", 2)]


def said(folder: Path) -> bool:
    return (folder / "said").exists()


@pytest.mark.slow
def test_killed_anywhere_in_recording_one_finished_run_is_left(
    stage: Stage, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    folder = write_files(tmp_path / "only", "only")
    for point in RECORDING:
        stage.killed(folder, point)
        assert read_champion(stage.direct) is None
    champion = stage.published(folder)
    assert [one.content_id for one in stage.registry.versions()] == [champion.pointer.release]
    client = MlflowClient(stage.registry.tracking_uri)
    experiment = client.get_experiment_by_name(stage.registry.model_name)
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    assert len(runs) == 1

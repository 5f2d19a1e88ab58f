"""Disks that are full for real: that of the store, and the one of this machine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flows.local import servers
from flows.local.clients import ask
from flows.local.processes import Program
from tasks.errors import ServiceError
from tasks.releases.champion import Pointer, move_champion, read_champion
from tasks.releases.release import publish, verify
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.photos import write_photos
from tests.fixtures.publishing import write_files
from tests.fixtures.servers import new_bucket, running


@contextmanager
def seaweedfs(folder: Path, free: int) -> Iterator[S3Address]:
    """A SeaweedFS that holds its disk to be full below so many per cent of free space.

    `weed mini` has no such option, so its parts are started as `weed server`.
    """

    def describe(ports: tuple[int, ...]) -> Program:
        program = servers.seaweedfs(folder, "artifacts", ports)
        weed, _, data, _, *more = program.command
        shared = [word for word in more if not word.startswith("-admin.")]
        sizes = ["-master.volumeSizeLimitMB=64", "-volume.max=20"]
        command = [
            weed,
            "server",
            data,
            "-filer",
            "-s3",
            *shared,
            *sizes,
            f"-volume.minFreeSpace={free}",
        ]
        url = f"{program.url}/healthz"
        return replace(program, command=command, ready=lambda: ask(url) is not None)

    folder.mkdir(exist_ok=True)
    with running(folder, "seaweedfs", describe) as program:
        yield servers.local_s3(folder, "artifacts", program.ports[0])


@pytest.mark.slow
def test_a_store_on_a_full_disk_takes_nothing_and_keeps_what_it_holds(tmp_path: Path) -> None:
    def files(name: str) -> dict[str, Path]:
        return {path.name: path for path in write_files(tmp_path / name, name).iterdir()}

    store = tmp_path / "store"
    with seaweedfs(store, free=1) as address:
        bucket = new_bucket(address).bucket
        storage = Storage(replace(address, bucket=bucket))
        first = publish(storage, files("first"))
        champion = move_champion(storage, None, Pointer(release=first.id, version=1))
        held = list(storage.list(""))

    with seaweedfs(store, free=100) as address:
        storage = Storage(replace(address, bucket=bucket))
        for write in (
            lambda: publish(storage, files("second")),
            lambda: move_champion(storage, champion, Pointer(release=first.id, version=2)),
        ):
            began = time.monotonic()
            with pytest.raises(ServiceError, match=r"500 InternalError .* its disk") as caught:
                write()
            assert time.monotonic() - began < 30
            assert "\n" not in str(caught.value)
        assert read_champion(storage) == champion
        assert list(storage.list("")) == held

    with seaweedfs(store, free=1) as address:
        storage = Storage(replace(address, bucket=bucket))
        verify(storage, first.id)
        second = publish(storage, files("again"))
        move_champion(storage, champion, Pointer(release=second.id, version=2))
        verify(storage, second.id)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_import_onto_a_full_disk_leaves_the_photos_as_they_were(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    data, version = workshop.project.root / "data", workshop.project.root / "data.dvc"
    workshop.handsigns("import", write_photos(tmp_path / "first", per_class=3))
    before = contents(data), version.read_bytes()
    more = write_photos(tmp_path / "more", per_class=2, size=400, seed=1)
    for size in (100_000, 1_000):  # too small for the photos; too small for DVC's notes
        for words in ((more,), (more, "--replace")):
            told = workshop.run_limited(size, "import", *words).stderr
            assert told.count("\n") == 1, told
            assert (contents(data), version.read_bytes()) == before
    taken = workshop.handsigns("import", more)["taken"]["train"]
    assert taken == dict.fromkeys("012345", 2)
    assert before[0].items() <= contents(data).items()

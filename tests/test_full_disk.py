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
    """A SeaweedFS whose disk counts as full below so many per cent of free space.

    `weed mini` has no such option, so its parts are started as `weed server`.
    """

    def describe(ports: tuple[int, ...]) -> Program:
        program = servers.seaweedfs(folder, "artifacts", ports)
        weed, _, data, _, *more = program.command
        command = [weed, "server", data, "-filer", "-s3", "-volume.max=20"]
        command += ["-master.volumeSizeLimitMB=64", f"-volume.minFreeSpace={free}"]
        command += [word for word in more if not word.startswith("-admin.")]
        url = f"{program.url}/healthz"
        return replace(program, command=command, ready=lambda: ask(url) is not None)

    folder.mkdir(exist_ok=True)
    with running(folder, "seaweedfs", describe) as program:
        yield servers.local_s3(folder, "artifacts", program.ports[0])


@pytest.mark.slow
def test_a_store_on_a_full_disk_takes_nothing_and_keeps_what_it_holds(tmp_path: Path) -> None:
    def release(storage: Storage, name: str) -> str:
        files = write_files(tmp_path / name, name).iterdir()
        return publish(storage, {path.name: path for path in files}).id

    with seaweedfs(tmp_path / "store", free=1) as address:
        bucket = new_bucket(address).bucket
        storage = Storage(replace(address, bucket=bucket))
        first = release(storage, "first")
        champion = move_champion(storage, None, Pointer(release=first, version=1))
        kept = list(storage.list(""))

    with seaweedfs(tmp_path / "store", free=100) as address:
        storage = Storage(replace(address, bucket=bucket))
        for write in (
            lambda: release(storage, "second"),
            lambda: move_champion(storage, champion, Pointer(release=first, version=2)),
        ):
            began = time.monotonic()
            with pytest.raises(ServiceError, match=r"500 InternalError .* its disk"):
                write()
            assert time.monotonic() - began < 30
        assert read_champion(storage) == champion
        assert list(storage.list("")) == kept

    with seaweedfs(tmp_path / "store", free=1) as address:
        storage = Storage(replace(address, bucket=bucket))
        second = release(storage, "again")
        move_champion(storage, champion, Pointer(release=second, version=2))
        for one in (first, second):
            verify(storage, one)


@pytest.mark.slow
def test_an_import_onto_a_full_disk_leaves_the_photos_as_they_were(tmp_path: Path) -> None:
    repo = make_checkout(tmp_path / "checkout")
    root = repo.project.root

    def contents() -> dict[Path, bytes]:
        paths = [root / "data.dvc", *(root / "data").rglob("*.*")]
        return {path: path.read_bytes() for path in paths}

    repo.handsigns("import", write_photos(tmp_path / "first", per_class=3))
    before = contents()
    more = write_photos(tmp_path / "more", per_class=2, size=400, seed=1)
    for size, words in ((100_000, ()), (1_000, ("--replace",))):  # of photos; of DVC's notes
        refused = repo.run_limited(size, "import", more, *words).stderr
        assert (refused.count("\n"), contents()) == (1, before), refused
    taken = repo.handsigns("import", more)["taken"]["train"]
    assert taken == dict.fromkeys("012345", 2)

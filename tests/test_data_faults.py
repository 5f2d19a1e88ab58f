"""Photos and results that are damaged, gone or fought over: nothing corrupt is trained on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tasks.data.directory import fetch_data, render
from tasks.errors import BusyError, DataError, HandsignsError, ServiceError
from tasks.project import Project
from tasks.services.dvc import Pipeline, Remote
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.checkouts import with_stages
from tests.fixtures.faults import Proxy, proxy_to
from tests.fixtures.locks import held

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
SECONDS = 60
"""Longest time in which a remote that fails is given up."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with photos and one version of them."""
    project = with_stages(tmp_path_factory.mktemp("data") / "checkout")
    before = Path.cwd()
    os.chdir(project.root)
    try:
        Pipeline(project).version_data("photos")
    finally:
        os.chdir(before)
    return project.root


@pytest.fixture
def checkout(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    root = tmp_path / "checkout"
    shutil.copytree(prepared, root)
    monkeypatch.chdir(root)
    return Project(root)


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint_url) as made:
        yield made


def _s3_remote(address: S3Address, url: str, **other: str) -> Remote:
    options = {
        "endpointurl": url,
        "region": address.region,
        "access_key_id": str(address.access_key_id),
        "secret_access_key": str(address.secret_access_key),
    }
    return Remote(f"s3://{address.bucket}/photos", {**options, **other})


def _photos(project: Project) -> dict[str, str]:
    return {
        str(path.relative_to(project.data)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in project.data.rglob("*.png")
    }


def test_push_repairs_what_the_remote_lost(checkout: Project, s3: S3Address) -> None:
    assert Pipeline(checkout, _s3_remote(s3, s3.endpoint_url)).push_data() == 73
    storage = Storage(s3)
    keys = [entry.key for entry in storage.list("photos/") if not entry.key.endswith(".dir")]
    storage.put(keys[0], b"damaged")
    storage.remove(keys[2])
    kept = Path(*keys[2].split("/")[1:])
    (checkout.root / ".dvc/cache" / kept).unlink()  # it is taken from data/ again
    pipeline = Pipeline(checkout, _s3_remote(s3, s3.endpoint_url))
    assert (pipeline.push_data(), pipeline.push_data()) == (2, 0)
    for key in keys:
        digest = hashlib.md5(storage.get(key)).hexdigest()
        assert key.endswith(f"{digest[:2]}/{digest[2:]}")


def test_a_failing_remote_is_told_in_one_line_and_lays_out_nothing(
    checkout: Project, s3: S3Address, proxy: Proxy
) -> None:
    before = _photos(checkout)
    Pipeline(checkout, _s3_remote(s3, s3.endpoint_url)).push_data()
    shutil.rmtree(checkout.data)
    shutil.rmtree(checkout.root / ".dvc/cache")
    storage = Storage(s3)
    key = next(entry.key for entry in storage.list("photos/") if not entry.key.endswith(".dir"))
    content = storage.get(key)
    through = _s3_remote(s3, proxy.url)
    cases: list[tuple[str, Remote, Callable[[], object], object]] = [
        ("down", _s3_remote(s3, "http://127.0.0.1:9"), lambda: None, None),
        ("wrong key", _s3_remote(s3, proxy.url, secret_access_key="sentinel"), lambda: None, None),
        ("500", through, lambda: None, faults.answering(500, "InternalError")),
        ("object damaged", through, lambda: storage.put(key, b"damaged"), None),
        ("object missing", through, lambda: storage.remove(key), None),
    ]
    for name, remote, spoil, fault in cases:
        spoil()
        proxy.fault = fault  # type: ignore[assignment]
        began = time.monotonic()
        with pytest.raises(ServiceError, match="could not be pulled") as caught:
            fetch_data(checkout, Pipeline(checkout, remote))
        assert time.monotonic() - began < SECONDS, name
        assert "\n" not in str(caught.value), name
        assert "sentinel" not in str(caught.value)
        assert not any(checkout.data.glob("*/*/*")), name
    proxy.fault = None
    storage.put(key, content)
    fetch_data(checkout, Pipeline(checkout, through))
    assert _photos(checkout) == before


def test_a_lock_file_edited_by_hand_is_mended_or_told(checkout: Project) -> None:
    lock = checkout.root / "dvc.lock"
    Pipeline(checkout).run("audit")
    written = lock.read_bytes()
    digest = written.split(b"md5: ")[-1][:32]
    lock.write_bytes(written.replace(digest, b"f" * 32))
    assert Pipeline(checkout).run("audit") in ("ran", "restored")
    assert lock.read_bytes() == written
    for broken in (
        b"stages: [",
        written.replace(digest, b"0" * 32),
        b"schema: '2.0'\nstages: 7\n",
        b"\xff\xfe",
    ):
        lock.write_bytes(broken)
        with pytest.raises(HandsignsError, match=r"Take dvc\.lock back") as caught:
            Pipeline(checkout).run("audit")
        assert "\n" not in str(caught.value)
    lock.unlink()
    assert Pipeline(checkout).run("audit") in ("ran", "restored")
    assert lock.read_bytes() == written


def test_locks_of_the_dead_are_no_obstacle(checkout: Project) -> None:
    with held(checkout) as holder:
        holder.send_signal(signal.SIGKILL)
    dead = {"pid": holder.pid, "cmd": "dvc repro"}
    entry = {"write": {str(checkout.root / "artifacts/audit.json"): dead}}
    (checkout.root / ".dvc/tmp/rwlock").write_text(json.dumps(entry))
    assert Pipeline(checkout, lock_timeout=1.0).run("audit") == "ran"


def test_repro_during_a_flow_is_turned_away_and_harms_nothing(checkout: Project) -> None:
    said: list[subprocess.CompletedProcess[str]] = []

    def progress(what: str, done: int, total: int) -> None:
        if not said:
            said.append(
                subprocess.run(
                    [BIN / "dvc", "repro", "audit"],
                    cwd=checkout.root,
                    env=ENVIRONMENT,
                    capture_output=True,
                    text=True,
                )
            )

    assert Pipeline(checkout).run("audit", progress=progress) == "ran"
    assert said[0].returncode != 0
    assert "lock" in said[0].stderr
    assert Pipeline(checkout).run("audit") == "unchanged"


def test_a_flow_waits_for_repro_and_then_finds_its_work_done(checkout: Project) -> None:
    with subprocess.Popen(
        [BIN / "dvc", "repro", "audit"],
        cwd=checkout.root,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        while "Running stage" not in other.stdout.readline():
            assert other.poll() is None
        assert Pipeline(checkout, lock_timeout=120).run("audit") == "unchanged"
        other.stdout.read()
    assert other.returncode == 0


def test_the_sample_is_not_rendered_while_an_import_runs(
    checkout: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.data.directory.WAIT", 0.2)
    before = _photos(checkout)
    pipeline = Pipeline(checkout)
    checkout.local.mkdir(exist_ok=True)
    with FileLock(checkout.data_lock), pytest.raises(BusyError, match="data/ is in use"):
        render(checkout, pipeline)
    assert _photos(checkout) == before


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://bucket/photos", r"could not be pushed to s3://bucket/photos \(.*credentials"),
        ("ssh://h/photos", r"could not be pushed to ssh://h/photos \(.*dvc-ssh"),
        ("foo://x", "HANDSIGNS_DVC_REMOTE_URL"),
    ],
)
def test_a_remote_that_cannot_be_spoken_to_is_told_in_one_line(
    checkout: Project, monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises((ServiceError, DataError), match=told) as caught:
        Pipeline(checkout, Remote(url, {})).push_data()
    assert "\n" not in str(caught.value)

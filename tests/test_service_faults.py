"""Storage, MLflow and Prefect that fail in every way: in time, one line, nothing moved."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.local.clients import check_reachable
from flows.settings import Settings
from tasks.errors import HandsignsError, ServiceError
from tasks.releases.champion import KEY, Champion, Pointer, move_champion, read_champion
from tasks.releases.release import publish, verify
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.faults import Exchange, Proxy, proxy_to
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.servers import MlflowServer
from tests.fixtures.service import named
from tests.fixtures.trained import Trained

SECONDS = 30
"""Longest time in which one question to a service is answered or given up."""


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint_url) as made:
        yield made


def write_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    for name in ("labels.json", "model.keras"):
        (folder / name).write_bytes(name.encode() * 20_000)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("ignored", [("If-None-Match", "If-Match"), ("If-Match",)])
def test_an_endpoint_that_ignores_conditions_is_refused_at_start(
    s3: S3Address, proxy: Proxy, ignored: tuple[str, ...]
) -> None:
    known = {
        "s3_endpoint_url": proxy.url,
        "bucket": s3.bucket,
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
    }
    settings = Settings.model_validate(known)
    check_reachable(settings)
    with (
        proxy.failing(faults.unconditional(Storage(s3), *ignored)),
        pytest.raises(ServiceError, match="does not honour conditional writes") as caught,
    ):
        check_reachable(settings)
    assert f"ignores {' and '.join(ignored)}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(Storage(s3).list("")) == []


BODY, PUT, POINTER = "^GET .*keras", "^PUT ", f"^PUT .*{KEY}"
FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "500": (faults.answering(500, "InternalError"), "500 InternalError"),
    "503": (faults.answering(503, "SlowDown"), "503 SlowDown"),
    "reset": (faults.resetting, "does not answer"),
    "half a body": (faults.on(BODY, faults.halving), "does not answer"),
    "hanging body": (faults.on(BODY, faults.hanging_in_the_body(40)), "does not answer"),
    "changed byte": (faults.on(BODY, faults.flipping), "came back different"),
    "expired": (faults.answering(400, "ExpiredToken"), "refuses the credentials"),
    "clock": (faults.answering(403, "RequestTimeTooSkewed"), "and the clock"),
    "bucket gone": (faults.answering(404, "NoSuchBucket"), "does not exist"),
    "full": (faults.on(PUT, faults.answering(507, "InsufficientStorage")), "507 InsufficientS"),
    "pointer only": (faults.on(POINTER, faults.answering(500, "InternalError")), "500 Internal"),
}


def test_a_failing_storage_is_one_line_in_time_and_the_champion_stays(
    s3: S3Address, tmp_path: Path
) -> None:
    direct = Storage(s3)
    first = publish(direct, write_files(tmp_path / "first"))
    champion = move_champion(direct, None, Pointer(release=first.id, version=1))

    def promote(storage: Storage, folder: Path, expected: Champion) -> None:
        files = write_files(folder)
        files["labels.json"].write_text(folder.name)
        release = verify(storage, publish(storage, files).id)
        move_champion(storage, expected, Pointer(release=release.id, version=2))

    def suffer(name: str) -> tuple[str, float, int]:
        with proxy_to(s3.endpoint_url) as proxy, proxy.failing(FAULTS[name][0]):
            began, storage = time.monotonic(), Storage(replace(s3, endpoint_url=proxy.url))
            with pytest.raises(HandsignsError) as caught:
                promote(storage, tmp_path / name, champion)
            return str(caught.value), time.monotonic() - began, len(proxy.requests)

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        for name, (error, seconds, requests) in zip(FAULTS, pool.map(suffer, FAULTS), strict=True):
            assert FAULTS[name][1] in error, name
            assert "\n" not in error, name
            assert seconds < SECONDS, name
            assert requests < 25, name
    assert read_champion(direct) == champion
    verify(direct, first.id)
    # SeaweedFS makes a missing bucket on the first put of an administrator.
    gone = Storage(replace(s3, bucket=f"{s3.bucket}-gone"))
    with pytest.raises(ServiceError, match="does not exist"):
        publish(gone, write_files(tmp_path / "gone"))
    # And none of it stands in the way once the service is well.
    promote(direct, tmp_path / "well", champion)
    after = read_champion(direct)
    assert after is not None
    assert after.pointer.version == 2


def test_a_failing_registry_is_one_line_in_time() -> None:
    for fault in (faults.answering(500, "INTERNAL_ERROR"), faults.resetting):
        with proxy_to("http://127.0.0.1:9") as proxy, proxy.failing(fault):
            began = time.monotonic()
            with pytest.raises(ServiceError, match="MLflow failed") as caught:
                Registry(proxy.url, "signs").set_alias(CHAMPION, 1)
            assert time.monotonic() - began < SECONDS
            assert "\n" not in str(caught.value)
            assert len(proxy.requests) == 3


@pytest.mark.slow
def test_a_run_that_a_service_failed_is_resumed_without_training_again(
    tmp_path: Path,
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
) -> None:
    repo = trained.checkout(tmp_path / "checkout")
    project = repo.project
    repo.change("training", batch_size=16)  # otherwise nothing would be trained here
    repo.handsigns("import", trained.photos)

    def without_features(exchange: Exchange) -> None:
        (faults.resetting if project.features.exists() else faults.passed)(exchange)

    with (
        proxy_to(prefect_api.url.removesuffix("/api")) as prefect,
        proxy_to(s3.endpoint_url) as storage,
        proxy_to(mlflow_server.url) as registry,
    ):
        services = {
            **named(replace(s3, endpoint_url=storage.url)),
            **mlflow_server.named,
            "MLFLOW_TRACKING_URI": registry.url,
            "HANDSIGNS_MODEL_NAME": "resumed",
            **prefect_api.named,
        }
        gone = {"PREFECT_API_URL": f"{prefect.url}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
        down = faults.on("POST .*/runs/create", faults.answering(503, "DOWN"))
        # MLflow refuses the record, then storage the very last write, the pointer's.
        last = faults.on(f"PUT .*/{KEY}", faults.answering(500, "Internal"))
        failures: list[tuple[Proxy, Callable[[Exchange], None], dict[str, str], str]] = [
            (prefect, without_features, gone, "Prefect"),
            (registry, down, {}, "MLflow"),
            (storage, last, {}, "500 Int"),
        ]
        for proxy, fault, changes, words in failures:
            with proxy.failing(fault):
                failed = repo.handsigns("retrain", code=1, **{**services, **changes})
            assert failed["status"] == "failed"
            assert words in failed["reason"]
            assert read_champion(Storage(s3)) is None
        lock = project.lock.read_bytes()
        report = repo.handsigns("retrain", **services)
    assert report["status"] == "promoted", report["reason"]
    assert report["features"]["computed"] == failed["features"]["computed"] == 0
    assert project.lock.read_bytes() == lock
    champion = read_champion(Storage(s3))
    assert champion is not None
    assert champion.pointer.release == report["release"]["id"]
    known = Registry(mlflow_server.url, "resumed", login=mlflow_server.login)
    assert len(known.versions()) == 1

"""Services that fail, hang or have a private authority; storage that loses, damages or is full."""

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trustme

from flows.local.clients import check_reachable, point_prefect_at
from flows.settings import Settings, load_settings
from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.releases.champion import KEY, Pointer, move_champion, read_champion
from tasks.releases.release import publish, verify
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import ChangedError, S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.checkouts import Trained, make_checkout
from tests.fixtures.faults import Answer, Exchange, Fault, Proxy, one_line, proxy_to
from tests.fixtures.publishing import write_files
from tests.fixtures.servers import MlflowServer, PrefectApi
from tests.fixtures.service import named

SERVERS = ("s3_endpoint_url", "mlflow_tracking_uri", "prefect_api_url")


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint_url) as made:
        yield made


@pytest.fixture
def through(s3: S3Address, proxy: Proxy) -> Storage:
    """The bucket as it is reached through the proxy."""
    return Storage(replace(s3, endpoint_url=proxy.url))


def test_no_key_leads_to_another_place(storage: Storage) -> None:
    for key in ("", "../a", "a/../b", "/a", "a//b", "a/", "."):
        with pytest.raises(ValueError, match="empty or dotted parts"):
            storage.get(key)


def test_a_rival_is_not_a_lost_answer(storage: Storage, proxy: Proxy, through: Storage) -> None:
    with proxy.failing(faults.on("^PUT", faults.losing_the_answer)):
        first = through.put_if_absent("pointer", b"mine")
    assert storage.read("pointer") == (b"mine", first)
    for fault in (faults.passed, faults.on("^PUT", faults.resetting, (1,))):
        with proxy.failing(fault), pytest.raises(ChangedError, match="changed meanwhile"):
            through.put_if_absent("pointer", b"theirs")
    second = through.put_if_match("pointer", b"later", first)
    for key in ("pointer", "nothing"):
        with pytest.raises(ChangedError):
            storage.put_if_match(key, b"third", first)
    assert storage.read("pointer") == (b"later", second)


def test_every_call_has_three_attempts_at_a_complete_answer(s3: S3Address, proxy: Proxy) -> None:
    storage = Storage(replace(s3, endpoint_url=proxy.url), read_seconds=2)
    storage.put("old", b"x" * 1000)
    hanging = faults.breaking_off(after=3)
    for broken in (faults.breaking_off(), faults.breaking_off_the_head, hanging):
        proxy.requests.clear()
        with proxy.failing(faults.on("^GET", broken, (1, 2))):
            assert storage.get("old") == b"x" * 1000
        with proxy.failing(broken), pytest.raises(ServiceError, match="does not answer"):
            storage.get("old")
        assert len(proxy.requests) == 2 * 3
    with proxy.failing(faults.breaking_off_the_head), pytest.raises(ServiceError):
        storage.put("old", b"new")


@pytest.mark.parametrize("ignored", [("If-None-Match", "If-Match"), ("If-Match",)])
def test_an_endpoint_that_ignores_conditions_is_refused_at_start(
    proxy: Proxy, through: Storage, ignored: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(exchange: Exchange) -> None:
        conditional = any(name in exchange.headers for name in ignored)
        (faults.answering(200, ETag='"1"') if conditional else faults.passed)(exchange)

    for name, text in named(through.address).items():
        monkeypatch.setenv(name, text)
    check_reachable(load_settings())
    words = f"ignores {' and '.join(ignored)}: it does not honour conditional writes"
    with proxy.failing(agree), one_line(ServiceError, words):
        check_reachable(load_settings())
    assert through.keys("") == []


BODY, PUT, POINTER = "^GET .*keras", "^PUT ", f"^PUT .*{KEY}"
FAULTS: dict[str, tuple[Fault, str]] = {
    "500": (faults.answering(500, "InternalError"), "500 InternalError"),
    "503": (faults.answering(503, "SlowDown"), "503 SlowDown"),
    "reset": (faults.resetting, "does not answer"),
    "half a body": (faults.on(BODY, faults.breaking_off()), "does not answer"),
    "changed byte": (faults.on(BODY, faults.flipping), "came back different"),
    "expired": (faults.answering(400, "ExpiredToken"), "refuses the credentials"),
    "clock": (faults.answering(403, "RequestTimeTooSkewed"), "and the clock"),
    "bucket gone": (faults.answering(404, "NoSuchBucket"), "does not exist"),
    # SeaweedFS says 500 where its disk is full.
    "full": (faults.on(PUT, faults.answering(500, "InternalError")), "500 Internal.* its disk"),
    "pointer only": (faults.on(POINTER, faults.answering(507, "NoRoom")), "507 NoRoom"),
}


def test_a_failing_storage_is_one_line_and_changes_nothing(s3: S3Address, tmp_path: Path) -> None:
    direct = Storage(s3)

    def release(storage: Storage, folder: Path) -> str:
        files = {path.name: path for path in write_files(folder).iterdir()}
        return verify(storage, publish(storage, files).id).id

    first = release(direct, tmp_path / "first")
    champion = move_champion(direct, None, Pointer(release=first, version=1))

    def promote(storage: Storage, folder: Path) -> None:
        move_champion(storage, champion, Pointer(release=release(storage, folder), version=2))

    def suffer(name: str) -> None:
        fault, words = FAULTS[name]
        with proxy_to(s3.endpoint_url) as proxy, proxy.failing(fault):
            began = time.monotonic()
            with one_line(HandsignsError, words):
                promote(Storage(replace(s3, endpoint_url=proxy.url)), tmp_path / name)
            assert (time.monotonic() - began < 30, len(proxy.requests) < 30) == (True, True), name

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        list(pool.map(suffer, FAULTS))
    # SeaweedFS makes a missing bucket on the first put of an administrator.
    with pytest.raises(ServiceError, match="does not exist"):
        release(Storage(replace(s3, bucket=f"{s3.bucket}-gone")), tmp_path / "gone")
    assert read_champion(direct) == champion
    verify(direct, first)
    # And none of it stands in the way once the service is well.
    promote(direct, tmp_path / "well")


@pytest.mark.slow
def test_a_run_that_a_service_failed_is_resumed_without_training_again(
    tmp_path: Path,
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
) -> None:
    repo = trained.checkout(tmp_path / "checkout")
    repo.change("training", batch_size=16)  # otherwise nothing would be trained here
    repo.handsigns("import", trained.photos)

    def without_features(exchange: Exchange) -> None:
        (faults.resetting if repo.project.features.exists() else faults.passed)(exchange)

    with (
        proxy_to(prefect_api.url.removesuffix("/api")) as prefect,
        proxy_to(s3.endpoint_url) as storage,
        proxy_to(mlflow_server.url) as registry,
    ):
        services = {**named(replace(s3, endpoint_url=storage.url)), **prefect_api.named}
        services |= {**mlflow_server.named, "MLFLOW_TRACKING_URI": registry.url}
        services["HANDSIGNS_MODEL_NAME"] = "resumed"
        gone = {"PREFECT_API_URL": f"{prefect.url}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
        down = faults.on("POST .*/runs/create", faults.answering(503, "DOWN"))
        # MLflow refuses the record, then storage the very last write, the pointer's.
        last = faults.on(POINTER, faults.answering(500, "Internal"))
        for proxy, fault, changes, words in (
            (prefect, without_features, gone, "Prefect"),
            (registry, down, {}, "MLflow"),
            (storage, last, {}, "500 Int"),
        ):
            with proxy.failing(fault):
                failed = repo.handsigns("retrain", code=1, **{**services, **changes})
            assert failed["status"] == "failed"
            assert words in failed["reason"]
            assert read_champion(Storage(s3)) is None
        lock = repo.project.lock.read_bytes()
        report = repo.handsigns("retrain", **services)
    assert report["status"] == "promoted", report["reason"]
    assert report["features"]["computed"] == failed["features"]["computed"] == 0
    assert repo.project.lock.read_bytes() == lock
    assert len(Registry(mlflow_server.url, "resumed", login=mlflow_server.login).versions()) == 1


def test_an_unusable_proxy_is_named_and_strangers_get_no_login(tmp_path: Path) -> None:
    theirs, wrong = dict[str, str](), {"HTTPS_PROXY": "socks://user:sentinel@127.0.0.1:1080/"}
    with one_line(SettingsError, r"^HTTPS_PROXY must be .*socks5://"):
        point_prefect_at("http://127.0.0.1:1/api", tmp_path, Settings(), wrong)
    named = Settings().model_copy(update={"prefect_api_url": "http://theirs/api"})
    point_prefect_at("http://theirs/api", tmp_path, named, theirs)
    assert "PREFECT_API_AUTH_STRING" not in theirs


TRUSTING = [
    ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_SERVER_CERT_PATH"),
    ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_INSECURE_TLS"),
    ("MLFLOW_TRACKING_URI", "REQUESTS_CA_BUNDLE"),
    ("PREFECT_API_URL", "PREFECT_API_SSL_CERT_FILE"),
    ("PREFECT_API_URL", "SSL_CERT_FILE"),
    ("HANDSIGNS_S3_ENDPOINT_URL", "AWS_CA_BUNDLE"),
]


def test_a_private_authority_is_trusted_as_the_services_own_client_does_or_named(
    s3_server: S3Address, tmp_path: Path
) -> None:
    authority, file = trustme.CA(), tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    checkout = make_checkout(tmp_path / "checkout")
    # What a retrain fails at once its services have answered.
    (checkout.project.root / "dvc.yaml").write_text("")

    def healthy(exchange: Exchange) -> None:
        exchange.send(Answer(200, b"{}", {"content-type": "application/json"}))

    with (
        proxy_to(s3_server.endpoint_url) as proxy,
        proxy.failing(faults.on("health$|/mlflow/", healthy)),
    ):
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        url = proxy.url.replace("http:", "https:")

        services = {
            "MLFLOW_TRACKING_URI": {"MLFLOW_TRACKING_URI": url},
            "PREFECT_API_URL": {"PREFECT_API_URL": f"{url}/api"},
            "HANDSIGNS_S3_ENDPOINT_URL": named(replace(s3_server, endpoint_url=url)),
        }
        for service, trusting in [*TRUSTING, *((name, "") for name in services)]:
            value = "true" if "INSECURE" in trusting else str(file)
            changes = services[service] | ({trusting: value} if trusting else {})
            said = checkout.handsigns("retrain", code=1, **changes)["reason"]
            refused = re.search(r"certificate.verify.failed|SSLError", said, re.IGNORECASE)
            assert (bool(refused), "dvc.yaml" in said) == (not trusting, bool(trusting)), said
            assert trusting or service in said


@pytest.mark.parametrize("hangs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_services_that_do_not_answer_are_given_up_in_one_line_within_30_s(hangs: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if hangs:
            taken.listen()
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        url = f"http://{host}"
        storage = Storage(S3Address(url, "artifacts", "us-east-1", "k", "s"))
        settings = [Settings().model_copy(update={name: url}) for name in SERVERS]
        registry = Registry(f"http://user:sentinel-secret@{host}", "hand-signs")
        calls: list[Callable[[], object]] = [
            *(partial(check_reachable, one) for one in settings),
            lambda: storage.get("a"),
            lambda: storage.put_if_absent("a", b""),
            lambda: registry.set_alias(CHAMPION, 1),
        ]
        for call in calls:
            began = time.monotonic()
            with one_line(ServiceError, url):
                call()
            assert time.monotonic() - began < 30

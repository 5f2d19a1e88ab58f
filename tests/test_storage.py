"""Services that fail, hang or have a private authority; storage that loses, damages or is full."""

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

from flows.local import servers
from flows.local.clients import ask, check_reachable, point_prefect_at
from flows.local.processes import Program
from flows.settings import Settings, load_settings
from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.releases.champion import KEY, Pointer, move_champion, read_champion
from tasks.releases.release import publish, verify
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import ChangedError, MissingObjectError, S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.faults import Answer, Exchange, Proxy, proxy_to
from tests.fixtures.photos import write_photos
from tests.fixtures.publishing import write_files
from tests.fixtures.servers import MlflowServer, PrefectApi, new_bucket, running
from tests.fixtures.service import named
from tests.fixtures.trained import Trained

SERVERS = ("s3_endpoint_url", "mlflow_tracking_uri", "prefect_api_url")


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint_url) as made:
        yield made


def publish_new(storage: Storage, folder: Path) -> str:
    """Publish a release like no other; its id."""
    files = write_files(folder, folder.name).iterdir()
    return publish(storage, {one.name: one for one in files}).id


def test_objects_are_written_listed_read_and_removed(
    s3: S3Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):  # must not come between us and a local server
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    storage, below = Storage(s3), Storage(s3, folder="/b/")
    for key, content in (("b/2", b"2"), ("b/10", bytes(range(256))), ("b/empty", b"")):
        storage.put(key, content)
        assert (storage.get(key), storage.get(key, 9)) == (content, content[:9])
    assert [(one.key, one.size) for one in below.list("")] == [("10", 256), ("2", 1), ("empty", 0)]
    assert below.uri("2") == storage.uri("b/2")
    for _ in range(2):
        below.remove("2")
    with pytest.raises(MissingObjectError, match="b/2 does not exist"):
        below.get("2")
    for key in ("", "../a", "a/../b", "/a", "a//b", "a/", "."):
        with pytest.raises(ValueError, match="empty or dotted parts"):
            storage.get(key)


def test_a_conditional_write_replaces_only_what_was_read(storage: Storage) -> None:
    first = storage.put_if_absent("pointer", b"first")
    with pytest.raises(ChangedError, match="changed meanwhile"):
        storage.put_if_absent("pointer", b"second")
    second = storage.put_if_match("pointer", b"second", first)
    for key in ("pointer", "nothing"):
        with pytest.raises(ChangedError):
            storage.put_if_match(key, b"third", first)
    assert storage.read("pointer") == (b"second", second)


def test_a_lost_answer_is_distinguished_from_a_rival(s3: S3Address, proxy: Proxy) -> None:
    storage = Storage(replace(s3, endpoint_url=proxy.url))
    with proxy.failing(faults.on("^PUT", faults.forgetful)):
        etag = storage.put_if_absent("pointer", b"mine")
    assert storage.read("pointer") == (b"mine", etag)
    with proxy.failing(faults.on("^PUT", faults.resetting, times=1)):
        with pytest.raises(ChangedError):
            storage.put_if_absent("pointer", b"theirs")
        assert storage.put_if_match("pointer", b"later", etag) == storage.read("pointer")[1]


def test_every_call_has_three_attempts_and_no_part_passes_for_an_answer(
    s3: S3Address, proxy: Proxy
) -> None:
    storage = Storage(replace(s3, endpoint_url=proxy.url), read_seconds=2)
    storage.put("old", b"x" * 1000)
    for broken in (faults.halving, faults.halving_the_head, faults.hanging_in_the_body(3)):
        proxy.requests.clear()
        with proxy.failing(faults.on("^GET", broken, times=2)):
            assert storage.get("old") == b"x" * 1000
        with proxy.failing(broken), pytest.raises(ServiceError, match="does not answer"):
            storage.get("old")
        assert len(proxy.requests) == 2 * 3
    with proxy.failing(faults.halving_the_head), pytest.raises(ServiceError):
        storage.put("old", b"new")


@pytest.mark.slow
def test_a_body_that_breaks_off_after_9_s_is_read_again(s3: S3Address, proxy: Proxy) -> None:
    content = bytes(1 << 20)
    Storage(s3).put("old", content)
    with proxy.failing(faults.on("^GET", faults.hanging_in_the_body(9, parts=30), times=1)):
        assert Storage(replace(s3, endpoint_url=proxy.url)).get("old") == content
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("ignored", [("If-None-Match", "If-Match"), ("If-Match",)])
def test_an_endpoint_that_ignores_conditions_is_refused_at_start(
    s3: S3Address, proxy: Proxy, ignored: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in named(replace(s3, endpoint_url=proxy.url)).items():
        monkeypatch.setenv(name, text)
    check_reachable(load_settings())
    with (
        proxy.failing(faults.unconditional(Storage(s3), *ignored)),
        pytest.raises(ServiceError, match="does not honour conditional writes") as caught,
    ):
        check_reachable(load_settings())
    assert f"ignores {' and '.join(ignored)}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Storage(s3).keys("") == []


BODY, PUT, POINTER = "^GET .*keras", "^PUT ", f"^PUT .*{KEY}"
FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "500": (faults.answering(500, "InternalError"), "500 InternalError"),
    "503": (faults.answering(503, "SlowDown"), "503 SlowDown"),
    "reset": (faults.resetting, "does not answer"),
    "half a body": (faults.on(BODY, faults.halving), "does not answer"),
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
    first = publish_new(direct, tmp_path / "first")
    champion = move_champion(direct, None, Pointer(release=first, version=1))

    def promote(storage: Storage, folder: Path) -> None:
        release = verify(storage, publish_new(storage, folder))
        move_champion(storage, champion, Pointer(release=release.id, version=2))

    def suffer(name: str) -> None:
        with proxy_to(s3.endpoint_url) as proxy, proxy.failing(FAULTS[name][0]):
            began = time.monotonic()
            with pytest.raises(HandsignsError, match=FAULTS[name][1]) as caught:
                promote(Storage(replace(s3, endpoint_url=proxy.url)), tmp_path / name)
            assert "\n" not in str(caught.value), name
            assert time.monotonic() - began < 30, name
            assert len(proxy.requests) < 30, name

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        list(pool.map(suffer, FAULTS))
    # SeaweedFS makes a missing bucket on the first put of an administrator.
    with pytest.raises(ServiceError, match="does not exist"):
        publish_new(Storage(replace(s3, bucket=f"{s3.bucket}-gone")), tmp_path / "gone")
    assert read_champion(direct) == champion
    verify(direct, first)
    # And none of it stands in the way once the service is well.
    promote(direct, tmp_path / "well")
    after = read_champion(direct)
    assert after is not None
    assert after.pointer.version == 2


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
    champion = read_champion(Storage(s3))
    assert champion is not None
    assert champion.pointer.release == report["release"]["id"]
    assert len(Registry(mlflow_server.url, "resumed", login=mlflow_server.login).versions()) == 1


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
    with seaweedfs(tmp_path / "store", free=1) as address:
        bucket = new_bucket(address).bucket
        storage = Storage(replace(address, bucket=bucket))
        first = publish_new(storage, tmp_path / "first")
        champion = move_champion(storage, None, Pointer(release=first, version=1))
        kept = list(storage.list(""))

    with seaweedfs(tmp_path / "store", free=100) as address:
        storage = Storage(replace(address, bucket=bucket))
        for write in (
            lambda: publish_new(storage, tmp_path / "second"),
            lambda: move_champion(storage, champion, Pointer(release=first, version=2)),
        ):
            began = time.monotonic()
            with pytest.raises(ServiceError, match=r"500 InternalError .* its disk"):
                write()
            assert time.monotonic() - began < 30
        assert read_champion(storage) == champion
        assert list(storage.list("")) == kept
        verify(storage, first)


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
    assert repo.handsigns("import", more)["taken"]["train"] == dict.fromkeys("012345", 2)


def test_logins_go_to_the_local_server_only_and_an_unusable_proxy_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pointed(api: str, **environment: str) -> dict[str, str]:
        point_prefect_at(api, tmp_path, load_settings(), environment)
        return environment

    with pytest.raises(SettingsError, match=r"^HTTPS_PROXY must be .*socks5://") as caught:
        pointed("http://127.0.0.1:1/api", HTTPS_PROXY="socks://user:secret@127.0.0.1:1080/")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:ours")
    assert pointed("http://127.0.0.1:1/api")["PREFECT_API_AUTH_STRING"] == "admin:ours"
    monkeypatch.setenv("PREFECT_API_URL", "http://theirs/api")
    assert "PREFECT_API_AUTH_STRING" not in pointed("http://theirs/api")


@pytest.fixture(scope="module")
def private(s3_server: S3Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Services with certificates of a private authority: `reason(service, **environment)`.

    It is why a retrain fails, which is its `dvc.yaml` once the service has answered.
    """
    authority = trustme.CA()
    folder = tmp_path_factory.mktemp("private")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    checkout = make_checkout(folder / "checkout")
    (checkout.project.root / "dvc.yaml").write_text("")

    def healthy(exchange: Exchange) -> None:
        exchange.send(Answer(200, "OK", [("content-type", "application/json")], b"true"))

    with proxy_to(s3_server.endpoint_url) as proxy:
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        proxy.fault = faults.on("/health$", healthy)
        url = proxy.url.replace("http:", "https:")
        services = {
            "MLFLOW_TRACKING_URI": {"MLFLOW_TRACKING_URI": url},
            "PREFECT_API_URL": {"PREFECT_API_URL": f"{url}/api"},
            "HANDSIGNS_S3_ENDPOINT_URL": named(replace(s3_server, endpoint_url=url)),
        }

        def reason(service: str, **environment: str) -> Any:
            known = {
                k: v.replace("FILE", f"{folder}/authority.pem") for k, v in environment.items()
            }
            return checkout.handsigns("retrain", code=1, **services[service], **known)["reason"]

        yield reason


@pytest.mark.parametrize(
    ("service", "trusting", "value"),
    [
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_SERVER_CERT_PATH", "FILE"),
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_INSECURE_TLS", "true"),
        ("MLFLOW_TRACKING_URI", "REQUESTS_CA_BUNDLE", "FILE"),
        ("PREFECT_API_URL", "PREFECT_API_SSL_CERT_FILE", "FILE"),
        ("PREFECT_API_URL", "SSL_CERT_FILE", "FILE"),
        ("HANDSIGNS_S3_ENDPOINT_URL", "AWS_CA_BUNDLE", "FILE"),
    ],
)
def test_a_private_authority_is_trusted_as_the_services_own_client_does(
    private: Any, service: str, trusting: str, value: str
) -> None:
    assert "dvc.yaml" in private(service, **{trusting: value})


def test_an_unknown_authority_is_named(private: Any) -> None:
    for service in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HANDSIGNS_S3_ENDPOINT_URL"):
        reason = private(service)
        assert re.search(r"certificate.verify.failed|SSLError", reason, re.IGNORECASE)
        assert service in reason


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
            with pytest.raises(ServiceError, match=url) as caught:
                call()
            assert time.monotonic() - began < 30
            assert not any(word in str(caught.value) for word in ("\n", "sentinel"))

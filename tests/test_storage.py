"""Objects in S3: conditional writes, damaged answers, and services that do not answer."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ServiceError
from tasks.services.s3 import ChangedError, MissingObjectError, S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.faults import Proxy, proxy_to


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint_url) as made:
        yield made


def test_objects_are_written_listed_read_and_removed(
    s3: S3Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):  # must not come between us and a local server
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    storage, content = Storage(s3), bytes(range(256)) * 5000
    (tmp_path / "model.keras").write_bytes(content)
    storage.put("a/model.keras", tmp_path / "model.keras")
    for key, text in (("b/2", b"2"), ("b/10", b"1"), ("b/empty", b"")):
        storage.put(key, text)
    assert storage.get("a/model.keras") == content
    assert storage.get("a/model.keras", 9) == content[:9]
    assert storage.get("b/empty") == b""
    assert [(one.key, one.size) for one in storage.list("b/")] == [
        ("b/10", 1),
        ("b/2", 1),
        ("b/empty", 0),
    ]
    below = Storage(s3, folder="/b/")
    assert (below.get("2"), below.keys("1"), below.uri("2")) == (b"2", ["10"], storage.uri("b/2"))
    for _ in range(2):
        below.remove("2")
    with pytest.raises(MissingObjectError, match="b/2 does not exist"):
        storage.get("b/2")
    for key in ("", "../a", "a/../b", "/a", "a//b", "a/", "."):
        with pytest.raises(ValueError, match="empty or dotted parts"):
            storage.get(key)


def test_a_missing_bucket_and_wrong_credentials_are_named(s3: S3Address) -> None:
    elsewhere = Storage(replace(s3, bucket="no-such-bucket"))
    for call in (elsewhere.check, lambda: elsewhere.keys(""), lambda: elsewhere.get("a")):
        with pytest.raises(ServiceError, match=r"bucket s3://no-such-bucket/.* does not exist"):
            call()
    wrong = replace(s3, secret_access_key="sentinel-secret")
    for address in (wrong, replace(wrong, access_key_id="sentinel-key")):
        with pytest.raises(ServiceError, match="refuses the credentials") as caught:
            Storage(address).put("a", b"")
        assert "sentinel" not in str(caught.value) + repr(address)


def test_a_conditional_write_replaces_only_what_was_read(storage: Storage) -> None:
    first = storage.put_if_absent("pointer", b"first")
    with pytest.raises(ChangedError, match="changed meanwhile"):
        storage.put_if_absent("pointer", b"second")
    second = storage.put_if_match("pointer", b"second", first)
    for key in ("pointer", "nothing"):
        with pytest.raises(ChangedError):
            storage.put_if_match(key, b"third", first)
    assert storage.read("pointer") == (b"second", second)

    def attempt(rival: int) -> int | None:
        try:
            storage.put_if_match("pointer", f"rival {rival}".encode(), second)
        except ChangedError:
            return None
        return rival

    with ThreadPoolExecutor(6) as pool:
        (winner,) = [rival for rival in pool.map(attempt, range(6)) if rival is not None]
    assert storage.get("pointer") == f"rival {winner}".encode()


def _given_up(listener: socket.socket, call: Callable[[Storage], Any]) -> float:
    """Seconds after which a call fails in one line that names the service."""
    url, began = f"http://127.0.0.1:{listener.getsockname()[1]}", time.monotonic()
    with pytest.raises(ServiceError, match=url) as caught:
        call(Storage(S3Address(url, "artifacts", "us-east-1", "k", "s")))
    assert "\n" not in str(caught.value)
    return time.monotonic() - began


@pytest.mark.parametrize("hangs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_service_that_does_not_answer_is_one_line_within_30_s(hangs: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            listener.listen()
        for call in (lambda s: s.get("a"), lambda s: s.put_if_absent("a", b""), Storage.check):
            assert 15 * hangs < _given_up(listener, call) < 30


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
def test_a_body_that_breaks_off_late_is_read_again(s3: S3Address, proxy: Proxy) -> None:
    """The first attempt takes longer than all of them together once were allowed."""
    content = bytes(1 << 20)
    Storage(s3).put("old", content)
    with proxy.failing(faults.on("^GET", faults.hanging_in_the_body(9, parts=30), times=1)):
        assert Storage(replace(s3, endpoint_url=proxy.url)).get("old") == content
    assert len(proxy.requests) == 2

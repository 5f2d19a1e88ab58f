import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ServiceError
from tasks.services.s3 import (
    ChangedError,
    MissingObjectError,
    S3Address,
    Storage,
    StoredObject,
    check_key,
)
from tests.fixtures import faults
from tests.fixtures.faults import Proxy, proxy_to


def test_what_is_put_comes_back(storage: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    source = tmp_path / "model.keras"
    source.write_bytes(content)
    storage.put("a/model.keras", source)
    storage.put("a/empty", b"")
    assert storage.get("a/model.keras") == content
    assert storage.get("a/empty") == b""
    assert storage.digest("a/model.keras") == (sha256(content).hexdigest(), len(content))
    assert storage.download("a/model.keras", tmp_path / "copy") == storage.digest("a/model.keras")
    assert (tmp_path / "copy").read_bytes() == content
    with pytest.raises(MissingObjectError):
        storage.get("a/other")


def test_a_proxy_does_not_come_between_us_and_a_local_server(
    s3: S3Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    Storage(s3).put("a", b"")


def test_a_listing_is_sorted_and_knows_sizes(storage: Storage) -> None:
    for key in ("b/2", "b/10", "a/1"):
        storage.put(key, key.encode())
    assert list(storage.list("b/")) == [StoredObject("b/10", 4), StoredObject("b/2", 3)]
    assert list(storage.list("nothing/")) == []


def test_a_missing_object_is_told_from_a_missing_bucket(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="a/b does not exist"):
        storage.get("a/b")
    with pytest.raises(MissingObjectError):
        storage.download("a/b", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    elsewhere = Storage(replace(storage.address, bucket="no-such-bucket"))
    with pytest.raises(ServiceError, match=r"bucket s3://no-such-bucket/.* does not exist"):
        elsewhere.check()
    with pytest.raises(ServiceError, match="does not exist"):
        list(elsewhere.list(""))


def test_wrong_credentials_are_told_without_showing_them(s3: S3Address) -> None:
    wrong = replace(s3, secret_access_key="sentinel-secret")
    for address in (wrong, replace(wrong, access_key_id="sentinel-key")):
        with pytest.raises(ServiceError, match="refuses the credentials") as caught:
            Storage(address).put("a", b"")
        assert "sentinel" not in str(caught.value)
        assert "sentinel" not in repr(address)


def test_put_if_absent_never_replaces(storage: Storage) -> None:
    etag = storage.put_if_absent("pointer", b"first")
    with pytest.raises(ChangedError, match="changed meanwhile"):
        storage.put_if_absent("pointer", b"second")
    assert storage.read("pointer") == (b"first", etag)


def test_put_if_match_replaces_only_what_was_read(storage: Storage) -> None:
    first = storage.put_if_absent("pointer", b"first")
    second = storage.put_if_match("pointer", b"second", first)
    with pytest.raises(ChangedError):
        storage.put_if_match("pointer", b"third", first)
    with pytest.raises(ChangedError):
        storage.put_if_match("nothing", b"third", first)
    assert storage.read("pointer") == (b"second", second)
    with pytest.raises(MissingObjectError):
        storage.get("nothing")


def test_of_many_rivals_exactly_one_wins(storage: Storage) -> None:
    etag = storage.put_if_absent("pointer", b"start")

    def attempt(rival: int) -> int | None:
        try:
            storage.put_if_match("pointer", f"rival {rival}".encode(), etag)
        except ChangedError:
            return None
        return rival

    with ThreadPoolExecutor(6) as pool:
        winners = [rival for rival in pool.map(attempt, range(6)) if rival is not None]
    assert len(winners) == 1
    assert storage.get("pointer") == f"rival {winners[0]}".encode()


@given(st.text(max_size=40))
def test_a_key_is_plain_names_joined_by_slashes_or_refused(key: str) -> None:
    parts = key.split("/")
    plain = all(
        part
        and part[0] not in "._-"
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in part)
        for part in parts
    )
    if plain:
        assert check_key(key) == key
    else:
        with pytest.raises(ValueError, match="plain names"):
            check_key(key)


def test_a_key_that_leaves_its_folder_never_reaches_the_service() -> None:
    nobody = Storage(S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "k", "s"))
    for key in ("../a", "a/../b", "/a", "a//b", "a\nb", ".hidden", "a" * 513):
        with pytest.raises(ValueError, match="plain names"):
            nobody.get(key)


def test_a_dead_endpoint_is_named_in_one_line_within_30_s() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ServiceError, match=url) as caught:
            Storage(S3Address(url, "artifacts", "us-east-1", "k", "s")).check()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_hanging_endpoint_is_given_up_within_30_s() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ServiceError, match=url):
            Storage(S3Address(url, "artifacts", "us-east-1", "k", "s")).get("a")
    assert 15 < time.monotonic() - started < 30


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint_url) as made:
        yield made


def through(proxy: Proxy, address: S3Address, **options: float) -> Storage:
    return Storage(replace(address, endpoint_url=proxy.url), **options)


def test_a_lost_answer_is_told_from_a_rival(s3: S3Address, proxy: Proxy) -> None:
    storage = through(proxy, s3)
    with proxy.failing(faults.on("^PUT", faults.forgetful, times=2)):
        etag = storage.put_if_absent("pointer", b"mine")
    assert storage.read("pointer") == (b"mine", etag)
    with (
        proxy.failing(faults.on("^PUT", faults.resetting, times=1)),
        pytest.raises(ChangedError),
    ):
        storage.put_if_absent("pointer", b"theirs")


def test_a_body_that_breaks_off_is_read_again(s3: S3Address, proxy: Proxy, tmp_path: Path) -> None:
    storage = through(proxy, s3)
    storage.put("a", b"x" * 1000)
    with proxy.failing(faults.on("^GET", faults.halving, times=2)):
        assert storage.get("a") == b"x" * 1000
    target = tmp_path / "model.keras"
    target.write_bytes(b"old")
    with proxy.failing(faults.halving), pytest.raises(ServiceError, match="does not answer"):
        storage.download("a", target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_answer_that_breaks_off_in_its_head_is_not_taken_for_an_empty_one(
    s3: S3Address, proxy: Proxy
) -> None:
    storage = through(proxy, s3)
    storage.put("old", b"content")
    with proxy.failing(faults.halving_the_head):
        for ask in (storage.get, storage.digest, lambda key: storage.put(key, b"new")):
            with pytest.raises(ServiceError, match="does not answer"):
                ask("old")
    with proxy.failing(faults.on("^GET", faults.halving_the_head, times=2)):
        assert storage.get("old") == b"new"


@pytest.mark.slow
def test_a_body_that_breaks_off_late_is_read_again(
    s3: S3Address, proxy: Proxy, tmp_path: Path
) -> None:
    """Each attempt takes longer than all of them together once were allowed."""
    content = bytes(1 << 20)
    Storage(s3).put("old", content)
    with proxy.failing(faults.on("^GET", faults.slowing(9, breaking_off=True), times=1)):
        assert through(proxy, s3).download("old", tmp_path / "copy")[1] == len(content)
    assert len(proxy.requests) == 2


def test_every_call_has_three_attempts(s3: S3Address, proxy: Proxy) -> None:
    Storage(s3).put("old", b"content")
    storage = through(proxy, s3, read_seconds=0.5)
    hang = faults.hanging_in_the_body(1)
    with proxy.failing(faults.on("^GET", hang, times=2)):
        assert storage.get("old") == b"content"
    assert len(proxy.requests) == 3
    with proxy.failing(hang), pytest.raises(ServiceError, match="does not answer"):
        storage.get("old")
    assert len(proxy.requests) == 6

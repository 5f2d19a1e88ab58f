"""`handsigns serve` as a process, with real releases in real storage."""

import asyncio
import base64
import http.client
import json
import re
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.exceptions import HTTPException

from benchmarks.load import drive, resident
from flows.local.stack import SharedStorage, embedded
from flows.serve.limits import IN_FLIGHT, ScoringPool
from flows.settings import Settings
from tasks.errors import ReleaseError
from tasks.project import Project
from tasks.releases.release import Release
from tasks.releases.signing import Trust
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import BIN
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.servers import new_bucket
from tests.fixtures.service import Service, grey, named, point, publish_graph, serving

JSON = {"content-type": "application/json"}
TOKEN = "a token of sixteen or more"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for this file's checkouts."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def bucket(s3_server: S3Address) -> S3Address:
    """A bucket for this file's tests."""
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def first(bucket: S3Address, graphs: tuple[bytes, bytes], place: Path) -> Release:
    """A champion in the shared bucket."""
    storage = Storage(bucket)
    release = publish_graph(storage, place / "first", graphs[0])
    point(storage, release.id, 1)
    return release


@pytest.fixture(scope="module")
def service(bucket: S3Address, first: Release, place: Path) -> Iterator[Service]:
    """A service without a limit that a test could meet."""
    rate = {"HANDSIGNS_SERVE_RATE": "1000000/minute"}
    with serving(place / "service", **named(bucket), **rate) as running:
        yield running


def test_every_form_of_a_request_gets_the_same_reading(service: Service, first: Release) -> None:
    for sign in range(6):
        photo = grey(sign)
        form = service.predict(photo)
        image = base64.b64encode(photo).decode()
        plain = service.client.post("/predict", json={"image": image})
        assert form.status_code == plain.status_code == 200
        bare = service.client.post("/predict", content=photo, headers={"content-type": "image/png"})
        url = service.client.post("/predict", json={"image": f"data:image/png;base64,{image}"})
        assert form.json() == plain.json() == bare.json() == url.json()
        assert form.json()["label"] == str(sign)
        assert sum(form.json()["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert form.json()["model"]["version"] == 1
    assert form.json()["model"]["release"] == first.id


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format_that_import_takes_is_read(service: Service, kind: str) -> None:
    assert service.predict(grey(2, kind)).json()["label"] == "2"


def test_health_tells_version_release_age_and_state(service: Service, first: Release) -> None:
    told = service.health()
    assert told["state"] == "ready"
    assert told["model"]["release"] == first.id
    assert told["model"]["promoted_at"] == "2026-11-22T12:00:01+00:00"
    assert told["age_seconds"] > 0
    assert told["problem"] is None


def test_health_answers_those_who_ask_for_no_body(service: Service) -> None:
    answer = service.client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def _animation() -> bytes:
    file = BytesIO()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _header_of(width: int, height: int) -> bytes:
    whole = bytearray(grey(1))
    whole[16:24] = width.to_bytes(4) + height.to_bytes(4)
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4)
    return bytes(whole)


BAD: dict[str, tuple[int, str, dict[str, Any]]] = {
    "text": (415, "not an image", {"files": {"file": ("a.png", b"just words")}}),
    "empty": (422, "zero bytes", {"files": {"file": ("a.png", b"")}}),
    "half": (422, "truncated|damaged", {"files": {"file": ("a.png", grey(1)[:90])}}),
    "small": (422, "too small", {"files": {"file": ("a.png", grey(1, side=8))}}),
    "animated": (422, "animated", {"files": {"file": ("a.gif", _animation())}}),
    "a bomb": (422, "too many pixels", {"files": {"file": ("a", _header_of(9000, 9000))}}),
    "no file": (400, "'file'", {"files": {"photo": ("a.png", grey(1))}}),
    "a field": (400, "'file'", {"data": {"file": "x"}, "files": {"b": ("a", b"")}}),
    "two files": (400, "files", {"files": [("file", ("a", b"a")), ("file", ("b", b"b"))]}),
    "no form": (400, ".", {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}),
    "text body": (415, "text/plain", {"content": b"a", "headers": {"content-type": "text/plain"}}),
    "nothing": (415, "sent as ''", {}),
    "JSON cut off": (422, "base64", {"content": b'{"image": ""', "headers": JSON}),
    "JSON nested": (422, "nothing else", {"content": b"[" * 100_000, "headers": JSON}),
    "JSON latin": (422, "base64", {"content": b'{"image": "\xe4"}', "headers": JSON}),
    "JSON list": (422, "nothing else", {"json": ["image"]}),
    "JSON more": (422, "nothing else", {"json": {"image": "", "label": 2}}),
    "JSON number": (422, "nothing else", {"json": {"image": 12}}),
    "JSON other": (422, "nothing else", {"json": {"photo": "AAAA"}}),
    "JSON no base64": (422, "base64", {"json": {"image": "%%%%"}}),
    "JSON no photo": (415, "not an image", {"json": {"image": "AAAA"}}),
    "too large": (413, "larger than 10 MB", {"content": bytes(10 * 2**20 + 1), "headers": JSON}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_gets_a_clear_refusal(service: Service, name: str) -> None:
    status, reason, request = BAD[name]
    answer = service.client.post("/predict", **request)
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert re.search(reason, error)
    assert answer.json().keys() == {"error"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=300), st.sampled_from([b"", grey(1)[:60], b"GIF89a", b"\xff\xd8\xff\xe0"])
)
def test_whatever_is_uploaded_the_answer_is_a_refusal(
    service: Service, content: bytes, start: bytes
) -> None:
    answer = service.predict(start + content)
    assert 400 <= answer.status_code < 500
    assert answer.json().keys() == {"error"}


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(service: Service) -> None:
    line = http.client.HTTPConnection(
        str(service.client.base_url.host), service.client.base_url.port
    )
    line.putrequest("POST", "/predict")
    line.putheader("Content-Type", "application/json")
    line.putheader("Content-Length", str(2**40))
    line.endheaders()
    answer = line.getresponse()
    assert answer.status == 413
    assert "10 MB" in json.loads(answer.read())["error"]
    line.close()


def test_an_endless_body_is_refused_at_the_limit(service: Service) -> None:
    port = service.client.base_url.port or 0
    with socket.create_connection(("127.0.0.1", port)) as line:
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(161):  # of 64 KB each, and no end
            line.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    assert service.metric('handsigns_requests_total{method="POST",path="/predict",status="413"}')


def test_nothing_on_the_page_comes_from_elsewhere(service: Service) -> None:
    page = service.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("", "page.css", "page.js", "icon.svg"):
        answer = service.client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(src|href|url|import)[^\n]{0,3}[\"'(]\s*(https?:)?//", answer.text)


def test_the_examples_are_rendered_hands_that_can_be_read(service: Service) -> None:
    for label in range(6):
        picture = service.client.get(f"/examples/{label}.png")
        assert Image.open(BytesIO(picture.content)).size == (64, 64)
        assert service.predict(picture.content).status_code == 200
    missing = service.client.get("/examples/6.png")
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found"})


def test_openapi_names_both_forms_of_a_question_and_every_refusal(service: Service) -> None:
    told = service.client.get("/openapi.json").json()
    predict = told["paths"]["/predict"]["post"]
    forms = {"multipart/form-data", "application/json", "image/*"}
    assert set(predict["requestBody"]["content"]) == forms
    assert {"200", "401", "413", "415", "422", "429", "503"} <= set(predict["responses"])
    assert service.client.get("/docs").status_code == 404


def test_prometheus_can_ask_for_everything_that_is_counted(
    service: Service, first: Release
) -> None:
    predicted = 'handsigns_predictions_total{label="4"}'
    answered = 'handsigns_requests_total{method="POST",path="/predict",status="200"}'
    before = service.metric(predicted), service.metric(answered)
    service.predict(grey(4))
    assert (service.metric(predicted), service.metric(answered)) == (before[0] + 1, before[1] + 1)
    assert service.metric(f'handsigns_model_info{{release="{first.id}",version="1"}}') == 1
    assert service.metric('handsigns_request_seconds_bucket{le="+Inf",path="/predict"}') > 0
    assert service.metric("handsigns_follow_problem") == 0
    assert service.metric("process_resident_memory_bytes") > 0


def test_many_clients_with_bad_uploads_among_them_meet_no_failure(service: Service) -> None:
    url = str(service.client.base_url)
    asyncio.run(drive(url, 16, 1))
    before = resident(url)
    tally = asyncio.run(drive(url, 16, 5))
    assert tally.unexpected == []
    assert tally.statuses["200"] > 20
    assert {"413", "415", "422"} <= tally.statuses.keys()
    assert resident(url) - before < 60


def test_who_asks_too_often_is_told_when_to_come_back(
    bucket: S3Address, first: Release, place: Path
) -> None:
    limits = {"HANDSIGNS_SERVE_RATE": "3/minute", "HANDSIGNS_SERVE_TOKEN": TOKEN}
    with serving(place / "limited", "--model", "champion", **named(bucket), **limits) as service:
        wrong = {"Authorization": f"Bearer {TOKEN}s"}
        answers = [service.predict(grey(1), headers=sent) for sent in ({}, wrong, wrong, wrong)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
        assert answers[0].headers["www-authenticate"] == "Bearer"
        # Wrong tokens use up nothing of the right one's rate.
        known = {"Authorization": f"Bearer {TOKEN}"}
        for _ in range(3):
            assert service.predict(grey(1), headers=known).status_code == 200
        refused = service.predict(grey(1), headers=known)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        # Another address that the client claims does not help.
        forged = {**known, "X-Forwarded-For": "192.0.2.7"}
        assert service.predict(grey(1), headers=forged).status_code == 429
        assert service.health()["state"] == "ready"
        command = Path(f"/proc/{service.process.pid}/cmdline").read_bytes()
        assert TOKEN.encode() not in command
        assert TOKEN not in service.log.read_text()


def _soon(seen: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < ends, "it never came to pass"
        time.sleep(0.1)


def test_it_waits_for_a_champion_follows_it_and_refuses_a_damaged_one(
    s3: S3Address, storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    with serving(tmp_path / "checkout", **named(s3)) as service:
        assert service.client.get("/health").status_code == 503
        assert service.health()["state"] == "waiting"
        early = service.predict(grey(1))
        assert early.status_code == 503
        assert "no champion yet" in early.json()["error"]
        assert service.client.get("/").status_code == 200

        one = publish_graph(storage, tmp_path / "one", graphs[0])
        point(storage, one.id, 1)
        _soon(lambda: service.health()["state"] == "ready")
        assert service.predict(grey(1)).json()["label"] == "1"

        two = publish_graph(storage, tmp_path / "two", graphs[1])
        point(storage, two.id, 2)
        labels = []  # somebody asks all the while, and never meets a gap
        while not labels or labels[-1] != ("4", 2):
            answer = service.predict(grey(1))
            assert answer.status_code == 200
            labels.append((answer.json()["label"], answer.json()["model"]["version"]))
        assert set(labels) <= {("1", 1), ("4", 2)}

        three = publish_graph(storage, tmp_path / "three", graphs[0] + b"\x0a\x00")
        torn = bytearray(storage.get(f"releases/{three.id}/model.pb"))
        torn[100] ^= 1
        storage.put(f"releases/{three.id}/model.pb", bytes(torn))
        point(storage, three.id, 3)
        _soon(lambda: service.health()["state"] == "behind")
        told = service.health()
        assert "differs from its digest" in told["problem"]
        assert told["model"]["version"] == 2
        assert service.predict(grey(1)).json()["label"] == "4"
        assert service.metric("handsigns_follow_problem") == 1
        assert service.metric('handsigns_follow_failures_total{kind="release"}') >= 1
        assert "Still serving the champion, version 2" in service.log.read_text()

        point(storage, one.id, 4)
        _soon(lambda: service.health()["state"] == "ready")
        assert service.predict(grey(1)).json()["label"] == "1"


def test_idle_connections_do_not_keep_others_out(service: Service) -> None:
    port = service.client.base_url.port or 0
    with ExitStack() as stack:
        for number in range(300):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number % 2:
                line.sendall(b"GET /health HTTP/1.1\r\n")  # and never the rest of it
        assert service.predict(grey(1)).status_code == 200


def test_a_photo_of_many_pixels_takes_little_memory_and_does_not_hold_up_others(
    service: Service,
) -> None:
    file = BytesIO()
    Image.new("RGB", (7000, 7000), (4 * 51,) * 3).save(file, "PNG")
    url = str(service.client.base_url)
    service.predict(grey(1))
    before = resident(url)
    with ThreadPoolExecutor(3) as clients:
        large = [clients.submit(service.predict, file.getvalue()) for _ in range(3)]
        peak, others = 0.0, 0
        while not all(one.done() for one in large):
            assert service.predict(grey(2)).json()["label"] == "2"
            others += 1
            peak = max(peak, resident(url))
    assert [one.result().json()["label"] for one in large] == ["4"] * 3
    assert peak - before < 500
    assert others > 3


def test_nested_json_does_not_hold_up_others(service: Service) -> None:
    content = b'{"image": [' + b"[[],[]]," * 1_250_000 + b"0]}"
    started = time.monotonic()
    json.loads(content)
    parsing = time.monotonic() - started
    with ThreadPoolExecutor(1) as clients:
        nested = clients.submit(service.client.post, "/predict", content=content, headers=JSON)
        slowest = 0.0
        while not nested.done():
            started = time.monotonic()
            assert service.client.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
    assert nested.result().status_code == 422
    assert slowest < parsing / 2


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "LOCALHOST:8000"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
    ],
)
def test_pages_of_other_sites_reach_no_service_that_asks_for_no_token(
    service: Service, header: dict[str, str], status: int
) -> None:
    answer = service.predict(grey(1), headers=header)
    assert answer.status_code == status
    assert service.client.get("/", headers=header).status_code == status
    if status == 403:
        assert "HANDSIGNS_SERVE_TOKEN" in answer.json()["error"]


def test_a_request_under_way_is_answered_before_it_stops(
    bucket: S3Address, first: Release, place: Path
) -> None:
    with serving(place / "stopped", **named(bucket)) as service:
        body = json.dumps({"image": base64.b64encode(grey(3)).decode()}).encode()
        port = service.client.base_url.port
        with socket.create_connection(("127.0.0.1", port or 0)) as line:
            head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:10])
            time.sleep(0.3)
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            line.sendall(body[10:])
            answer = line.makefile("rb").read()
        assert b"200 OK" in answer
        assert b'"label":"3"' in answer
        assert service.process.wait(15) == 0
        assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "HANDSIGNS_SERVE_TOKEN must be set"),
        (["--host", "::"], "HANDSIGNS_SERVE_TOKEN must be set"),
        (["--host", "203.0.113.1"], "HANDSIGNS_SERVE_TOKEN must be set"),
    ],
)
def test_an_address_that_others_reach_is_refused_without_a_token(
    words: list[str], told: str, tmp_path: Path
) -> None:
    assert told in _refusal(tmp_path, *words)


def test_a_host_that_has_no_name_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "not a host name" in _refusal(tmp_path, "--host", ".bad.")


def test_an_address_in_use_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in _refusal(tmp_path, "--port", str(taken.getsockname()[1]))


def _refusal(folder: Path, *words: str) -> str:
    (folder / "dvc.yaml").write_bytes((CHECKOUT.root / "dvc.yaml").read_bytes())
    command = [BIN / "handsigns", "serve", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_full_queue_says_when_to_come_back() -> None:
    async def crowd() -> HTTPException:
        pool = ScoringPool()
        async with AsyncExitStack() as stack:
            for _ in range(IN_FLIGHT):
                await stack.enter_async_context(pool.place())
            with pytest.raises(HTTPException) as caught:
                await stack.enter_async_context(pool.place())
        async with pool.place():
            pass
        pool.close()
        return caught.value

    refused = asyncio.run(crowd())
    assert refused.status_code == 503
    assert refused.headers == {"Retry-After": "1"}


def test_the_local_server_is_opened_for_what_was_written_and_let_go(tmp_path: Path) -> None:
    project = Project(tmp_path)
    shared = SharedStorage(Settings(), project, Trust())
    with embedded(Settings(), project) as services:
        Storage(services.s3()).put("one", b"1")
        with shared.opened() as storage:  # another run's server will do
            assert storage is not None
            assert storage.get("one") == b"1"
    with shared.opened():  # that server may have written notes of its own as it stopped
        pass
    with shared.opened() as storage:
        assert storage is None
    with embedded(Settings(), project) as services:
        Storage(services.s3()).put("two", b"2")
    with shared.opened() as storage:
        assert storage is not None
        assert storage.get("two") == b"2"
    with shared.opened() as storage:
        assert storage is None
    with pytest.raises(ReleaseError), shared.opened(again=True):
        raise ReleaseError("what was read is refused")
    with shared.opened() as storage:
        assert storage is None
    with pytest.raises(OSError, match="full"), shared.opened(again=True):
        raise OSError("the disk is full")
    with embedded(Settings(), project) as services:
        Storage(services.s3()).put("three", b"3")
    with pytest.raises(OSError, match="full"), shared.opened():
        raise OSError("the disk is full")
    with shared.opened() as storage:  # which was not read
        assert storage is not None
    assert not list((project.local / "logs").glob("*.pid"))

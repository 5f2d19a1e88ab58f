"""`handsigns serve` as a process, with real releases in real storage."""

import base64
import io
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
from PIL import Image

from tasks.project import Project
from tasks.releases.champion import KEY
from tasks.releases.release import Release
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import Repo
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.servers import new_bucket
from tests.fixtures.service import Service, grey, named, point, publish_graph, serving, soon

TOKEN = "a token of sixteen or more"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Address) -> S3Address:
    """A bucket for this file's tests."""
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def first(bucket: S3Address, graphs: Any, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A champion in the shared bucket."""
    release = publish_graph(Storage(bucket), tmp_path_factory.mktemp("release") / "a", graphs[0])
    point(Storage(bucket), release.id, 1)
    return release


@pytest.fixture(scope="module")
def service(bucket: S3Address, first: Release, tmp_path_factory: Any) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("serve"), **named(bucket)) as running:
        yield running


def connect(service: Service) -> socket.socket:
    """A bare connection to the service."""
    return socket.create_connection(("127.0.0.1", service.client.base_url.port or 0))


def head(*headers: str) -> bytes:
    """The head of a request with a JSON body."""
    lines = ["POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def sent(content: bytes, kind: str = "application/json") -> dict[str, Any]:
    return {"content": content, "headers": {"content-type": kind}}


def test_every_form_of_a_request_gets_the_same_reading(service: Service, first: Release) -> None:
    photo = grey(4)
    text = base64.b64encode(photo).decode()
    forms = [sent(photo, "image/png"), {"json": {"image": text}}]
    forms += [{"json": {"image": f"data:image/png;base64,{text}"}}]
    found = service.predict(photo).json()
    for form in forms:
        assert service.client.post("/predict", **form).json() == found
    assert (found["label"], found["certain"]) == ("4", True)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert (found["model"]["version"], found["model"]["release"]) == (1, first.id)
    for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        assert service.predict(grey(2, kind)).json()["label"] == "2"
    for headers in ({"Host": "LOCALHOST:8000"}, {"Origin": "http://127.0.0.1:8000"}):
        assert service.predict(grey(1), headers=headers).status_code == 200
    assert service.predict(grey(0.5)).json()["certain"] is False
    # Several in one request are answered in their order.
    photos = [*map(grey, range(6)), b"no photo", grey(0)]
    form = service.client.post("/predict", files=[("file", ("a", photo)) for photo in photos])
    images = [base64.b64encode(photo).decode() for photo in photos]
    readings = service.client.post("/predict", json={"image": images}).json()["readings"]
    assert form.json()["readings"] == readings
    assert [one.get("label") for one in readings] == ["0", "1", "2", "3", "4", "5", None, "0"]
    assert "not an image" in readings[6]["error"]


def test_health_metrics_and_pages_show_the_model(service: Service, first: Release) -> None:
    health = service.health()
    assert (health["state"], health["problem"]) == ("ready", None)
    assert health["model"]["release"] == first.id
    assert health["model"]["promoted_at"] == "2026-11-22T12:00:01+00:00"
    assert health["age_seconds"] > 0
    answer = service.client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
    counted = 'handsigns_predictions_total{label="4"}'
    before = service.metric(counted)
    service.predict(grey(4))
    assert service.metric(counted) == before + 1
    assert service.metric('handsigns_request_seconds_bucket{le="+Inf",path="/predict"}') >= 1
    assert service.metric(f'handsigns_model_info{{release="{first.id}",version="1"}}') == 1
    assert service.metric("handsigns_follow_problem") == 0
    page = service.client.get("/model").text
    assert "<h1>Card</h1>" in page
    assert "<td>2</td>" in page
    assert "<script>" not in page
    for path, width in (("model/quality.png", 1000), ("examples/3.png", 64)):
        picture = service.client.get(f"/{path}").content
        assert Image.open(io.BytesIO(picture)).width >= width
    # Browsers load nothing from other hosts; the tests in a browser find what would be blocked.
    policy = service.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    predict = service.client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    forms = {"multipart/form-data", "application/json", "image/*"}
    assert set(predict["requestBody"]["content"]) == forms
    assert {"200", "401", "413", "415", "422", "429", "503"} <= set(predict["responses"])


BAD: dict[str, tuple[int, str, dict[str, Any]]] = {
    "text": (415, "not an image", sent(b"just words", "image/png")),
    "empty": (422, "zero bytes", sent(b"", "image/png")),
    "no file": (400, "'file'", {"files": {"photo": ("a.png", grey(1))}}),
    "nothing": (415, "sent as ''", {}),
    "JSON of 17": (422, "16 or fewer", {"json": {"image": ["AAAA"] * 17}}),
    "JSON nested": (422, "nothing else", sent(b"[" * 100_000)),
    "JSON more": (422, "nothing else", {"json": {"image": "", "label": 2}}),
    "too large": (413, "larger than 10 MB", sent(bytes(10 * 2**20 + 1))),
    "foreign host": (403, "SERVE_TOKEN", {"headers": {"Host": "evil.example"}}),
    "foreign page": (403, "SERVE_TOKEN", {"headers": {"Origin": "http://evil.example"}}),
    "GET": (405, "Method", {"method": "GET"}),
    "no page": (404, "Not Found", {"path": "/no/such/page"}),
}


def test_a_bad_request_gets_a_clear_refusal_in_json(service: Service) -> None:
    for name, (status, reason, request) in BAD.items():
        where = {"method": "POST", "url": request.pop("path", "/predict")}
        answer = service.client.request(**where | request)
        assert answer.status_code == status, (name, answer.text)
        assert answer.json().keys() == {"error"}, name
        assert re.search(reason, answer.json()["error"]), (name, answer.text)
        assert answer.headers.get("allow") == ("POST" if status == 405 else None)


LARGE = b'{"error":"The request is larger than 10 MB."}'


def test_large_bodies_malformed_heads_and_idle_connections_are_bounded(service: Service) -> None:
    chunks = (b"10000\r\n" + bytes(2**16) + b"\r\n") * 161  # of 64 KB each, and no end
    for request, status, body in (
        (head(f"Content-Length: {2**40}"), 413, LARGE),
        (head("Transfer-Encoding: chunked") + chunks, 413, LARGE),
        (b"no http\r\n\r\n", 400, b""),
        (b"POST /predict HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400, b""),
    ):
        with connect(service) as line, HTTPResponse(line) as answer:
            line.sendall(request)
            answer.begin()
            assert (answer.status, answer.read()) == (status, body)
    assert service.metric('handsigns_requests_total{method="POST",path="/predict",status="413"}')
    with ThreadPoolExecutor(10) as clients:
        answers = clients.map(service.predict, [bytes(11 << 20)] * 10)
        assert {answer.status_code for answer in answers} == {413}
    with ExitStack() as stack:
        for number in range(300):
            line = stack.enter_context(connect(service))
            if number % 2:
                line.sendall(b"GET /health HTTP/1.1\r\n")  # and never the rest of it
        assert service.predict(grey(1)).status_code == 200
        assert line.recv(100) == b""  # closed, as it said nothing for 5 s


def test_wrong_tokens_use_up_nothing_of_the_right_ones_rate_and_a_stop_answers_all(
    bucket: S3Address, first: Release, tmp_path: Any
) -> None:
    limits = {"HANDSIGNS_SERVE_RATE": "4/minute", "HANDSIGNS_SERVE_TOKEN": TOKEN}
    with serving(tmp_path / "checkout", **named(bucket), **limits) as service:
        wrong = {"Authorization": f"Bearer {TOKEN}s"}
        answers = [service.predict(grey(1), headers=tried) for tried in ({}, *[wrong] * 4)]
        assert [answer.status_code for answer in answers] == [401] * 4 + [429]
        assert answers[0].headers["www-authenticate"] == "Bearer"
        known = {"Authorization": f"Bearer {TOKEN}"}
        for _ in range(3):
            assert service.predict(grey(1), headers=known).status_code == 200
        body = json.dumps({"image": base64.b64encode(grey(3)).decode()}).encode()
        with connect(service) as line:
            token = f"Authorization: Bearer {TOKEN}"
            line.sendall(head(f"Content-Length: {len(body)}", token) + body[:10])
            time.sleep(0.3)
            # Another address that the client claims does not help.
            refused = service.predict(grey(1), headers={**known, "X-Forwarded-For": "192.0.2.7"})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            line.sendall(body[10:])
            answer = line.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"label":"3"' in answer
        assert service.process.wait(15) == 0
        assert TOKEN not in service.log.read_text()


def test_it_waits_for_a_champion_follows_it_and_refuses_a_damaged_one(
    s3: S3Address, storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Any
) -> None:
    with serving(tmp_path / "checkout", **named(s3)) as service:
        early = service.predict(grey(1))
        assert service.client.get("/health").status_code == early.status_code == 503
        assert "no champion yet" in early.json()["error"]
        releases = [publish_graph(storage, tmp_path / f"{n}", graphs[n]).id for n in (0, 1)]
        point(storage, releases[0], 1)
        soon(lambda: service.health()["state"] == "ready")

        key = f"releases/{releases[1]}/model.pb"
        intact = storage.get(key)
        storage.put(key, intact[:100] + bytes([intact[100] ^ 1]) + intact[101:])
        point(storage, releases[1], 2)
        soon(lambda: service.health()["state"] == "behind")
        health = service.health()
        assert "differs from its digest" in health["problem"]
        assert health["model"]["version"] == 1
        assert service.metric("handsigns_follow_problem") == 1
        assert service.metric('handsigns_follow_failures_total{kind="release"}') >= 1
        assert "Still serving the champion, version 1" in service.log.read_text()
        storage.put(key, intact)
        labels: list[Any] = []  # requests all the while, and no gap
        while not labels or labels[-1] != ("4", 2):
            answer = service.predict(grey(1))
            assert answer.status_code == 200
            labels.append((answer.json()["label"], answer.json()["model"]["version"]))
        assert set(labels) <= {("1", 1), ("4", 2)}
        assert service.health()["state"] == "ready"
        storage.put(KEY, b"no pointer")
        soon(lambda: "cannot be understood" in str(service.health()["problem"]))
        assert service.predict(grey(1)).json()["label"] == "4"


def test_what_takes_long_holds_nobody_up_and_takes_little_memory(service: Service) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000), (4 * 51,) * 3).save(file, "PNG")
    element = b"[[],[]],"
    nested = b'{"image": [' + element * (10_000_000 // len(element)) + b"0]}"
    began = time.monotonic()
    json.loads(nested)
    parsing = time.monotonic() - began
    memory = lambda: service.metric("process_resident_memory_bytes") / 2**20  # noqa: E731

    def meanwhile(send: Callable[[], httpx.Response], times: int) -> tuple[Any, float, float]:
        """The answers to what takes long, the slowest one to others, and the peak of memory."""
        slowest, peak = 0.0, 0.0
        with ThreadPoolExecutor(times) as clients:
            waiting = [clients.submit(send) for _ in range(times)]
            while not all(one.done() for one in waiting):
                began = time.monotonic()
                assert service.predict(grey(2)).json()["label"] == "2"
                slowest = max(slowest, time.monotonic() - began)
                peak = max(peak, memory())
        return [one.result() for one in waiting], slowest, peak

    service.predict(grey(1))
    before = memory()
    large, _, peak = meanwhile(lambda: service.predict(file.getvalue()), 3)
    assert [one.json()["label"] for one in large] == ["4"] * 3
    assert peak - before < 500
    (refused,), slowest, _ = meanwhile(lambda: service.client.post("/predict", **sent(nested)), 1)
    assert refused.status_code == 422
    assert slowest < max(parsing / 2, 0.3)


def test_an_address_that_cannot_be_served_is_refused_in_one_line(tmp_path: Any) -> None:
    (tmp_path / "dvc.yaml").write_bytes((CHECKOUT.root / "dvc.yaml").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for option, value, reason in (
            ("--host", "0.0.0.0", "HANDSIGNS_SERVE_TOKEN must be set"),
            ("--host", ".bad.", "not a host name"),
            ("--port", str(taken.getsockname()[1]), "in use"),
        ):
            said = Repo(Project(tmp_path)).run("handsigns", "serve", option, value, code=1).stderr
            assert (reason in said, said.count("\n")) == (True, 1), said

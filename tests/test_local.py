"""One stack of local servers per checkout: shared, adopted, closed to others, and stopped."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.local import processes, servers
from flows.local.clients import CREDENTIALS, local_credentials
from flows.local.processes import LocalStack, Program, read_state
from flows.local.stack import Services
from flows.settings import Settings
from tasks.errors import BusyError, ServiceError, SettingsError
from tasks.project import Project
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.servers import MlflowServer, PrefectApi, stack
from tests.fixtures.service import soon

SETTINGS, SPAWN = Settings(), get_context("spawn")


def listener(url: str) -> int:
    """Process that listens on the port of a URL."""
    port = int(url.rpartition(":")[2])
    connections = psutil.net_connections("tcp")
    return next(one.pid for one in connections if one.laddr.port == port and one.status == "LISTEN")


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def use_until_killed(folder: Path, said: Connection) -> None:
    """Use the local store in a process of its own, and say where it is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with closing(Services(SETTINGS, Project(folder))) as services:
        said.send(services.s3().endpoint_url)
        time.sleep(600)


def test_users_share_a_server_and_adopt_that_of_a_killed_one(tmp_path: Path) -> None:
    project = Project(tmp_path)

    def use(number: int) -> S3Address:
        with closing(Services(SETTINGS, project)) as services:
            Storage(services.s3()).put(str(number), b"content")
            time.sleep(0.1 * (number % 3))
            Storage(services.s3()).get("a")
            return services.s3()

    process = 0
    for how in (signal.SIGINT, signal.SIGKILL):
        ours, theirs = SPAWN.Pipe()
        run = SPAWN.Process(target=use_until_killed, args=(tmp_path, theirs))
        run.start()
        process = listener(ours.recv())
        os.kill(run.pid or 0, how)
        run.join(20)
        assert gone(process) == (how == signal.SIGINT)
    with closing(Services(SETTINGS, project)) as last:
        with closing(Services(SETTINGS, project)) as first:
            address = first.s3()
            assert listener(address.endpoint_url) == process
            assert last.s3() == address
        Storage(address).put("a", b"kept")
        other = SETTINGS.model_copy(update={"bucket": "others"})
        with (
            closing(Services(other, project)) as others,
            pytest.raises(BusyError, match="other settings"),
        ):
            others.s3()
    assert gone(process)
    # Several at once, while it stops and starts: each has a server for as long as it needs it.
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(use, range(8))) == {address}
    assert not read_state(project.local, "seaweedfs")
    with socket.create_server(("127.0.0.1", int(address.endpoint_url.rpartition(":")[2]))):
        moved = use(9)
    assert moved.endpoint_url != address.endpoint_url
    assert moved.secret_access_key == address.secret_access_key


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[LocalStack]:
    made = LocalStack(tmp_path)
    yield made
    made.close()


PARENT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[1], 'w'), flush=True)
time.sleep(600)
"""


def test_what_a_program_started_is_stopped_as_well(tmp_path: Path, programs: LocalStack) -> None:
    mark = tmp_path / "pids"

    def start() -> list[int]:
        mark.unlink(missing_ok=True)
        ready = lambda: mark.exists() and mark.read_text()  # noqa: E731
        command = [sys.executable, "-c", PARENT, str(mark)]
        program = Program("a", command, dict(os.environ), ready)
        programs.wait(programs.start("a", 0, lambda _: program))
        return [*map(int, mark.read_text().split())]

    leader, child = start()
    os.kill(leader, signal.SIGKILL)
    soon(lambda: not read_state(tmp_path, "a"))
    assert not gone(child)
    second = start()
    assert gone(child)
    programs.close()
    assert all(map(gone, second))


FAILING = """
echo 'starting'
printf 'ERROR: Traceback (most recent call last):\\n  File "x.py", line 1, in open_error\\n'
echo 'PermissionError: [Errno 13] Permission denied: the very disk {long}'
echo 'RuntimeError: something that follows from it'
echo 'Server stopped!'
exit 3
"""


def test_a_failing_start_shows_the_first_error_of_its_log_and_a_hang_is_named(
    programs: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(script: str) -> str:
        program = Program("sh", ["sh", "-c", script], dict(os.environ), lambda: False)
        programs.start("sh", 0, lambda _: program)
        with pytest.raises(ServiceError) as caught:
            programs.wait(program)
        return str(caught.value)

    said = refused(FAILING.format(long="immeasurable " * 60))
    assert "did not start. First error: PermissionError: [Errno 13] Permission denied: the" in said
    assert f"immeasurable …. See {programs.folder / 'logs' / 'sh.log'}." in said
    assert ("\n" in said, len(said) < 500) == (False, True)
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    assert "does not answer" in refused("sleep 600")


def test_credentials_are_generated_once_and_private(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        first = local_credentials(tmp_path / ".local")
    finally:
        os.umask(previous)
    file = tmp_path / ".local" / CREDENTIALS
    assert file.stat().st_mode & 0o777 == 0o600
    assert local_credentials(file.parent) == first
    assert len(first.secret_access_key) >= 32
    assert first.login not in repr(first)
    for text in ("{}", file.read_text()[:40]):
        file.write_text(text)
        with pytest.raises(SettingsError, match="Remove"):
            local_credentials(file.parent)


def test_neither_the_store_nor_what_is_behind_it_serves_strangers(storage: Storage) -> None:
    storage.put("kept", b"for those who have the keys")
    url, bucket = storage.address.endpoint_url, storage.address.bucket
    assert httpx.get(f"{url}/{bucket}/kept").status_code == 403
    assert httpx.put(f"{url}/{bucket}/new", content=b"").status_code == 403
    state = read_state(stack().folder, "seaweedfs")
    assert state
    process = psutil.Process(state["pid"])
    # Not in /tmp, where it would belong to the first user.
    assert "s3.sock" in {one.laddr for one in process.net_connections("unix")}
    answers: set[int] = set()
    for connection in process.net_connections("tcp"):
        if connection.status == "LISTEN" and connection.laddr.port != state["ports"][0]:
            behind = f"http://127.0.0.1:{connection.laddr.port}/buckets/{bucket}/kept"
            with suppress(httpx.TransportError):  # some speak no HTTP/1
                answers |= {httpx.get(behind).status_code}
                answers |= {httpx.post(behind, content=b"theirs").status_code}
    assert 401 in answers
    assert min(answers) >= 400
    assert storage.get("kept") == b"for those who have the keys"


PATHS = {
    "prefect": {"/admin/version": None, "/flow_runs/filter": b"{}"},
    "mlflow": {
        "/": None,
        "/graphql": b"{}",
        "/v1/traces": b"",
        "/ajax-api/2.0/mlflow-artifacts/artifacts/a": None,
        "/no/such/page": None,
    },
}
"""One of each kind: pages, API, proxied files, traces; with what is posted."""


def status(url: str, content: bytes | None, login: str = "", **headers: str) -> int:
    method, (user, _, password) = "GET" if content is None else "POST", login.partition(":")
    more: Any = {"auth": (user, password)} if login else {}
    headers |= {"content-type": "application/json"}
    return httpx.request(method, url, content=content, headers=headers, **more).status_code


def test_prefect_and_mlflow_ask_everybody_for_the_login_and_a_page_elsewhere_has_none(
    prefect_api: PrefectApi, mlflow_server: MlflowServer
) -> None:
    for server, kind in ((prefect_api, "prefect"), (mlflow_server, "mlflow")):
        for path, content in PATHS[kind].items():
            for wrong in ("", server.login + "x", "admin:password1234"):
                assert status(server.url + path, content, wrong) in (401, 403), path
    assert isinstance(prefect_api.ask("flow_runs/filter", {}), list)
    login = mlflow_server.login
    assert status(f"{mlflow_server.url}/version", None, login) == 200
    # A page elsewhere, in a browser that knows the login, has no token.
    create = f"{mlflow_server.url}/api/2.0/mlflow/experiments/create"
    assert status(create, b'{"name": "theirs"}', login, Origin="http://elsewhere.example") == 403
    assert status(f"{prefect_api.url}/flow_runs/filter", b"{}", prefect_api.login) == 403


def test_servers_send_no_telemetry(tmp_path: Path) -> None:
    store = S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "key", "secret")
    mlflow = servers.mlflow(tmp_path, SETTINGS, store, (6,))
    assert mlflow.environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    prefect = servers.prefect(tmp_path, SETTINGS, (7,))
    assert prefect.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert "-master.telemetry=false" in servers.seaweedfs(tmp_path, "a", (1, 2, 3, 4, 5)).command
    assert "analytics = false" in (CHECKOUT.root / ".dvc/config").read_text()

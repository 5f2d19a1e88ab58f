"""Who can reach the servers that we start, and what they tell their makers."""

import configparser
import contextlib
import http.client
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from flows.local import servers
from flows.local.clients import CREDENTIALS, local_credentials
from flows.local.processes import read_state
from flows.settings import Settings, load_settings
from tasks.errors import SettingsError
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import session
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.prefect_api import PrefectApi, basic
from tests.fixtures.servers import MlflowServer


def test_every_server_that_we_start_listens_on_loopback_only(
    s3_server: S3Address, prefect_api: PrefectApi, mlflow_server: MlflowServer
) -> None:
    ours = set()
    for name in servers.PORTS:
        state = read_state(session.stack().folder, name)
        assert state
        process = psutil.Process(state["pid"])
        ours |= {one.pid for one in (process, *process.children(recursive=True))}
    addresses = [
        one.laddr.ip
        for one in psutil.net_connections("tcp")
        if one.status == "LISTEN" and one.pid in ours
    ]
    assert len(addresses) >= 7  # five of SeaweedFS, one each of Prefect and MLflow
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_store_asks_everybody_for_credentials(s3_server: S3Address) -> None:
    for method in ("GET", "PUT"):
        request = urllib.request.Request(
            f"{s3_server.endpoint_url}/{s3_server.bucket}/champion.json", b"{}", method=method
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 403


def test_nothing_behind_the_store_hands_out_or_takes_a_file(
    s3_server: S3Address, storage: Storage
) -> None:
    storage.put("kept", b"for those who have the keys")
    port = int(s3_server.endpoint_url.rpartition(":")[2])
    state = read_state(session.stack().folder, "seaweedfs")
    assert state
    process = psutil.Process(state["pid"])
    # Not in /tmp, where it would belong to the first user.
    assert "s3.sock" in {one.laddr for one in process.net_connections("unix")}
    others = {
        one.laddr.port
        for one in process.net_connections("tcp")
        if one.status == "LISTEN" and one.laddr.port != port
    }
    path = f"/buckets/{storage.address.bucket}/kept"
    answers = {}
    for other in others:
        with contextlib.suppress(OSError, http.client.HTTPException):  # some speak no HTTP/1
            url = f"http://127.0.0.1:{other}{path}"
            answers[other] = {status(url), status(url, b"theirs")}
    assert any(401 in codes for codes in answers.values()), answers
    assert all(min(codes) >= 400 for codes in answers.values()), answers
    assert storage.get("kept") == b"for those who have the keys"


def status(url: str, content: bytes | None = None, **headers: str) -> int:
    """Status of the answer to a request."""
    question = urllib.request.Request(url, content, headers)
    try:
        with urllib.request.urlopen(question, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_prefect_asks_everybody_for_the_login(prefect_api: PrefectApi) -> None:
    wrong = basic(prefect_api.login + "x")
    for path, content in (("admin/version", None), ("flow_runs/filter", b"{}")):
        assert status(f"{prefect_api.url}/{path}", content) in (401, 403)
        assert status(f"{prefect_api.url}/{path}", content, **wrong) in (401, 403)
    assert prefect_api.ask("admin/version")
    assert isinstance(prefect_api.ask("flow_runs/filter", {}), list)
    # A page elsewhere, in a browser that knows the login, has no token.
    known = basic(prefect_api.login)
    assert status(f"{prefect_api.url}/flow_runs/filter", b"{}", **known) == 403


MLFLOW_PATHS = {
    "/": None,
    "/version": None,
    "/signup": None,
    "/graphql": b"{}",
    "/v1/traces": b"",
    "/gateway/mlflow/v1/chat/completions": b"{}",
    "/get-artifact?path=a&run_uuid=b": None,
    "/ajax-api/2.0/mlflow-artifacts/artifacts/a": None,
    "/api/2.0/mlflow-artifacts/artifacts?path=": None,
    "/api/2.0/mlflow/experiments/search?max_results=1": None,
    "/api/2.0/mlflow/users/create": b"{}",
    "/ajax-api/3.0/jobs/search": b"{}",
    "/no/such/page": None,
}
"""One of each kind: pages, API, proxied files, traces, gateway; with what is posted."""


def test_mlflow_asks_everybody_for_the_login(mlflow_server: MlflowServer) -> None:
    sent = {"content-type": "application/json"}
    for path, content in MLFLOW_PATHS.items():
        for wrong in ({}, basic(mlflow_server.login + "x"), basic("admin:password1234")):
            assert status(mlflow_server.url + path, content, **sent, **wrong) == 401, path
    known = basic(mlflow_server.login)
    for path in ("/", "/version", "/api/2.0/mlflow/experiments/search?max_results=1"):
        assert status(mlflow_server.url + path, **known) == 200, path
    # Made for a page elsewhere, whose browser knows the login.
    foreign = {**known, **sent, "Origin": "http://elsewhere.example"}
    create = "/api/2.0/mlflow/experiments/create"
    assert status(mlflow_server.url + create, b'{"name": "theirs"}', **foreign) == 403


STORE = S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "key", "a-secret-of-ours")


def test_a_new_login_shuts_out_the_old_one(tmp_path: Path) -> None:
    """MLflow keeps the password that it was given first, in a database; so that one changes."""

    def known() -> tuple[str, str]:
        given = servers.mlflow(tmp_path, Settings(), STORE, (6,)).environment
        config = configparser.ConfigParser()
        config.read(given["MLFLOW_AUTH_CONFIG_PATH"])
        return given["MLFLOW_AUTH_ADMIN_PASSWORD"], config["mlflow"]["database_uri"]

    before = known()
    assert known() == before
    (tmp_path / CREDENTIALS).unlink()
    assert not set(known()) & set(before)


def test_servers_tell_their_makers_nothing_and_read_no_pickles(tmp_path: Path) -> None:
    named = {
        "database_url": SecretStr("postgresql://u:a-secret-of-ours@h/d"),
        "prefect_auth": SecretStr("someone:a-secret-of-ours"),
    }
    settings = Settings().model_copy(update=named)
    seaweedfs = servers.seaweedfs(tmp_path, "artifacts", (1, 2, 3, 4, 5))
    mlflow = servers.mlflow(tmp_path, settings, STORE, (6,))
    prefect = servers.prefect(tmp_path, settings, (7,))
    assert "-master.telemetry=false" in seaweedfs.command
    assert "--allowed-hosts" in mlflow.command
    assert mlflow.environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert mlflow.environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert prefect.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    known = local_credentials(tmp_path)
    kept = ("a-secret-of-ours", known.secret_access_key, known.login.partition(":")[2])
    for server in (seaweedfs, mlflow, prefect):
        assert not any(secret in " ".join(server.command) for secret in kept)


def test_dvc_is_told_once_for_all_to_keep_quiet() -> None:
    config = configparser.ConfigParser()
    config.read(CHECKOUT.root / ".dvc/config")
    assert config.get("core", "analytics").strip() == "false"


def test_running_a_graph_asks_nothing_of_the_network() -> None:
    program = (
        "import sys; seen = []; "
        "sys.addaudithook(lambda name, _: name.startswith('socket.') and seen.append(name)); "
        "import numpy as np, openvino as ov, openvino.opset13 as ops; "
        "given = ops.parameter([1, 3], np.float32); "
        "graph = ov.Core().compile_model(ov.Model([ops.relu(given)], [given]), 'CPU'); "
        "print(graph(np.ones((1, 3), np.float32))[0].sum(), seen)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3.0 []", done.stderr


def test_a_wider_bind_without_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSIGNS_HOST", "0.0.0.0")
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(SettingsError, match="PREFECT_SERVER_API_AUTH_STRING"):
        load_settings()

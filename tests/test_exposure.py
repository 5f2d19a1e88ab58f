"""Who can reach the servers that we start, and what they tell their makers."""

import configparser
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flows import servers
from flows.settings import load_settings
from tasks.addresses import S3Address
from tasks.errors import SettingsError
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.prefect_api import PrefectApi, basic

LISTENING = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1 and ::1 as the kernel writes them."""


def _family(pid: int) -> set[int]:
    """A process and all that it started, and what those started."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= _family(int(child))
    return found


def _listeners(pids: set[int]) -> list[str]:
    """Local addresses, in the kernel's hex, on which the processes listen."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(str(link.readlink()))
            except OSError:
                continue
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [
        row[1].split(":")[0]
        for row in rows
        if row[3] == LISTENING and f"socket:[{row[9]}]" in sockets
    ]


def test_every_server_that_we_start_listens_on_loopback_only(
    s3_server: S3Address, prefect_api: PrefectApi
) -> None:
    addresses = _listeners(_family(os.getpid()))
    assert len(addresses) >= 6  # five of SeaweedFS, one of Prefect
    assert set(addresses) <= LOOPBACK


def test_the_store_asks_everybody_for_credentials(s3_server: S3Address) -> None:
    for method in ("GET", "PUT"):
        request = urllib.request.Request(
            f"{s3_server.endpoint_url}/{s3_server.bucket}/champion.json", b"{}", method=method
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 403


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


def test_servers_tell_their_makers_nothing_and_read_no_pickles(tmp_path: Path) -> None:
    store = S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "key", "a-secret-of-ours")
    seaweedfs, _ = servers.seaweedfs(tmp_path, "artifacts", 0)
    mlflow, _ = servers.mlflow(tmp_path, 0, store, database="postgresql://u:a-secret-of-ours@h/d")
    prefect, _ = servers.prefect(tmp_path, 0, "someone:a-secret-of-ours")
    assert "-master.telemetry=false" in seaweedfs.command
    assert "--allowed-hosts" in mlflow.command
    assert mlflow.environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert mlflow.environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert prefect.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    for server in (seaweedfs, mlflow, prefect):
        assert "a-secret-of-ours" not in " ".join(server.command)


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

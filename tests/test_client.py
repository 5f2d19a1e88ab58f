"""What a process is told before it first talks to Prefect, or to anything on loopback."""

from pathlib import Path
from urllib.request import proxy_bypass_environment

import pytest

from flows.local.proxy import spare_loopback
from flows.local.servers import point_prefect_at, reachable
from flows.settings import load_settings


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"no_proxy": "corp.example"},
        {"NO_PROXY": "corp.example, other.example"},
        {"no_proxy": "corp.example", "NO_PROXY": "127.0.0.1"},
        {"NO_PROXY": "*"},
    ],
)
def test_a_proxy_is_not_asked_for_loopback(known: dict[str, str]) -> None:
    environment = {**known, "http_proxy": "http://127.0.0.1:9"}
    spare_loopback(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"]
    for host in ("127.0.0.1", "localhost", *("corp.example" for _ in known)):
        assert proxy_bypass_environment(host, {"no": environment["no_proxy"]})
    everywhere = known.get("NO_PROXY") == "*"
    spared = proxy_bypass_environment("elsewhere.example", {"no": environment["no_proxy"]})
    assert bool(spared) == everywhere
    once = dict(environment)
    spare_loopback(environment)
    assert environment == once


def test_the_local_servers_password_is_for_the_local_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:ours")
    monkeypatch.setenv("PREFECT_API_URL", "http://theirs/api")
    theirs: dict[str, str] = {}
    point_prefect_at("http://theirs/api", tmp_path, load_settings(), theirs)
    assert "PREFECT_API_AUTH_STRING" not in theirs
    monkeypatch.delenv("PREFECT_API_URL")
    ours: dict[str, str] = {}
    point_prefect_at("http://127.0.0.1:1/api", tmp_path, load_settings(), ours)
    assert ours["PREFECT_API_AUTH_STRING"] == "admin:ours"


@pytest.mark.parametrize(
    ("host", "at"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]")]
)
def test_what_listens_somewhere_is_reached_there(host: str, at: str) -> None:
    assert reachable(host) == at

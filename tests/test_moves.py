"""Moving the champion by command: Prefect shows it, and cannot get in its way."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.fixtures.checkouts import make_checkout
from tests.fixtures.earlier import Earlier
from tests.fixtures.prefect_api import PrefectApi


@contextmanager
def sick_prefect(version: str) -> Iterator[str]:
    """A server that says it is well, and which version of Prefect it is, and fails all else."""

    class Sick(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            known = {"/api/health": b"true", "/api/admin/version": f'"{version}"'.encode()}
            content = known.get(self.path, b"{}")
            self.send_response(200 if self.path in known else 500)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sick)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def rollback(earlier: Earlier, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Roll back, in a checkout with a champion; what the command says on standard error."""
    checkout = make_checkout(tmp_path_factory.mktemp("moves") / "checkout")
    services = earlier.adopt(checkout)

    def run(**environment: str) -> str:
        done = checkout.run("handsigns", "rollback", "--json", **services, **environment)
        assert json.loads(done.stdout)["action"] == "rollback"
        return done.stderr

    return run


@pytest.mark.parametrize("version", ["3.6.0", "2.20.0"])
def test_a_move_does_not_depend_on_a_prefect_that_fails(
    version: str, rollback: Callable[..., str]
) -> None:
    with sick_prefect(version) as url:
        assert f"Prefect at {url} cannot be used (" in rollback(PREFECT_API_URL=url)


def test_a_move_does_not_depend_on_a_prefect_that_lets_nobody_in(
    prefect_api: PrefectApi, rollback: Callable[..., str]
) -> None:
    wrong = {"PREFECT_API_URL": prefect_api.url, "PREFECT_API_AUTH_STRING": "some:body"}
    said = rollback(**wrong)
    assert f"Prefect at {prefect_api.url} cannot be used (401)" in said
    assert "set PREFECT_API_AUTH_STRING to user:password" in said


def test_a_move_by_command_is_a_flow_run_at_once(
    prefect_api: PrefectApi, rollback: Callable[..., str]
) -> None:
    assert "lacks this move" not in rollback(**prefect_api.named)
    wanted = {"flows": {"name": {"any_": ["rollback"]}}}
    states = {run["state_name"] for run in prefect_api.ask("flow_runs/filter", wanted)}
    assert "Rolled back" in states

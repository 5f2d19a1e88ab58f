"""Moving the champion by hand: through Prefect where it lets us in, and else without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.fixtures.checkouts import make_checkout
from tests.fixtures.prefect_api import PrefectApi


def test_a_prefect_that_lets_nobody_in_is_gone_without(
    prefect_api: PrefectApi, tmp_path: Path
) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    wrong = {"PREFECT_API_URL": prefect_api.url, "PREFECT_API_AUTH_STRING": "some:body"}
    warned, refused = workshop.handsigns("promote", "3", code=1, **wrong).splitlines()
    assert warned.startswith(f"Prefect cannot be used at {prefect_api.url} (401)")
    assert "set PREFECT_API_AUTH_STRING to user:password" in warned
    assert refused.startswith("There is no version 3 in the registry, only: none.")


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


@pytest.mark.parametrize("version", ["3.6.0", "2.20.0"])
def test_a_prefect_that_fails_is_gone_without(version: str, tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    with sick_prefect(version) as url:
        said = workshop.handsigns("rollback", code=1, PREFECT_API_URL=url)
    warned, refused = said.splitlines()
    assert warned.startswith(f"Prefect cannot be used at {url} (")
    assert refused == "There is no earlier champion to return to. Nothing was moved."

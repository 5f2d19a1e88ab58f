"""What a person sees in a real terminal, and what a log file gets."""

import fcntl
import os
import pty
import re
import struct
import termios
from typing import Any

import pytest

from flows.output import retrain_listing
from flows.report import GateReport, ModelReport, RunReport
from tasks.services.s3 import S3Address
from tests.fixtures.checkouts import BIN, Workshop
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.servers import MlflowServer
from tests.fixtures.service import named
from tests.fixtures.trained import Trained

ROWS, COLUMNS = 40, 110
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LIBRARIES = re.compile(r"absl|I0000|WARNING|Collecting files|%\||\| INFO|Warning:|Prefect collects")


def in_terminal(workshop: Workshop, *words: str, **environment: str) -> list[str]:
    """Run `handsigns …` in a terminal of 110 columns; the lines that it leaves there."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(workshop.project.root)
        command = str(BIN / "handsigns")
        variables = workshop.environment(**environment) | {"TERM": "xterm-256color"}
        os.execve(command, [command, *words], variables)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    raw = b""
    while True:
        try:
            raw += (chunk := os.read(terminal, 2**16))
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    shown = ESCAPES.sub("", raw.decode())
    assert code == 0, shown
    assert not LIBRARIES.search(shown)
    # A bar is drawn over itself, so that only what follows the last return stays.
    lines = [line.rpartition("\r")[2].rstrip() for line in shown.replace("\r\n", "\n").split("\n")]
    assert max(map(len, lines)) <= COLUMNS
    return lines


@pytest.mark.slow
def test_a_terminal_shows_results_and_bars_and_nothing_of_libraries(
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    workshop = trained.checkout(tmp_path_factory.mktemp("terminal") / "checkout")
    services = {**named(s3), **mlflow_server.named, **prefect_api.named}
    assert len(in_terminal(workshop, "import", str(trained.photos), **services)) <= 15
    first = in_terminal(workshop, "retrain", **services)
    assert len(first) <= 40
    assert "Retrain: promoted" in first
    assert any(re.search(r"^ test +accuracy 0\.\d{4}", line) for line in first)
    again = in_terminal(workshop, "retrain", **services)
    assert len(again) <= 15
    assert "Retrain: unchanged" in again
    stands = in_terminal(workshop, "status", **services)
    scores = r"accuracy [01]\.\d{4}, loss \d+\.\d{4}, \d+ photos, made 20"
    assert any(re.match(rf" champion +version 1: {scores}", line) for line in stands)
    assert not re.search("[0-9a-f]{32}", "".join(stands))
    listed = in_terminal(workshop, "versions", **services)
    row = r" +1 +[01]\.\d{4} +\d+\.\d{4} +\d+ +20[-0-9]+ [0-9:]+ +cha"
    assert any(re.match(row, line) for line in listed)
    photo = str(trained.photos / "1/0000.png")
    assert len(in_terminal(workshop, "predict", photo, **services)) <= 8
    # In a file each photo has one line, whatever its length.
    deep = trained.photos / "1/.." / "1/../1" / "../1/../1/../1/../1/../1/../1/../1/0000.png"
    said = workshop.run("handsigns", "predict", deep, **services).stdout
    assert re.search(rf"^  {re.escape(str(deep))} +[0-5]( +[01]\.\d{{3}}){{6}}$", said, re.M)


def test_a_refusal_says_by_how_much_and_what_to_do_next() -> None:
    found: list[dict[str, Any]] = [
        {"name": "accuracy", "value": 0.963, "limit": 0.99},
        {"name": "recall of 4", "value": 0.8, "limit": 0.75, "interval": [0.71, 0.9]},
        {"name": "loss", "value": 0.41, "limit": 0.3},
        {"name": "ECE", "value": None, "limit": 0.1, "detail": "it is not a number"},
    ]
    checks = [{**check, "passed": False} for check in found]
    checks.append({"name": "test photos", "value": 120, "limit": 60, "passed": True})
    report = RunReport(
        status="rejected",
        reason="The gate refused it.",
        model=ModelReport(name="hand-signs"),
        gate=GateReport(passed=False, checks=checks),
    )
    listing = retrain_listing(report)
    assert dict(listing.rows)["gate"] == (
        "failed: accuracy 0.963 < 0.990; recall of 4 0.800, surely only 0.710 < 0.750; "
        "loss 0.410 > 0.300; ECE: it is not a number"
    )
    assert "params.yaml" in listing.notes[0]

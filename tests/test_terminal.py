"""What a person sees in a real terminal, and what a log file gets."""

import fcntl
import os
import pty
import re
import struct
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.services.s3 import S3Address
from tests.fixtures.checkouts import BIN, Repo
from tests.fixtures.servers import MlflowServer, PrefectApi
from tests.fixtures.service import named
from tests.fixtures.trained import Trained

ROWS, COLUMNS = 40, 110
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LIBRARIES = re.compile(r"absl|I0000|oneDNN|UserWarning|DeprecationWarning|Prefect collects")
NOISE = re.compile(r"WARNING|Collecting files|%\||\| INFO|Warning:")
"""DVC's own, which only `dvc` itself may print."""


def left_behind(text: str) -> list[str]:
    """The lines that stay where bars are drawn over themselves."""
    lines, row = [""], 0
    for part in re.split(r"(\n|\r|\x1b\[\d*A|\x1b\[2K)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row -= int(part[2:-1] or 1)
        elif shown := ESCAPES.sub("", part).rstrip("\r"):
            lines[row] = shown
    return [line.rstrip() for line in lines]


def in_terminal(repo: Repo, *words: str, **environment: str) -> list[str]:
    """Run a program in a terminal of 110 columns; the lines that it leaves there."""
    process, terminal = pty.fork()
    if process == 0:
        # Here, and not in the parent, which may be too late for the program.
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.chdir(repo.project.root)
        variables = repo.environment(**environment) | {"TERM": "xterm-256color"}
        os.execve(BIN / words[0], words, variables)
    raw = b""
    with suppress(OSError):  # the other side is closed
        while chunk := os.read(terminal, 2**16):
            raw += chunk
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    shown = ESCAPES.sub("", raw.decode())
    assert code == 0, shown
    assert not LIBRARIES.search(shown), shown
    lines = left_behind(raw.decode())
    if words[0] == "handsigns":
        assert not NOISE.search(shown), shown
        assert max(map(len, lines)) <= COLUMNS
    return lines


def test_dvc_repro_prints_nothing_of_libraries(trained: Trained) -> None:
    assert "Running stage 'train@full'" in trained.output
    assert "resize photos: " in trained.output
    assert not LIBRARIES.search(trained.output)


@pytest.mark.slow
def test_a_terminal_shows_results_and_bars_and_nothing_of_libraries(
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
    tmp_path: Path,
) -> None:
    repo = trained.checkout(tmp_path / "checkout")
    services = {**named(s3), **mlflow_server.named, **prefect_api.named}
    services["HANDSIGNS_MODEL_NAME"] = "terminal"  # its first version is number 1

    def handsigns(*words: str) -> list[str]:
        return in_terminal(repo, "handsigns", *words, **services)

    assert len(handsigns("import", str(trained.photos))) <= 15
    first = handsigns("retrain")
    assert len(first) <= 40, "\n".join(first)
    assert "Retrain: promoted" in first
    assert any(re.search(r"^ test +accuracy 0\.\d{4}", line) for line in first)
    again = handsigns("retrain")
    assert len(again) <= 15
    assert "Retrain: unchanged" in again
    status = handsigns("status")
    scores = r"accuracy [01]\.\d{4}, loss \d+\.\d{4}, photos \d+, created 20"
    assert any(re.match(rf" champion +version 1, {scores}", line) for line in status), status
    assert not re.search("[0-9a-f]{32}", "".join(status))
    row = r" +1 +[01]\.\d{4} +\d+\.\d{4} +\d+ +20[-0-9: ]+ +cha"
    assert any(re.match(row, line) for line in handsigns("versions"))
    assert len(handsigns("predict", str(trained.photos / "1/0000.png"))) <= 8
    repeated = in_terminal(repo, "dvc", "repro", "--force", "--single-item", "train@base")
    assert len(repeated) <= 40
    assert "Running stage 'train@base':" in repeated
    # In a file each photo has one line, whatever its length.
    deep = trained.photos / "/".join(["1/.."] * 20) / "1/0000.png"
    said = repo.run("handsigns", "predict", deep, **services).stdout
    assert re.search(rf"^ *{re.escape(str(deep))} +[0-5?].* +[01]\.\d{{4}} *$", said, re.M)

"""A child with limits: it sees no secret, and its limits only ever become narrower."""

import subprocess
import sys

import pytest

from tasks import stage
from tasks.stage import REFUSED, run_confined

NARROWER = """
import resource
from tasks.stage import confine
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
confine(1 << 32, 50, 4000)
print([resource.getrlimit(kind)[0] for kind in
       (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)])
"""


def test_limits_are_set_and_none_that_is_there_is_widened() -> None:
    done = subprocess.run([sys.executable, "-c", NARROWER], capture_output=True, text=True)
    assert done.stdout == f"{[1 << 32, 50, 1000]}\n", done.stderr


def test_the_child_sees_neither_credentials_nor_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sentinel")
    monkeypatch.setenv("HDF5_PLUGIN_PATH", "/somebody/elses")
    telling = "import os, sys; sys.stdout.write(repr(dict(os.environ)))"
    told = run_confined("timeit", ["-n1", "-r1", telling], 60).stdout.decode()
    assert "'PATH'" in told
    assert "'HDF5_PLUGIN_PATH': '::'" in told
    assert "sentinel" not in told


def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        stage.refuse("is damaged\n(in two lines)")
    assert caught.value.code == REFUSED
    assert capsys.readouterr().err == "is damaged (in two lines)\n"

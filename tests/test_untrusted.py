"""The child process that reads untrusted models: no secrets, and only narrower limits."""

import subprocess
import sys

import pytest

from tasks.model.untrusted import refuse, run_confined

NARROWER = """
import resource
from tasks.model.untrusted import confine
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
confine(1 << 32, 50, 4000)
print([resource.getrlimit(kind)[0] for kind in
       (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)])
"""


def test_limits_are_set_and_none_that_is_there_is_widened() -> None:
    done = subprocess.run([sys.executable, "-c", NARROWER], capture_output=True, text=True)
    assert done.stdout == f"{[1 << 32, 50, 1000]}\n", done.stderr


def test_the_child_sees_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sentinel")
    show = "import os, sys; sys.stdout.write(repr(dict(os.environ)))"
    said = run_confined("timeit", "-n1", "-r1", show).stdout.decode()
    assert "'PATH'" in said
    assert "sentinel" not in said


def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refuse("is damaged\n(in two lines)")
    assert capsys.readouterr().err == "is damaged (in two lines)\n"

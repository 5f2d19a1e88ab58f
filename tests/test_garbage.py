"""Settings of the garbage collector, and a module that runs under them."""

import subprocess
import sys

from tasks import garbage


def _python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_the_collector_runs_rarely_and_leaves_what_is_there_however_the_block_ends() -> None:
    said = _python(
        "-c",
        "import gc\n"
        "from tasks.garbage import rare_collection\n"
        "try:\n"
        "    with rare_collection():\n"
        "        print(gc.get_threshold()[0], gc.get_freeze_count())\n"
        "        raise SystemExit(3)\n"
        "except SystemExit:\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 1000)\n",
    )
    assert said.split() == [str(garbage.RARELY), "0", "True", "True"]


def test_a_module_runs_as_with_m_and_sees_its_own_words() -> None:
    words = ("base64", "-e", "tests/__init__.py")
    assert _python("-P", garbage.__file__, *words) == _python("-m", *words)

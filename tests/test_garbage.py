"""What the collector is told, and that a module runs under it as it would without."""

import subprocess
import sys

from tasks import garbage


def _python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_the_collector_runs_rarely_and_leaves_what_is_there_in_the_end() -> None:
    said = _python(
        "-c",
        "import gc\n"
        "from tasks.garbage import rare_collection\n"
        "with rare_collection():\n"
        "    print(gc.get_threshold()[0], gc.get_freeze_count())\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000)\n",
    )
    assert said.split() == [str(garbage.RARELY), "0", "True", "True"]


def test_the_block_ends_frozen_however_it_is_left() -> None:
    said = _python(
        "-c",
        "import gc, sys\n"
        "from tasks.garbage import rare_collection\n"
        "try:\n"
        "    with rare_collection():\n"
        "        sys.exit(3)\n"
        "except SystemExit as left:\n"
        "    print(left.code, gc.get_freeze_count() > 1000)\n",
    )
    assert said.split() == ["3", "True"]


def test_a_module_runs_as_with_m_and_sees_its_own_words() -> None:
    words = ("base64", "-e", "tests/__init__.py")
    assert _python("-P", garbage.__file__, *words) == _python("-m", *words)

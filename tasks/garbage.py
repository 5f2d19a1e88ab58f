"""Python's garbage collector, kept out of the way of programs that load large libraries.

TensorFlow, Prefect and MLflow make objects by the hundred thousand while they are
imported, and all of them stay until the process ends. Looking through them again and
again is a third of the time that importing takes, and looking once more before leaving
takes two to three seconds.

`python -P garbage.py MODULE …` runs a module as `python -m MODULE …` would, so.
"""

import gc
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = 50_000
"""Objects made and not yet dropped before the youngest are looked through; Python's own
limit is 700."""


@contextmanager
def rare_collection() -> Iterator[None]:
    """Collect garbage rarely from now on, and not at all once the block has ended.

    For what a program does from its first import to its end.
    """
    gc.set_threshold(RARELY)
    try:
        yield
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.argv[:] = sys.argv[1:]
    with rare_collection():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

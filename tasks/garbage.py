"""Keep Python's garbage collector out of the way of programs that load large libraries.

TensorFlow, Prefect and MLflow make hundreds of thousands of objects that stay until the
process ends. Collecting them again and again is a third of the time of their import, and
collecting them once more at the end takes two to three seconds.

`python -P garbage.py MODULE …` runs a module like `python -m MODULE …`.
"""

import gc
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = 50_000


@contextmanager
def rare_collection() -> Iterator[None]:
    """Collect rarely, and not at all after the block."""
    gc.set_threshold(RARELY)
    try:
        yield
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.argv[:] = sys.argv[1:]
    with rare_collection():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

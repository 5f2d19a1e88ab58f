"""At most one retrain in a checkout, whoever started it: a schedule, the UI or a person.

Prefect's limit holds for the deployment's runs only. The kernel lets go of this lock
however a run ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.layout import Layout

_held: ContextVar[Path | None] = ContextVar("held", default=None)
"""The lock that what runs here has already."""


@contextmanager
def only_retrain(layout: Layout) -> Iterator[bool]:
    """Be the checkout's only retrain for as long as the block lasts.

    What runs within the block is part of that retrain, and may enter another one: the
    command holds the checkout from its first look at it, before Prefect runs the flow.

    Args:
        layout: the checkout.

    Yields:
        Whether that is so; False at once where another one runs.
    """
    if _held.get() == layout.retrain_lock:
        yield True
        return
    layout.local.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(layout.retrain_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    token = _held.set(layout.retrain_lock)
    try:
        _holder_file(layout).write_text(f"process {os.getpid()}\n", encoding="utf-8")
        yield True
    finally:
        _held.reset(token)
        lock.release()


def holder(layout: Layout) -> str:
    """Name the process that runs a retrain."""
    try:
        return _holder_file(layout).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown process"


def _holder_file(layout: Layout) -> Path:
    return layout.retrain_lock.with_suffix(".pid")

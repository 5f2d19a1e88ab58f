"""The other machines of an end-to-end training, which `TF_CONFIG` names; without TensorFlow."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_SECONDS = 600.0
"""Longest wait for the others; each must come to the same phase first."""

_log = logging.getLogger(__name__)


def named_workers() -> list[str]:
    """Addresses of all workers; none where `TF_CONFIG` is not set, or for TensorFlow to refuse."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}")["cluster"]
        return [str(one) for job in ("chief", "worker") for one in cluster.get(job, [])]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


@contextmanager
def waiting_for_workers(seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """End this process where the others do not come in time, or on Ctrl-C.

    TensorFlow waits in its own code and without end, where no handler of Python's runs
    and no thread of Python's either; so both signals get the kernel's answer.

    Args:
        seconds: longest wait.
    """
    workers = named_workers()
    if len(workers) < 2 or threading.current_thread() is not threading.main_thread():
        yield
        return
    _log.warning(
        "Waiting for the workers that TF_CONFIG names (%s), %.0f s at most. "
        "Run `dvc repro` on each of them.",
        ", ".join(workers),
        seconds,
    )
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in before.items():
            signal.signal(one, handler)

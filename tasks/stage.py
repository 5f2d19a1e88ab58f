"""The command of a stage: context, progress and entry point; threads and child processes."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tasks.errors import HandsignsError
from tasks.garbage import rare_collection
from tasks.params import Params, load_params
from tasks.project import Project

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`; cheap, and called often."""

REFUSED = 3
"""Exit code of a child process that refuses its file; its last line says why."""

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Context:
    """Where a stage runs, with which parameters."""

    project: Project
    params: Params
    progress: Progress = silent


Stage = Callable[[Context, str | None], None]


def stage_main(stage: Stage) -> None:
    """Run one stage as a process: `python -m tasks.<module> [item]`."""
    project = Project(Path.cwd())
    item = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        with rare_collection():
            stage(Context(project, load_params(project.params), _print_progress), item)
    except HandsignsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(
            f"'{error.filename or project.artifacts}' cannot be read or written "
            f"({error.strerror or error}). Make room or give permission, and run again."
        )


def _print_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Apply `function` in threads, at most three items ahead for each of them."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def run_confined(
    module: str, arguments: list[str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m module` on an untrusted file, without secrets in its environment.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`, and was killed.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # HDF5 would load plug-ins from its search path.
    environment |= {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "HDF5_PLUGIN_PATH": "::",
    }
    return subprocess.run(  # noqa: S603, our own interpreter and module
        [sys.executable, "-P", "-m", module, *arguments],
        env=environment,
        capture_output=True,
        timeout=seconds,
    )


def confine(memory: int, seconds: int, file_size: int) -> None:
    """Limit this process: bytes of memory, seconds of CPU time, bytes of each file."""
    import resource

    for kind, wanted in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_size),
    ):
        present, _ = resource.getrlimit(kind)
        limit = wanted if present == resource.RLIM_INFINITY else min(wanted, present)
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def refuse(reason: str) -> None:
    """Exit as a child process that refuses its file."""
    print(" ".join(reason.split())[:300], file=sys.stderr)
    sys.exit(REFUSED)

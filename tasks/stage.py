"""The command of a stage: context, progress, and entry point."""

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

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`; cheap, and called often."""


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Apply `function` in a pool of threads.

    Args:
        function: called once for each item; what it raises is raised here.
        items: taken as there is room, never all at once.
        workers: threads.

    Yields:
        The results in the order of `items`; three for each worker are held at most.
    """
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


REFUSED = 3
"""Exit code of a child that says in its last line what is wrong with the file."""

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


def run_confined(
    module: str, arguments: list[str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m module` on a file, without the secrets of our environment.

    Args:
        module: calls `confine` before it opens the file.
        arguments: for it.
        seconds: longest wait.

    Returns:
        How the child ended, and what it said.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # HDF5 would else load whatever plug-ins its search path names.
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
    """Limit this process further, where the system has such limits.

    Args:
        memory: bytes of address space.
        seconds: of processor time.
        file_size: bytes of any one file that it writes.
    """
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
    """End this process as one that refuses its file; one line says why."""
    print(" ".join(reason.split())[:300], file=sys.stderr)
    sys.exit(REFUSED)


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

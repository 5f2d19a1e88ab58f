"""What a stage is given, and how `dvc.yaml` runs it: `python -m tasks STAGE [ITEM]`."""

import atexit
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import HandsignsError, StageError
from tasks.project import Project

if TYPE_CHECKING:
    from tasks.params import Params

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`; cheap, and called often."""


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Context:
    project: Project
    params: "Params"
    progress: Progress = silent


def collect_rarely() -> None:
    """Keep the garbage collector from large libraries: a third of their import, 2 s at exit."""
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)


def redirect_output(log: Path) -> None:
    """Send standard output and standard error to a file, also what C++ libraries write."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError:  # a read-only checkout, or another user's log
        file = os.open(os.devnull, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def main() -> None:
    """Run one stage as a process."""
    collect_rarely()
    project = Project(Path.cwd())
    sys.stderr = os.fdopen(os.dup(2), "w", 1, sys.stderr.encoding, errors="backslashreplace")
    redirect_output(project.local / "logs" / f"{'-'.join(['stage', *sys.argv[1:]])}.log")
    try:
        run_command(" ".join(["python -m tasks", *sys.argv[1:]]), project, _print_progress)
    except HandsignsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(
            f"'{error.filename or project.artifacts}' cannot be read or written "
            f"({error.strerror or error}). Make room or give permission, and run again."
        )


def run_command(command: str, project: Project, progress: Progress) -> None:
    """Run a stage's command, as `dvc.yaml` has it, in this process."""
    from tasks.params import load_params

    words = re.fullmatch(r"python -m tasks (\w+)(?: (\w+))?", command)
    if words is None:
        raise StageError(
            f"The cmd of a stage must be `python -m tasks STAGE [ITEM]`, not '{command}'. "
            "Correct dvc.yaml."
        )
    stage = importlib.import_module(f"tasks.{words[1]}")
    stage.run(Context(project, load_params(project.params), progress), words[2])


def _print_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

"""What every stage of `dvc.yaml` looks like from outside.

A stage is one function `run(context, item)`. `python -m tasks.<module> [item]`
calls it in a process of its own, as `dvc repro` does; the flow calls it in its
own process. Nothing else differs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import HandsignsError
from tasks.garbage import rare_collection
from tasks.layout import Layout
from tasks.params import Params, load_params
from tasks.progress import Progress, silent


@dataclass(frozen=True)
class Context:
    """What a stage is given: where, with which parameters, and whom to tell."""

    layout: Layout
    params: Params
    progress: Progress = silent


Stage = Callable[[Context, str | None], None]


def stage_main(stage: Stage) -> None:
    """Run one stage as a process: `python -m tasks.<module> [item]`."""
    layout = Layout(Path.cwd())
    item = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        with rare_collection():
            stage(Context(layout, load_params(layout.params), _print_progress), item)
    except HandsignsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(
            f"A file cannot be read or written ({error.strerror or error}). Received: "
            f"'{error.filename or layout.artifacts}'. Make room or give permission, and run again."
        )


def _print_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

"""A stage's function in the place of the process that DVC would start for it."""

import hashlib
import importlib
import shlex
from pathlib import Path
from typing import Any

from tasks.errors import StageError
from tasks.layout import Layout
from tasks.params import load_params
from tasks.progress import Progress
from tasks.stage import Context


class InProcess:
    """Called by DVC as it would call its own `cmd_run`.

    Args:
        layout: the checkout.
        sources: digests of every module below `tasks/` when this process began to import them.
        progress: told how far the stage is.
    """

    def __init__(self, layout: Layout, sources: dict[str, str], progress: Progress) -> None:
        self.ran = False
        self._layout = layout
        self._sources = sources
        self._progress = progress

    def __call__(self, stage: Any, dry: bool = False, run_env: Any = None) -> None:
        words = shlex.split(stage.cmd)
        if words[:2] != ["python", "-m"] or not words[2].startswith("tasks."):
            raise StageError(
                f"A stage's cmd must be `python -m tasks.<module> [item]`. "
                f"Received: '{stage.cmd}' ({stage.addressing}). Mend dvc.yaml."
            )
        before = {str(dep): dep.get_hash() for dep in stage.deps}
        function = importlib.import_module(words[2]).run
        context = Context(self._layout, load_params(self._layout.params), self._progress)
        self._refuse_edited_sources(stage)
        function(context, words[3] if len(words) > 3 else None)
        self.ran = True
        self._refuse_edited_sources(stage)
        for dep in stage.deps:
            if dep.get_hash() != before[str(dep)]:
                raise StageError(
                    f"'{dep}' changed while stage {stage.addressing} ran, so its result belongs "
                    "to neither version. Run again."
                )

    def _refuse_edited_sources(self, stage: Any) -> None:
        """What was imported must be what DVC hashes."""
        if source_digests(self._layout.root) != self._sources:
            raise StageError(
                f"A module of tasks/ was edited since this run began, before {stage.addressing} "
                "was done. Run again, so that the code that ran is the code on record."
            )


def source_digests(root: Path) -> dict[str, str]:
    """SHA-256 of each module of `tasks/` below `root`, by its path there."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "tasks").rglob("*.py"))
    }

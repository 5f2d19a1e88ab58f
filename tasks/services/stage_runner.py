"""Run a stage of dvc.yaml in this process."""

import importlib
import shlex
from pathlib import Path
from typing import Any

from tasks.errors import StageError
from tasks.io import sha256
from tasks.params import load_params
from tasks.project import Project
from tasks.stage import Context, Progress


class StageRunner:
    """Replaces DVC's `cmd_run`: runs a stage in this process.

    DVC offers no public way to do that, and a process for each of twelve stages would
    import TensorFlow anew, which takes longer than most of them.

    Args:
        project: the checkout.
        sources: digests of `tasks/` when this process began to import it.
        progress: called while the stage runs.
    """

    def __init__(self, project: Project, sources: dict[str, str], progress: Progress) -> None:
        self.ran = False
        self._project = project
        self._sources = sources
        self._progress = progress

    def __call__(self, stage: Any, dry: bool = False, run_env: Any = None) -> None:
        words = shlex.split(stage.cmd)
        if words[:2] != ["python", "-m"] or not words[2].startswith("tasks."):
            raise StageError(
                f"A stage's cmd must be `python -m tasks.<module> [item]`, and that of "
                f"{stage.addressing} is '{stage.cmd}'. Correct dvc.yaml."
            )
        before = {str(dep): dep.get_hash() for dep in stage.deps}
        function = importlib.import_module(words[2]).run
        context = Context(self._project, load_params(self._project.params), self._progress)
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
        if source_digests(self._project.root) != self._sources:
            raise StageError(
                f"A module of tasks/ was edited since this run began, before {stage.addressing} "
                "was done. Run again, so that the code that ran is the code on record."
            )


def source_digests(root: Path) -> dict[str, str]:
    """SHA-256 of each module of `tasks/` below `root`, by its path there."""
    modules = sorted((root / "tasks").rglob("*.py"))
    return {str(path.relative_to(root)): sha256(path) for path in modules}

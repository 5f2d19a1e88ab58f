"""Rebuild a release in a worktree of its commit, with its own data and parameters, and compare.

Of the earlier code only commands are used that every version has.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from flows.workspace import Workspace
from tasks.errors import HandsignsError, ReleaseError, ServiceError, StageError
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.provenance import RebuildComparison, compare_builds, environment
from tasks.services.dvc import Pipeline, Remote, read_record
from tasks.services.git import worktree
from tasks.stage import Progress

RECORDED = ("data.dvc", "dvc.lock", "params.yaml")  # come from the release, not the commit


def reproduce(workspace: Workspace, name: str, progress: Progress) -> RebuildComparison:
    """Rebuild the champion, the challenger or a version, and compare it with its release."""
    began = time.monotonic()
    release, folder = workspace.release(name)
    facts = (read_json(folder / "manifest.json") or {})["facts"]
    revision = recorded_revision(facts, release)
    with worktree(workspace.project.root, revision) as tree:
        progress("check out", 1, 1)
        found = rebuild(workspace, folder, Project(tree), facts.get("environment"), progress)
    seconds = round(time.monotonic() - began, 1)
    return replace(found, release=release, revision=revision, seconds=seconds)


def recorded_revision(facts: Mapping[str, Any], release: str) -> str:
    """The commit that a release was made from; ReleaseError if that is not all of it."""
    revision = str(facts.get("git_revision", "unknown"))
    commit = revision.removesuffix("-dirty")
    if commit == "unknown":
        raise ReleaseError(
            f"Release {release} names no commit and cannot be rebuilt: "
            f"{facts.get('git_problem', 'it was made outside of git')}."
        )
    changed = facts.get("changed", ["files that it does not name"])
    if commit != revision and (lost := [name for name in changed if name not in RECORDED]):
        raise ReleaseError(
            f"Release {release} was made of files that are in no commit: {revision}, with "
            f"changes in {', '.join(map(str, lost[:5]))}. Commit before you retrain."
        )
    return commit


def rebuild(
    workspace: Workspace, folder: Path, built: Project, then: Any, progress: Progress
) -> RebuildComparison:
    """Run every stage in a worktree and compare the results with the release in `folder`."""
    for file in RECORDED:
        shutil.copy(folder / file, built.root / file)
    _fetch_data(workspace, built)
    stages = yaml.safe_load(built.lock.read_text(encoding="utf-8"))["stages"]
    built.lock.unlink()
    _run_stages(built, len(stages), progress)
    return compare_builds(folder, built, then, environment())


def _fetch_data(workspace: Workspace, built: Project) -> None:
    """Lay out the recorded photos: from our cache, from the remote, or rendered again."""
    (version, source), reason = read_record(built), "no DVC remote is set"
    cache = workspace.project.root.resolve() / ".dvc" / "cache"
    with contextlib.chdir(built.root):
        for remote in (Remote(str(cache)), workspace.remote()):  # a cache is a local remote
            with contextlib.suppress(HandsignsError):
                pipeline = Pipeline(built, remote)
                if pipeline.remote_url():
                    reason = f"they are not complete at {pipeline.remote_url()}"
                    pipeline.pull_data()
                    break
        else:
            sample = [str(Path(sys.executable).with_name("handsigns")), "sample"]
            variables = _environment(built.root)
            if source != "sample" or subprocess.run(sample, env=variables).returncode:  # noqa: S603
                raise ServiceError(
                    f"Photos of version {version} are not available ({reason}). "
                    "Set HANDSIGNS_DVC_REMOTE_URL to where they were pushed."
                )
    downloaded = workspace.project.local / "backbone"
    if downloaded.is_dir():  # the npm package, whose digest is pinned
        shutil.copytree(downloaded, built.local / "backbone", dirs_exist_ok=True)


def _run_stages(built: Project, count: int, progress: Progress) -> None:
    """Run every stage in a process of its own."""
    last, done = "no output", 0
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache"],
        cwd=built.root,
        env=_environment(built.root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout or ():
                last = line.strip() or last
                if line.startswith("Running stage"):
                    progress(f"rebuild {line.split(chr(39))[1]}", done, count)
                    done += 1
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # what the stages started, too
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise StageError(
            f"The release cannot be rebuilt ({last[:300].rstrip('.')}). See whether the "
            "libraries of its revision are installed."
        )
    progress("rebuilt", count, count)


def _environment(folder: Path) -> dict[str, str]:
    """This environment, with the worktree's code and without DVC's global configuration."""
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(folder / ".dvc" / "tmp"),
    }

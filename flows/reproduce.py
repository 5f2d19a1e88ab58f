"""Rebuild a release from its recorded code, data and parameters, and compare.

The code is checked out into a temporary worktree; data and parameters are those of the
release itself. Every stage is run there, none is restored from a cache.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from flows.workspace import Workspace
from tasks.errors import HandsignsError, ReleaseError, ServiceError, StageError
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.provenance import environment
from tasks.releases.reproduction import Comparison, compare_builds
from tasks.services.data_file import read_record
from tasks.stage import Progress

RECORDED = ("data.dvc", "dvc.lock", "params.yaml")
"""Files that a release brings itself, so that they may differ from the commit."""

FETCH = (
    "from pathlib import Path; from tasks.data.sources import fetch_data; "
    "from tasks.project import Project; from tasks.services.dvc import Pipeline; "
    "project = Project(Path.cwd()); print(fetch_data(project, Pipeline(project)))"
)


def reproduce(workspace: Workspace, name: str, progress: Progress) -> Comparison:
    """Rebuild a release and compare weights and metrics with it.

    Args:
        workspace: a checkout whose git history holds the release's revision.
        name: `champion`, `challenger` or the number of a version.
        progress: told which stage is being rebuilt.

    Returns:
        Identical, or the first difference and its likely cause.

    Raises:
        ReleaseError: the release does not say what it was made from, or was made from
            files that are in no commit.
        StageError: a stage could not be run again.
        ServiceError: the data cannot be had.
    """
    began = time.monotonic()
    release, folder = workspace.release(name)
    facts = (read_json(folder / "manifest.json") or {})["facts"]
    revision = recorded_revision(facts, release)
    progress("check out", 0, 1)
    with checkout(workspace.project, revision) as built:
        for file in RECORDED:
            shutil.copy(folder / file, built.root / file)
        _fetch_data(workspace, built)
        _rebuild(built, len(_stages(folder / "dvc.lock")), progress)
        found = compare_builds(folder, built, facts.get("environment"), environment())
    return found.of(release, revision, time.monotonic() - began)


def recorded_revision(facts: Mapping[str, Any], release: str) -> str:
    """The commit that a release was made from.

    Raises:
        ReleaseError: there is none, or files that the release does not bring differed.
    """
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
            f"The release was made from files that are in no commit. Received: {revision}, with "
            f"changes in {', '.join(map(str, lost[:5]))}. Commit before you retrain."
        )
    return commit


@contextmanager
def checkout(project: Project, revision: str) -> Iterator[Project]:
    """Check a commit out beside everything else; the worktree is gone after the block.

    Raises:
        ReleaseError: git does not know the commit.
    """
    folder = Path(tempfile.mkdtemp(prefix="handsigns-reproduce-"))
    tree = folder / "checkout"
    git = ["git", "-C", str(project.root), "worktree"]
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        done = _run([*git, "add", "--quiet", "--detach", str(tree), revision], project.root)
        if done.returncode:
            raise ReleaseError(
                f"Git cannot check out the release's revision ({_last(done.stderr)}). Received: "
                f"{revision}. Fetch it first: `git fetch --all`."
            )
        yield Project(tree)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _run([*git, "prune"], project.root)
        signal.signal(signal.SIGTERM, before)


def _fetch_data(workspace: Workspace, built: Project) -> None:
    """Lay out the recorded photos: from our cache, from the remote, or rendered anew.

    Raises:
        ServiceError: they cannot be had.
    """
    remote = workspace.remote()
    secrets: dict[str, str] = {}
    lines = ["[cache]", f"    dir = {workspace.project.root.resolve() / '.dvc' / 'cache'}"]
    if remote is not None:
        lines += ["[core]", "    remote = recorded", "['remote \"recorded\"']"]
        lines += [f"    url = {remote.url}"]
        # Keys go through the environment, where the AWS library looks for them.
        options = {**remote.options, **remote.late()}
        public = ("endpointurl", "region")
        lines += [f"    {name} = {options[name]}" for name in public if name in options]
        keys = ("access_key_id", "secret_access_key", "session_token")
        secrets = {f"AWS_{name.upper()}": options[name] for name in keys if name in options}
    config = built.root / ".dvc" / "config.local"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = _run([sys.executable, "-c", FETCH], built.root, secrets)
    if done.returncode or not built.data.is_dir():
        record = read_record(built)
        raise ServiceError(
            f"The release's photos cannot be had ({_last(done.stderr)}). Received: version "
            f"{record.version if record else 'none'}. "
            "Set HANDSIGNS_DVC_REMOTE_URL to where they were pushed."
        )
    # From here on it has a cache of its own: nothing may be restored from ours.
    config.unlink()
    kept = workspace.project.local / "backbone"
    if kept.is_dir():  # the npm package, whose digest is pinned
        shutil.copytree(kept, built.local / "backbone", dirs_exist_ok=True)


def _rebuild(built: Project, count: int, progress: Progress) -> None:
    """Run every stage, in a process of its own and as a person would.

    Raises:
        StageError: one failed.
    """
    built.lock.unlink()
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache"]
    lines: list[str] = []
    with _started(command, built.root) as process:
        done = 0
        for line in process.stdout or ():
            lines = [*lines[-30:], line]
            if line.startswith("Running stage"):
                progress(f"rebuild {line.split(chr(39))[1]}", done, count)
                done += 1
    if process.returncode:
        raise StageError(
            f"The release cannot be rebuilt ({_last(''.join(lines))}). Received: its revision's "
            "own stages, its data and parameters. Look whether its libraries are installed."
        )
    progress("rebuilt", count, count)


@contextmanager
def _started(command: list[str], folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """A child whose whole family ends with the block."""
    process = subprocess.Popen(  # noqa: S603, our own interpreter
        command,
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run(
    command: list[str], folder: Path, secrets: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603, git and our own interpreter
        command,
        cwd=folder,
        env={**_environment(folder), **(secrets or {})},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _environment(folder: Path) -> dict[str, str]:
    """Ours, but for the code that is imported and the programs that are found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": path, "DVC_NO_ANALYTICS": "1"}


def _stages(lock: Path) -> dict[str, Any]:
    try:
        stages: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ReleaseError(
            f"The release's dvc.lock cannot be read ({type(error).__name__}). Received: {lock}. "
            "Look at the release with `handsigns verify`, or reproduce another version."
        ) from error
    return stages


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".") if lines else "it said nothing"


def _stop(_signal: int, _frame: Any) -> None:
    raise HandsignsError("Stopped. The worktree was removed; nothing else was touched.")

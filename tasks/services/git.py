"""Git: what is checked out, and commits on a branch of the remote."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import stamina

from tasks.errors import ReleaseError, ServiceError

SECONDS = 60  # longest wait for one answer of git; a silent remote is given up
MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
"""Set where a git hook starts us; they name another checkout."""
AUTHOR = ("-c", "user.name=handsigns", "-c", "user.email=handsigns@localhost")


@dataclass(frozen=True)
class Revision:
    """The commit of a checkout, with `-dirty` if tracked files differ, or why it is unknown."""

    commit: str
    changed: tuple[str, ...] = ()
    problem: str | None = None


def read_revision(root: Path) -> Revision:
    """Name the commit that `root` is of; never raises."""
    try:
        described = _run(root, "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*")
        differing = _run(root, "diff", "--name-only", "-z", "HEAD")
        said = described.stderr + differing.stderr
        if described.returncode == differing.returncode == 0:
            changed = sorted(filter(None, differing.stdout.split("\0")))
            return Revision(described.stdout.strip(), tuple(changed))
    except ServiceError as error:
        said = str(error)
    # An image has no git; its build wrote down what it was made of.
    stated = root / "REVISION"
    if stated.is_file():
        return Revision(stated.read_text(encoding="utf-8").strip())
    problem = _one_line(said)[:200]
    if "dubious ownership" in said:
        advice = f"git config --global --add safe.directory {root.resolve()}"
        problem = f"git refuses a folder that belongs to another user. Run `{advice}`"
    return Revision("unknown", problem=problem.rstrip("."))


# A push is refused if another one was faster.
@stamina.retry(on=lambda error: "rejected]" in str(error), attempts=5, timeout=None, wait_max=3.0)
def push_to_branch(root: Path, branch: str, paths: Sequence[Path], message: str) -> str | None:
    """Commit files as they are now onto a branch of `origin`, made from HEAD where it is new.

    The checkout's own branch, index and files stay as they are. Returns the commit, or None
    where the branch holds these very files already.
    """
    theirs, ours = f"refs/heads/{branch}", f"refs/handsigns/{branch}"
    exists = bool(_git(root, "ls-remote", "origin", theirs))
    if exists:
        quiet = ("-q", "--no-tags", "--no-write-fetch-head")
        _git(root, "fetch", *quiet, "origin", f"+{theirs}:{ours}")
    parent = _git(root, "rev-parse", ours if exists else "HEAD")
    # An index of its own, and no second worktree: git reads the files of all worktrees each time,
    # and fails if another command is just writing one.
    with tempfile.TemporaryDirectory(prefix="handsigns-index-") as folder:
        index = Path(folder) / "index"
        _git(root, "read-tree", parent, index=index)
        _git(root, "add", "--force", *(str(path.absolute()) for path in paths), index=index)
        tree = _git(root, "write-tree", index=index)
    if exists and tree == _git(root, "rev-parse", f"{parent}^{{tree}}"):
        return None
    author = () if _run(root, "config", "user.email").returncode == 0 else AUTHOR
    commit = _git(root, *author, "commit-tree", tree, "-p", parent, "-m", message)
    _git(root, "push", "-q", "origin", f"{commit}:{theirs}")
    return commit


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """Check a commit of a release out into a temporary folder, removed after the block."""
    with tempfile.TemporaryDirectory(prefix="handsigns-worktree-") as folder:
        tree = Path(folder) / "checkout"
        added = _run(root, "worktree", "add", "-q", "--detach", str(tree), commit)
        if added.returncode:
            raise ReleaseError(
                f"Revision {commit} cannot be checked out ({_one_line(added.stderr)}). Run `git "
                "fetch --all` first."
            )
        try:
            yield tree
        finally:
            _run(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *words: str, index: Path | None = None) -> str:
    done = _run(root, *words, index=index)
    if done.returncode == 0:
        return done.stdout.strip()
    said = _one_line(done.stderr)
    verb = next(word for word in words if word not in AUTHOR)
    raise ServiceError(
        f"git {verb} failed ({said}). Check HANDSIGNS_GIT_PUSH, the remote and the right to "
        "push there, then run again."
    )


def _run(root: Path, *words: str, index: Path | None = None) -> "subprocess.CompletedProcess[str]":
    kept = {name: text for name, text in os.environ.items() if name not in MISLEADING}
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "LC_ALL": "C"}
    quiet["GIT_SSH_COMMAND"] = os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
    if index:
        quiet["GIT_INDEX_FILE"] = str(index)
    command = ["git", "-C", str(root), "-c", "core.hooksPath=/dev/null", *words]
    try:
        return subprocess.run(  # noqa: S603, the command is ours
            command,
            env={**kept, **quiet},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except FileNotFoundError:
        raise ServiceError("There is no git here. Install it.") from None
    except subprocess.TimeoutExpired:
        raise ServiceError(f"git {words[0]} did not end within {SECONDS} s. Run again.") from None


def _one_line(said: str) -> str:
    """One line of what git said; addresses lose their user and password."""
    lines = [line for line in said.splitlines() if not line.startswith("hint:")]
    return re.sub(r"(?<=://)[^\s'\"]*@", "", " ".join(" ".join(lines).split()))[:400]

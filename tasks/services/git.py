"""Git: provenance, and commits on a branch."""

import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import stamina

from tasks.errors import HandsignsError, ServiceError
from tasks.model.inference import usable_cores

LIBRARIES = (
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "numpy",
    "openvino",
    "opencv-python-headless",
    "pillow",
    "scikit-learn",
    "dvc",
)
"""Those whose arithmetic, decoding or formats a release's bytes come from."""

INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
"""By which libraries choose other kernels, which round differently."""


def environment() -> dict[str, Any]:
    """Name the interpreter, the libraries and the processor of this process.

    Returns:
        `python`, `system`, `libraries` (version by name), `processor`,
        `cores` and `instructions`.
    """
    processor, flags = _processor()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "processor": processor,
        "cores": usable_cores(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """Its name and what it can do; where the system does not tell, only its kind."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    lines = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    name = fields.get("model name") or platform.machine()
    return name, (fields.get("flags") or fields.get("Features") or "").split()


ATTEMPTS = 5
SECONDS = 60
"""Longest wait for one answer of git; a remote that says nothing is given up."""

_AUTHOR = {"NAME": "handsigns", "EMAIL": "handsigns@localhost"}
_RACES = ("[rejected]", "cannot lock ref", "failed to update ref", "Unable to create")
"""What git says where somebody else was faster."""


class _MovedError(HandsignsError):
    """Somebody else moved the branch in between."""


@dataclass(frozen=True)
class Branch:
    """A branch of a checkout's remote.

    Args:
        root: folder of the checkout, or one below it.
        name: of the branch; it is made from HEAD where there is none.
        remote: of the checkout.
    """

    root: Path
    name: str
    remote: str = "origin"

    def commit(self, paths: Sequence[Path], message: str) -> str | None:
        """Bring files as they are now onto the branch, as one commit.

        Args:
            paths: files below `root`.
            message: of the commit.

        Returns:
            The commit, or None where the branch holds these very files already.

        Raises:
            ServiceError: git or the remote refuses, or does not answer, or others
                move the branch again and again.
        """
        try:
            for attempt in stamina.retry_context(on=_MovedError, attempts=ATTEMPTS, wait_max=3.0):
                with attempt:
                    return self._commit(paths, message)
        except _MovedError as error:
            raise ServiceError(
                f"The branch was moved by others {ATTEMPTS} times in a row. "
                f"Received: {self.name} on {self.remote} ({error}). Run again."
            ) from None
        raise AssertionError("a retry context either returns or raises")

    def _commit(self, paths: Sequence[Path], message: str) -> str | None:
        tip = self._tip()
        parent = tip or self._git("rev-parse", "--verify", "HEAD^{commit}")
        tree = self._tree(parent, paths)
        if tip and tree == self._git("rev-parse", f"{tip}^{{tree}}"):
            return None
        commit = self._git("commit-tree", tree, "-p", parent, "-m", message, **self._author())
        self._git("push", "--quiet", self.remote, f"{commit}:refs/heads/{self.name}")
        return commit

    def _tip(self) -> str | None:
        """Last commit of the branch as the remote has it, fetched; None without one."""
        found = self._git("ls-remote", self.remote, f"refs/heads/{self.name}").split()
        if not found:
            return None
        ours = f"refs/handsigns/{self.name}"
        self._git("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", self.remote,
                  f"+refs/heads/{self.name}:{ours}")  # fmt: skip
        return self._git("rev-parse", "--verify", f"{ours}^{{commit}}")

    def _tree(self, parent: str, paths: Sequence[Path]) -> str:
        """The parent's tree with the files in it, made in an index of its own."""
        below = self._git("rev-parse", "--show-prefix")
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index"}
            self._git("read-tree", parent, **index)
            for path in paths:
                name = path.relative_to(self.root).as_posix()
                blob = self._git("hash-object", "-w", f"--path={name}", str(path.resolve()))
                self._git(
                    "update-index", "--add", "--cacheinfo", f"100644,{blob},{below}{name}", **index
                )
            return self._git("write-tree", **index)

    def _author(self) -> dict[str, str]:
        """Who commits, where git knows nobody here."""
        if self._call("config", "user.email").returncode == 0:
            return {}
        roles = ("AUTHOR", "COMMITTER")
        return {f"GIT_{role}_{key}": text for role in roles for key, text in _AUTHOR.items()}

    def _git(self, *words: str, **environment: str) -> str:
        done = self._call(*words, **environment)
        if done.returncode == 0:
            return done.stdout.strip()
        said = _without_secrets(done.stderr)
        if words[0] in ("push", "fetch") and any(race in done.stderr for race in _RACES):
            raise _MovedError(said)
        raise ServiceError(
            f"git {words[0]} failed ({said}). Received: branch {self.name} of {self.remote}. "
            "Check HANDSIGNS_GIT_PUSH, the remote and the right to push there."
        )

    def _call(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        kept = {name: text for name, text in os.environ.items() if name not in _MISLEADING}
        quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "LC_ALL": "C"}
        quiet["GIT_SSH_COMMAND"] = os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
        command = ["git", "-C", str(self.root), "-c", "core.hooksPath=/dev/null", *words]
        try:
            return subprocess.run(  # noqa: S603, the command is ours
                command,
                env={**kept, **quiet, **environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except FileNotFoundError:
            raise ServiceError(
                "There is no git here. Install it, or unset HANDSIGNS_GIT_PUSH."
            ) from None
        except subprocess.TimeoutExpired:
            raise ServiceError(
                f"git {words[0]} did not end within {SECONDS} s. Received: branch {self.name} "
                f"of {self.remote}. Check the remote, then run again."
            ) from None


_MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
"""Set where a git hook starts us; they name another checkout."""


def _without_secrets(said: str) -> str:
    """One line of what git said; addresses lose their user and password."""
    lines = [line for line in said.splitlines() if not line.startswith("hint:")]
    return re.sub(r"(?<=://)[^\s'\"]*@", "", " ".join(" ".join(lines).split()))[:400]

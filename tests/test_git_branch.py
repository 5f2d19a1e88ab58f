"""Versions on a branch of a real remote, beside whatever the person here is doing."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import ServiceError
from tasks.services.git import Branch

TOKEN = "sentinel-token"


def git(root: Path, *words: str) -> str:
    author = ["-c", "user.name=tests", "-c", "user.email=tests@example.invalid"]
    command = ["git", "-C", str(root), *author, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of a bare remote, where nobody told git who works here."""
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", tmp_path / "origin"], check=True)
    root = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", tmp_path / "origin", root], check=True, text=True)
    (root / "data.dvc").write_text("first\n")
    (root / "code.py").write_text("code\n")
    git(root, "checkout", "-qb", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "Start")
    git(root, "push", "-q", "origin", "main")
    return root


def test_what_the_person_is_doing_stays_as_it_is(checkout: Path) -> None:
    (checkout / "data.dvc").write_text("second\n")
    (checkout / "staged.py").write_text("staged\n")
    git(checkout, "add", "staged.py")
    (checkout / "code.py").write_text("being edited\n")
    (checkout / ".git/hooks/pre-push").write_text("#!/bin/sh\nexit 1\n")
    (checkout / ".git/hooks/pre-push").chmod(0o755)

    def state() -> list[str]:
        questions = (
            ["status", "--porcelain"],
            ["rev-parse", "HEAD"],
            ["branch"],
            ["stash", "list"],
        )
        return [git(checkout, *words) for words in questions]

    before = state()
    index = (checkout / ".git/index").read_bytes()
    commit = Branch(checkout, "handsigns/data").commit([checkout / "data.dvc"], "Retrain\n\nWhy.")
    assert (checkout / ".git/index").read_bytes() == index
    assert state() == before
    assert (checkout / "code.py").read_text() == "being edited\n"
    origin = checkout.parent / "origin"
    assert git(origin, "rev-parse", "handsigns/data") == commit
    assert git(origin, "show", "handsigns/data:data.dvc") == "second"
    assert git(origin, "show", "handsigns/data:code.py") == "code"
    assert git(origin, "ls-tree", "--name-only", "handsigns/data").split() == [
        "code.py",
        "data.dvc",
    ]
    assert git(origin, "log", "-1", "--format=%an %s", "handsigns/data") == "handsigns Retrain"
    assert git(origin, "rev-parse", "main") == git(checkout, "rev-parse", "HEAD")


def test_the_same_files_are_not_committed_twice(checkout: Path) -> None:
    branch = Branch(checkout, "data")
    assert branch.commit([checkout / "data.dvc"], "One")
    assert branch.commit([checkout / "data.dvc"], "Two") is None
    (checkout / "data.dvc").write_text("second\n")
    second = branch.commit([checkout / "data.dvc"], "Three")
    origin = checkout.parent / "origin"
    assert git(origin, "rev-parse", "data") == second
    assert git(origin, "log", "--format=%s", "data").split() == ["Three", "One", "Start"]


def test_a_checkout_below_the_repositorys_top_keeps_its_paths(checkout: Path) -> None:
    below = checkout / "models/signs"
    below.mkdir(parents=True)
    (below / "data.dvc").write_text("below\n")
    Branch(below, "data").commit([below / "data.dvc"], "Below")
    origin = checkout.parent / "origin"
    assert git(origin, "show", "data:models/signs/data.dvc") == "below"
    assert git(origin, "show", "data:data.dvc") == "first"


def test_of_many_at_once_none_is_lost(checkout: Path) -> None:
    """Each writes a file of its own, so that whoever came later must have kept the others."""
    names = [f"{number}.dvc" for number in range(4)]
    for name in names:
        (checkout / name).write_text(f"{name}\n")

    def commit(name: str) -> str | None:
        return Branch(checkout, "data").commit([checkout / name], name)

    with ThreadPoolExecutor() as pool:
        assert all(pool.map(commit, names))
    origin = checkout.parent / "origin"
    assert set(names) < set(git(origin, "ls-tree", "--name-only", "data").split())


def test_a_remote_that_refuses_is_named_in_one_line_without_its_token(checkout: Path) -> None:
    hook = checkout.parent / "origin/hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho only by review >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(ServiceError, match=r"git push failed .*only by review") as refused:
        Branch(checkout, "data").commit([checkout / "data.dvc"], "One")
    address = f"http://user:{TOKEN}@127.0.0.1:9/origin.git"
    git(checkout, "remote", "set-url", "origin", address)
    with pytest.raises(ServiceError, match="git ls-remote failed") as unreachable:
        Branch(checkout, "data").commit([checkout / "data.dvc"], "One")
    for caught in (refused, unreachable):
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)

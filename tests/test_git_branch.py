"""Versions on a branch of a real remote, beside whatever the person here is doing."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import ServiceError
from tasks.services.git import Revision, push_to_branch, read_revision

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
            ["worktree", "list"],
        )
        return [git(checkout, *words) for words in questions]

    before = state()
    index = (checkout / ".git/index").read_bytes()
    commit = push_to_branch(checkout, "handsigns/data", [checkout / "data.dvc"], "Retrain\n\nWhy.")
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
    data = [checkout / "data.dvc"]
    assert push_to_branch(checkout, "data", data, "One")
    assert push_to_branch(checkout, "data", data, "Two") is None
    (checkout / "data.dvc").write_text("second\n")
    second = push_to_branch(checkout, "data", data, "Three")
    origin = checkout.parent / "origin"
    assert git(origin, "rev-parse", "data") == second
    assert git(origin, "log", "--format=%s", "data").split() == ["Three", "One", "Start"]


def test_a_checkout_below_the_repositorys_top_keeps_its_paths(checkout: Path) -> None:
    below = checkout / "models/signs"
    below.mkdir(parents=True)
    (below / "data.dvc").write_text("below\n")
    push_to_branch(below, "data", [below / "data.dvc"], "Below")
    origin = checkout.parent / "origin"
    assert git(origin, "show", "data:models/signs/data.dvc") == "below"
    assert git(origin, "show", "data:data.dvc") == "first"


def test_of_many_at_once_none_is_lost(checkout: Path) -> None:
    """Each writes a file of its own, so that whoever came later must have kept the others."""
    names = [f"{number}.dvc" for number in range(4)]
    for name in names:
        (checkout / name).write_text(f"{name}\n")

    def commit(name: str) -> str | None:
        return push_to_branch(checkout, "data", [checkout / name], name)

    with ThreadPoolExecutor() as pool:
        assert all(pool.map(commit, names))
    origin = checkout.parent / "origin"
    assert set(names) < set(git(origin, "ls-tree", "--name-only", "data").split())


def test_a_remote_that_refuses_is_named_in_one_line_without_its_token(checkout: Path) -> None:
    hook = checkout.parent / "origin/hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho only by review >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(ServiceError, match=r"git push failed .*only by review") as refused:
        push_to_branch(checkout, "data", [checkout / "data.dvc"], "One")
    address = f"http://user:{TOKEN}@127.0.0.1:9/origin.git"
    git(checkout, "remote", "set-url", "origin", address)
    with pytest.raises(ServiceError, match="git ls-remote failed") as unreachable:
        push_to_branch(checkout, "data", [checkout / "data.dvc"], "One")
    for caught in (refused, unreachable):
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)


def test_the_commit_and_the_changed_files_are_named(checkout: Path) -> None:
    clean = read_revision(checkout)
    assert clean == Revision(git(checkout, "rev-parse", "HEAD"))
    (checkout / "code.py").write_text("edited\n")
    assert read_revision(checkout) == Revision(f"{clean.commit}-dirty", ("code.py",))


def test_why_git_does_not_name_the_commit_is_said(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        owner = read_revision(checkout)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        no_git = read_revision(checkout)
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    elsewhere = read_revision(outside)
    (checkout / ".git/index").write_bytes(b"damaged")
    damaged = read_revision(checkout)
    for found, words in (
        (owner, f"git config --global --add safe.directory {checkout}"),
        (no_git, "There is no git here"),
        (elsewhere, "not a git repository"),
        (damaged, "index file"),
    ):
        assert found.commit == "unknown"
        assert words in str(found.problem)
        assert "\n" not in str(found.problem)
    (outside / "REVISION").write_text("abc\n")
    assert read_revision(outside) == Revision("abc")

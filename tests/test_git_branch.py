"""Versions on a branch of a real remote, beside whatever the person here is doing."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import ServiceError
from tasks.services.git import Revision, push_to_branch, read_revision


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


@pytest.fixture
def origin(checkout: Path) -> Path:
    return checkout.parent / "origin"


def state(checkout: Path) -> list[object]:
    questions = ("status --porcelain", "rev-parse HEAD", "branch", "stash list", "worktree list")
    said: list[object] = [git(checkout, *words.split()) for words in questions]
    return [*said, (checkout / ".git/index").read_bytes(), (checkout / "code.py").read_text()]


def test_files_are_committed_and_what_the_person_is_doing_stays(
    checkout: Path, origin: Path
) -> None:
    (checkout / "data.dvc").write_text("second\n")
    (checkout / "staged.py").write_text("staged\n")
    git(checkout, "add", "staged.py")
    (checkout / "code.py").write_text("being edited\n")
    (checkout / ".git/hooks/pre-push").write_text("#!/bin/sh\nexit 1\n")
    (checkout / ".git/hooks/pre-push").chmod(0o755)
    before, branch, data = state(checkout), "handsigns/data", [checkout / "data.dvc"]
    commit = push_to_branch(checkout, branch, data, "Retrain\n\nWhy.")
    assert push_to_branch(checkout, branch, data, "Again") is None
    assert state(checkout) == before
    assert git(origin, "rev-parse", branch) == commit
    assert git(origin, "show", f"{branch}:data.dvc") == "second"
    assert git(origin, "show", f"{branch}:code.py") == "code"
    assert git(origin, "ls-tree", "--name-only", branch).split() == ["code.py", "data.dvc"]
    assert git(origin, "log", "-1", "--format=%an %s", branch) == "handsigns Retrain"
    assert git(origin, "rev-parse", "main") == git(checkout, "rev-parse", "HEAD")
    (checkout / "data.dvc").write_text("third\n")
    assert push_to_branch(checkout, branch, data, "Three") == git(origin, "rev-parse", branch)
    assert git(origin, "log", "--format=%s", branch).split() == ["Three", "Retrain", "Start"]


def test_a_checkout_below_the_repositorys_top_keeps_its_paths(checkout: Path, origin: Path) -> None:
    below = checkout / "models/signs"
    below.mkdir(parents=True)
    (below / "data.dvc").write_text("below\n")
    push_to_branch(below, "data", [below / "data.dvc"], "Below")
    assert git(origin, "show", "data:models/signs/data.dvc") == "below"
    assert git(origin, "show", "data:data.dvc") == "first"


def test_of_many_at_once_none_is_lost(checkout: Path, origin: Path) -> None:
    """Each writes a file of its own, so that whoever came later must have kept the others."""
    names = [f"{number}.dvc" for number in range(4)]
    for name in names:
        (checkout / name).write_text(f"{name}\n")
    with ThreadPoolExecutor() as pool:
        pushed = pool.map(
            lambda name: push_to_branch(checkout, "data", [checkout / name], name), names
        )
        assert all(pushed)
    assert set(names) < set(git(origin, "ls-tree", "--name-only", "data").split())


def test_a_remote_that_refuses_is_one_line_without_its_token(checkout: Path, origin: Path) -> None:
    hook = origin / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho only by review >&2\nexit 1\n")
    hook.chmod(0o755)
    url = "http://user:sentinel-token@127.0.0.1:9/origin.git"
    for address, words in (
        (str(origin), r"git push failed .*only by review"),
        (url, "git ls-remote failed"),
    ):
        git(checkout, "remote", "set-url", "origin", address)
        with pytest.raises(ServiceError, match=words) as caught:
            push_to_branch(checkout, "data", [checkout / "data.dvc"], "One")
        assert "\n" not in str(caught.value)
        assert "sentinel" not in str(caught.value)


def test_the_commit_and_the_changed_files_are_named_or_why_not(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = read_revision(checkout)
    assert clean == Revision(git(checkout, "rev-parse", "HEAD"))
    (checkout / "code.py").write_text("edited\n")
    assert read_revision(checkout) == Revision(f"{clean.commit}-dirty", ("code.py",))
    outside = tmp_path / "outside"
    outside.mkdir()
    advice = f"git config --global --add safe.directory {checkout}"
    for name, value, folder, words in (
        ("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1", checkout, advice),
        ("PATH", str(tmp_path), checkout, "There is no git here"),
        ("GIT_CEILING_DIRECTORIES", str(tmp_path), outside, "not a git repository"),
        ("GIT_INDEX_VERSION", "damaged", checkout, "index file"),
    ):
        if value == "damaged":
            (checkout / ".git/index").write_bytes(b"damaged")
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            found = read_revision(folder)
        assert found.commit == "unknown"
        assert words in str(found.problem)
        assert "\n" not in str(found.problem)
    (outside / "REVISION").write_text("abc\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert read_revision(outside) == Revision("abc")

"""What git says of a checkout, and versions on a branch of a real remote beside a person's work."""

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
    """A clone of a bare remote, where git does not know who works here."""
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "origin")
    git(tmp_path, "clone", "-q", "origin", "checkout")
    root = tmp_path / "checkout"
    (root / "data.dvc").write_text("first\n")
    (root / "code.py").write_text("code\n")
    git(root, "checkout", "-qb", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "Start")
    git(root, "push", "-q", "origin", "main")
    return root


def state(checkout: Path) -> list[object]:
    questions = ("status --porcelain", "rev-parse HEAD", "branch", "stash list", "worktree list")
    said: list[object] = [git(checkout, *words.split()) for words in questions]
    return [*said, (checkout / ".git/index").read_bytes(), (checkout / "code.py").read_text()]


def test_files_are_committed_and_what_the_person_is_doing_stays(checkout: Path) -> None:
    origin, branch, data = checkout.parent / "origin", "handsigns/data", checkout / "data.dvc"
    data.write_text("second\n")
    (checkout / "staged.py").write_text("staged\n")
    git(checkout, "add", "staged.py")
    (checkout / "code.py").write_text("being edited\n")
    (checkout / ".git/hooks/pre-push").write_text("#!/bin/sh\nexit 1\n")
    (checkout / ".git/hooks/pre-push").chmod(0o755)
    before = state(checkout)
    commit = push_to_branch(checkout, branch, [data], "Retrain\n\nWhy.")
    assert push_to_branch(checkout, branch, [data], "Again") is None
    assert state(checkout) == before
    assert git(origin, "rev-parse", branch) == commit
    assert git(origin, "show", f"{branch}:data.dvc", f"{branch}:code.py") == "second\ncode"
    assert git(origin, "log", "-1", "--format=%an %s", branch) == "handsigns Retrain"
    # Of many at once none is lost: each has a file of its own beside those of the others. And a
    # checkout below the repository's top keeps its paths.
    below = checkout / "models/signs"
    below.mkdir(parents=True)
    names = [f"{number}.dvc" for number in range(4)]
    for name in names:
        (below / name).write_text(f"{name}\n")
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(lambda one: push_to_branch(below, branch, [below / one], one), names))
    kept = git(origin, "ls-tree", "-r", "--name-only", branch).split()
    assert kept == ["code.py", "data.dvc", *(f"models/signs/{name}" for name in names)]
    assert git(origin, "log", "--format=%s", branch).split()[4:] == ["Retrain", "Start"]


def test_a_remote_that_refuses_is_one_line_without_its_token(checkout: Path) -> None:
    origin = checkout.parent / "origin"
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

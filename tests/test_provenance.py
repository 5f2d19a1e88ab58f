"""Where a release comes from: commit and branch, bill of materials, and its rebuild."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.reproduce import rebuild, recorded_revision
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import ReleaseError, ServiceError
from tasks.io import write_json
from tasks.project import Project
from tasks.releases.provenance import compare_builds, environment, write_bill
from tasks.services.git import Revision, push_to_branch, read_revision, worktree
from tasks.stage import silent
from tests.fixtures.checkouts import git, with_stages
from tests.fixtures.faults import one_line
from tests.fixtures.photos import CHECKOUT

LOCK, PROJECT = CHECKOUT.root / "requirements.lock", CHECKOUT.root / "pyproject.toml"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def refuse(hook: Path) -> None:
    hook.write_text("#!/bin/sh\necho only by review >&2\nexit 1\n")
    hook.chmod(0o755)


def state(clone: Path) -> list[object]:
    questions = ("status --porcelain", "rev-parse HEAD", "branch", "stash list", "worktree list")
    said: list[object] = [git(clone, *words.split()) for words in questions]
    return [*said, (clone / ".git/index").read_bytes(), (clone / "code.py").read_text()]


def test_files_are_committed_and_what_the_person_is_doing_stays(clone: Path) -> None:
    origin, branch, data = clone.parent / "origin", "handsigns/data", clone / "data.dvc"
    data.write_text("second\n")
    (clone / "staged.py").write_text("staged\n")
    git(clone, "add", "staged.py")
    (clone / "code.py").write_text("being edited\n")
    refuse(clone / ".git/hooks/pre-push")
    before = state(clone)
    commit = push_to_branch(clone, branch, [data], "Retrain\n\nWhy.")
    assert push_to_branch(clone, branch, [data], "Again") is None
    assert state(clone) == before
    assert git(origin, "rev-parse", branch) == commit
    assert git(origin, "show", f"{branch}:data.dvc", f"{branch}:code.py") == "second\ncode"
    assert git(origin, "log", "-1", "--format=%an %s", branch) == "handsigns Retrain"
    # A checkout below the repository's top keeps its paths.
    below = clone / "models/signs/data.dvc"
    below.parent.mkdir(parents=True)
    below.write_text("third\n")
    assert push_to_branch(below.parent, branch, [below], "More")
    kept = git(origin, "ls-tree", "-r", "--name-only", branch).split()
    assert kept == ["code.py", "data.dvc", "models/signs/data.dvc"]
    assert git(origin, "log", "--format=%s", branch).split() == ["More", "Retrain", "Start"]
    # Of many at once none is lost.
    clones = [clone.parent / name for name in "abcd"]
    for other in clones:
        git(clone.parent, "clone", "-q", "origin", str(other))
        (other / f"{other.name}.dvc").write_text("fourth\n")
    with ThreadPoolExecutor() as pool:
        files = [[other / f"{other.name}.dvc"] for other in clones]
        assert all(pool.map(push_to_branch, clones, [branch] * 4, files, "abcd"))
    assert sorted(git(origin, "log", "--format=%s", branch).split()[:4]) == list("abcd")


def test_a_remote_that_refuses_is_one_line_without_its_token(clone: Path) -> None:
    refuse(clone.parent / "origin/hooks/pre-receive")
    with one_line(ServiceError, r"git push failed .*only by review"):
        push_to_branch(clone, "data", [clone / "data.dvc"], "One")
    git(clone, "remote", "set-url", "origin", "http://user:sentinel-token@127.0.0.1:9/origin.git")
    with one_line(ServiceError, "git ls-remote failed"):
        push_to_branch(clone, "data", [clone / "data.dvc"], "One")


def test_the_commit_and_the_changed_files_are_named_or_why_not(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = read_revision(clone)
    assert clean == Revision(git(clone, "rev-parse", "HEAD"))
    (clone / "code.py").write_text("edited\n")
    assert read_revision(clone) == Revision(f"{clean.commit}-dirty", ("code.py",))
    outside = tmp_path / "outside"
    outside.mkdir()
    advice = f"git config --global --add safe.directory {clone}"
    for name, value, folder, words in (
        ("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1", clone, advice),
        ("PATH", str(tmp_path), clone, "There is no git here"),
        ("GIT_CEILING_DIRECTORIES", str(tmp_path), outside, "not a git repository"),
        ("GIT_INDEX_VERSION", "damaged", clone, "index file"),
    ):
        if value == "damaged":
            (clone / ".git/index").write_bytes(b"damaged")
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            found = read_revision(folder)
        assert found.commit == "unknown"
        assert words in str(found.problem)
        assert "\n" not in str(found.problem)
    (outside / "REVISION").write_text("abc\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert read_revision(outside) == Revision("abc")


def test_the_same_lock_gives_the_same_bill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bill(LOCK, PROJECT, tmp_path / "a.json")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    write_bill(*(Path(shutil.copy(one, tmp_path)) for one in (LOCK, PROJECT)), tmp_path / "b.json")
    content = (tmp_path / "a.json").read_bytes()
    assert content == (tmp_path / "b.json").read_bytes()
    bill = json.loads(content)
    assert bill["bomFormat"] == "CycloneDX"
    listed = {one["name"]: one for one in bill["components"]}
    assert set(re.findall(r"^([\w-]+)==", LOCK.read_text(), re.M)) == set(listed)
    assert listed["keras"]["externalReferences"][0]["hashes"]


NOW = environment()
KERAS = {**NOW, "libraries": {**NOW["libraries"], "keras": "3.0"}}
RECORDED = {
    "audit": {"deps": [{"path": "data", "md5": "d"}], "outs": [{"path": "audit.json", "md5": "a"}]},
    "train@full": {"params": {"seed": 20}, "outs": [{"path": "weights", "md5": "w"}]},
}


def write_build(project: Project, loss: float, stages: Any) -> Project:
    """Write what is compared of a build."""
    project.artifacts.mkdir(parents=True)
    write_json(project.metrics, {"accuracy": 0.5, "loss": loss, "auc": 1.0, "ece": 0.0})
    for path in (project.model, project.graph, project.gate):
        path.write_bytes(b"{}")
    project.lock.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return project


@pytest.mark.parametrize(
    ("loss", "stage", "part", "then", "words"),
    [
        (1.0, "train@full", "outs", NOW, "cccc: identical."),
        (2.0, "audit", "x", NOW, "files outside of the pipeline differ. .* none that is recorded"),
        (2.0, "audit", "deps", None, "deps of stage audit differ. .* unknown: the release does"),
        (2.0, "train@full", "params", KERAS, "params of stage train@full differ. .* keras 3.0 ->"),
        (2.0, "train@full", "outs", {**NOW, "cores": 96}, "outs of stage .* another cores 96 ->"),
    ],
)
def test_a_rebuilt_model_is_identical_or_the_first_difference_and_its_cause_are_named(
    tmp_path: Path, loss: float, stage: str, part: str, then: Any, words: str
) -> None:
    first, release = write_build(Project(tmp_path / "a"), 1.0, RECORDED), tmp_path / "release"
    stages = {**RECORDED, stage: {**RECORDED[stage], part: []}}
    built = write_build(Project(tmp_path / "b"), loss, stages)
    shutil.copytree(first.artifacts, release)
    shutil.copy(first.lock, release)
    found = replace(compare_builds(release, built, then, NOW), release="a" * 32, revision="c" * 40)
    assert found.identical == (loss == 1.0)
    assert found.metrics["loss"] == (1.0, loss)
    assert re.fullmatch(f"Release a{{32}} was rebuilt from .*{words}.*", found.describe())


def test_what_is_in_no_commit_or_whose_photos_are_gone_cannot_be_rebuilt(tmp_path: Path) -> None:
    dirty = {"git_revision": "abc-dirty"}
    for facts, words in (
        ({}, "names no commit"),
        (dirty, "files that it does not name"),
        ({**dirty, "changed": ["tasks/gate.py"]}, "tasks/gate.py"),
    ):
        with pytest.raises(ReleaseError, match=words):
            recorded_revision(facts, "0" * 32)
    own = {**dirty, "changed": ["params.yaml", "data.dvc"]}
    assert recorded_revision(own, "0" * 32) == "abc"

    project, release = with_stages(tmp_path / "checkout"), tmp_path / "release"
    git(project.root, "add", "-A")
    git(project.root, "commit", "-qm", "Old")
    release.mkdir()
    (release / "data.dvc").write_text(f"outs:\n- md5: {'0' * 32}.dir\n  path: data\n")
    (release / "dvc.lock").write_text("stages: {}\n")
    shutil.copy(project.params, release)
    with (
        pytest.raises(ServiceError, match=r"0\.dir are not available .*HANDSIGNS_DVC_REMOTE_URL"),
        worktree(project.root, "HEAD") as tree,
    ):
        rebuild(Workspace(project, Settings()), release, Project(tree), None, silent)
    assert not tree.parent.exists()
    assert len(git(project.root, "worktree", "list").splitlines()) == 1
    with one_line(ReleaseError, "git fetch --all"), worktree(project.root, "f" * 40):
        pass

"""What is said of a rebuilt release: identical, or where it parts and why."""

import copy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from flows.reproduce import checkout, rebuild, recorded_revision
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import ReleaseError, ServiceError
from tasks.io import write_json
from tasks.project import Project
from tasks.releases.provenance import RebuildComparison, compare_builds, environment
from tasks.stage import silent
from tests.fixtures.photos import CHECKOUT

LOCK: dict[str, Any] = {
    "stages": {
        "audit": {
            "deps": [{"path": "data", "md5": "d"}, {"path": "tasks/audit.py", "md5": "a"}],
            "outs": [
                {"path": "artifacts/audit.json", "md5": "j"},
                {"path": "artifacts/plots/audit.png", "md5": "p"},
            ],
        },
        "train@full": {
            "deps": [{"path": "artifacts/audit.json", "md5": "j"}],
            "params": {"params.yaml": {"seed": 20}},
            "outs": [{"path": "artifacts/weights/full", "md5": "w"}],
        },
        "evaluate": {
            "deps": [{"path": "artifacts/weights/full", "md5": "w"}],
            "outs": [{"path": "artifacts/metrics.json", "md5": "m"}],
        },
    }
}
NOW = environment()


def write_build(model: Path, metrics: Path, lock: Path, record: Any, weight: float) -> None:
    content = BytesIO()
    with h5py.File(content, "w") as file:
        file["layers/dense/vars/0"] = np.full((2, 3), weight, "f4")
    model.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("model.weights.h5", content.getvalue())
    write_json(metrics, {"accuracy": 0.5, "loss": weight, "auc": 1.0, "ece": 0.0})
    lock.write_text(yaml.safe_dump(record))


def compared(
    tmp_path: Path, change: Callable[[Any], None], then: Any = NOW, weight: float = 1.0
) -> RebuildComparison:
    release, built = tmp_path / "release", Project(tmp_path / "built")
    for folder in (release, built.root):
        folder.mkdir()
    write_build(release / "model.keras", release / "metrics.json", release / "dvc.lock", LOCK, 1.0)
    record = copy.deepcopy(LOCK)
    change(record["stages"])
    write_build(built.model, built.metrics, built.root / "dvc.lock", record, weight)
    for path in (release / "model.pb", release / "gate.json", built.graph, built.gate):
        path.write_bytes(b"{}")
    return compare_builds(release, built, then, NOW)


def result(md5: str) -> Callable[[Any], None]:
    """Training gave other weights, and so evaluation got others."""

    def change(stages: Any) -> None:
        stages["train@full"]["outs"][0]["md5"] = md5
        stages["evaluate"]["deps"][0]["md5"] = md5
        stages["evaluate"]["outs"][0]["md5"] = md5

    return change


def test_the_same_bytes_are_identical_even_if_a_picture_differs(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda s: s["audit"]["outs"][1].update(md5="other"))
    assert found.identical
    assert found.metrics["loss"] == (1.0, 1.0)
    assert found.of("a" * 32, "b" * 40, 2.0).describe().endswith("identical.")


def test_the_first_stage_that_parts_is_named_and_by_how_much(tmp_path: Path) -> None:
    found = compared(tmp_path, result("x"), weight=1.25)
    assert (
        found.difference == "stage train@full gave another artifacts/weights/full from the "
        "same inputs."
    )
    assert found.weights == 0.25
    assert found.metrics["loss"] == (1.0, 1.25)
    assert "none that is recorded" in str(found.cause)
    assert "\n" not in found.describe()


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ({**NOW, "libraries": {**NOW["libraries"], "keras": "3.0"}}, "keras 3.0 -> "),
        ({**NOW, "instructions": ["avx2"]}, "a processor with other instructions"),
        ({**NOW, "processor": "abacus"}, "another processor: abacus"),
        ({**NOW, "cores": 96}, "another number of cores: 96"),
        (None, "does not say what it was computed with"),
    ],
)
def test_the_likely_cause_is_what_differs_around_it(tmp_path: Path, then: Any, words: str) -> None:
    found = compared(tmp_path, result("x"), then, weight=2.0)
    assert not found.identical
    assert words in str(found.cause)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["audit"]["deps"][0].update(md5="x"), "the photos differ"),
        (lambda s: s["audit"]["deps"][1].update(md5="x"), "tasks/audit.py is not what audit ran"),
        (lambda s: s["train@full"].update(params={}), "train@full has other parameters"),
        (lambda s: s.pop("evaluate"), "stage evaluate is gone"),
    ],
)
def test_other_data_code_or_parameters_come_first(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    found = compared(tmp_path, change, weight=2.0)
    assert words in str(found.difference)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "names no commit"),
        ({"git_revision": "abc-dirty"}, "files that it does not name"),
        ({"git_revision": "abc-dirty", "changed": ["tasks/gate.py"]}, "tasks/gate.py"),
    ],
)
def test_what_is_in_no_commit_cannot_be_rebuilt(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(ReleaseError, match=words):
        recorded_revision(facts, "0" * 32)


def test_what_the_release_brings_itself_may_differ_from_the_commit() -> None:
    facts = {"git_revision": "abc-dirty", "changed": ["params.yaml", "data.dvc"]}
    assert recorded_revision(facts, "0" * 32) == "abc"


def test_the_worktree_goes_whatever_happens(tmp_path: Path) -> None:
    author = ["-c", "user.name=tests", "-c", "user.email=tests@example.invalid"]
    (tmp_path / "file").write_text("first")
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "First"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "file").write_text("second")
    places = []

    def interrupted() -> None:
        with checkout(Project(tmp_path), "HEAD") as built:
            assert (built.root / "file").read_text() == "first"
            places.append(built.root)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not places[0].parent.exists()
    listed = subprocess.run(
        ["git", "-C", tmp_path, "worktree", "list"], capture_output=True, text=True
    )
    assert len(listed.stdout.splitlines()) == 1
    with pytest.raises(ReleaseError, match="git fetch"), checkout(Project(tmp_path), "f" * 40):
        pass


STAGE = """
import os, pathlib
out = pathlib.Path("artifacts")
out.mkdir(exist_ok=True)
photos = sorted(map(str, pathlib.Path("data").rglob("*.png")))
for name in ("model.keras", "model.pb", "gate.json"):
    (out / name).write_text(repr(photos))
(out / "metrics.json").write_text("{}")
"""


def test_of_the_earlier_code_only_commands_that_every_version_has_are_used(tmp_path: Path) -> None:
    root, release = tmp_path / "checkout", tmp_path / "release"
    names = ("model.keras", "model.pb", "gate.json", "metrics.json")
    (root / ".dvc").mkdir(parents=True)
    shutil.copy(CHECKOUT.root / ".dvc/config", root / ".dvc")
    (root / "data/train/0").mkdir(parents=True)
    (root / "data/train/0/a.png").write_text("a photo")
    (root / "make.py").write_text(STAGE)
    (root / "params.yaml").write_text("seed: 1\n")
    outs = [f"artifacts/{name}" for name in names]
    stage = {"cmd": "python make.py", "deps": ["data", "make.py"], "outs": outs}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))

    def run(*command: str) -> None:
        subprocess.run(command, cwd=root, check=True, capture_output=True)

    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "add", "data")
    run("git", "add", "-A")
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qm", "Old")
    run(sys.executable, "-m", "dvc", "repro")
    release.mkdir()
    for path in (*outs, "dvc.lock", "data.dvc", "params.yaml"):
        shutil.copy(root / path, release)
    workspace = Workspace(Project(root), Settings())
    shutil.rmtree(root / "data")  # the cache has the recorded version
    with checkout(workspace.project, "HEAD") as built:
        assert rebuild(workspace, release, built, None, silent).identical
    shutil.rmtree(root / ".dvc/cache")
    with (
        checkout(workspace.project, "HEAD") as built,
        pytest.raises(ServiceError, match="HANDSIGNS_DVC_REMOTE_URL"),
    ):
        rebuild(workspace, release, built, None, silent)

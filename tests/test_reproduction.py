"""What is said of a rebuilt release: identical, or where it parts and why."""

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
from tasks.releases.provenance import compare_builds, environment
from tasks.stage import silent
from tests.fixtures.photos import CHECKOUT

DEPS: dict[str, dict[str, str]] = {
    "audit": {"data": "d", "tasks/audit.py": "a"},
    "train@full": {"artifacts/audit.json": "j"},
    "evaluate": {"artifacts/weights/full": "w"},
}
OUTS: dict[str, dict[str, str]] = {
    "audit": {"artifacts/audit.json": "j", "artifacts/plots/audit.png": "p"},
    "train@full": {"artifacts/weights/full": "w"},
    "evaluate": {"artifacts/metrics.json": "m"},
}
NOW = environment()


def write_build(project: Project, weight: float, change: Callable[[Any], None]) -> None:
    """Write what is compared of a build, with a changed record in `dvc.lock`."""
    content = BytesIO()
    with h5py.File(content, "w") as file:
        file["layers/dense/vars/0"] = np.full((2, 3), weight, "f4")
    project.artifacts.mkdir(parents=True)
    with zipfile.ZipFile(project.model, "w") as archive:
        archive.writestr("model.weights.h5", content.getvalue())
    write_json(project.metrics, {"accuracy": 0.5, "loss": weight, "auc": 1.0, "ece": 0.0})
    for path in (project.graph, project.gate):
        path.write_bytes(b"{}")
    stages: dict[str, Any] = {
        name: {
            "deps": [{"path": path, "md5": md5} for path, md5 in DEPS[name].items()],
            "outs": [{"path": path, "md5": md5} for path, md5 in OUTS[name].items()],
            "params": {"seed": 20},
        }
        for name in DEPS
    }
    change(stages)
    project.lock.write_text(yaml.safe_dump({"stages": stages}))


def other_weights(stages: Any) -> None:
    stages["train@full"]["outs"][0]["md5"] = stages["evaluate"]["deps"][0]["md5"] = "x"


def other_picture(stages: Any) -> None:
    stages["audit"]["outs"][1]["md5"] = "x"


def other_photos(stages: Any) -> None:
    stages["audit"]["deps"][0]["md5"] = "x"


def other_code(stages: Any) -> None:
    stages["audit"]["deps"][1]["md5"] = "x"


def other_params(stages: Any) -> None:
    stages["train@full"]["params"] = {}


def no_evaluation(stages: Any) -> None:
    del stages["evaluate"]


SAME_INPUTS = "stage train@full gave another artifacts/weights/full from the same inputs."
OTHER_KERAS = {**NOW, "libraries": {**NOW["libraries"], "keras": "3.0"}}


@pytest.mark.parametrize(
    ("change", "then", "weight", "difference", "cause"),
    [
        (other_picture, NOW, 1.0, "None", "None"),
        (other_weights, NOW, 1.25, SAME_INPUTS, "none that is recorded"),
        (other_weights, OTHER_KERAS, 2.0, SAME_INPUTS, "keras 3.0 -> "),
        (
            other_weights,
            {**NOW, "instructions": ["avx2"]},
            2.0,
            SAME_INPUTS,
            "instructions ['avx2'] -> ",
        ),
        (other_weights, {**NOW, "processor": "abacus"}, 2.0, SAME_INPUTS, "processor abacus -> "),
        (other_weights, {**NOW, "cores": 96}, 2.0, SAME_INPUTS, "cores 96 -> "),
        (other_weights, None, 2.0, SAME_INPUTS, "does not say what it was computed with"),
        (other_photos, NOW, 2.0, "the photos differ", "rendered on other arithmetic"),
        (other_code, NOW, 2.0, "tasks/audit.py is not what audit ran", "not in the commit"),
        (other_params, NOW, 2.0, "train@full has other parameters", "another params.yaml"),
        (no_evaluation, NOW, 2.0, "stage evaluate is gone", "another dvc.yaml"),
    ],
)
def test_a_rebuilt_model_is_identical_or_it_is_told_where_it_parts_and_why(
    tmp_path: Path,
    change: Callable[[Any], None],
    then: Any,
    weight: float,
    difference: str,
    cause: str,
) -> None:
    first, built, release = Project(tmp_path / "a"), Project(tmp_path / "b"), tmp_path / "release"
    write_build(first, 1.0, lambda stages: None)
    write_build(built, weight, change)
    shutil.copytree(first.artifacts, release)
    shutil.copy(first.lock, release)
    found = compare_builds(release, built, then, NOW)
    assert found.identical == (weight == 1.0)
    assert found.metrics["loss"] == (1.0, weight)
    assert difference in str(found.difference)
    assert cause in str(found.cause)
    assert "\n" not in found.of("a" * 32, "b" * 40, 2.0).describe()


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
    own = {"git_revision": "abc-dirty", "changed": ["params.yaml", "data.dvc"]}
    assert recorded_revision(own, "0" * 32) == "abc"


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

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        return done.stdout

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
        pytest.raises(ServiceError, match="HANDSIGNS_DVC_REMOTE_URL"),
        checkout(workspace.project, "HEAD") as built,
    ):
        rebuild(workspace, release, built, None, silent)
    # The worktree goes whatever happens.
    assert not built.root.parent.exists()
    assert len(run("git", "worktree", "list").splitlines()) == 1
    with pytest.raises(ReleaseError, match="git fetch"), checkout(workspace.project, "f" * 40):
        pass

"""What a release says of itself: its card, its bill of materials, and whether a rebuild is it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flows.reproduce import checkout, rebuild, recorded_revision
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import ReleaseError, ServiceError, StageError
from tasks.gate import judge
from tasks.io import write_json
from tasks.params import Params
from tasks.project import Project
from tasks.releases.provenance import compare_builds, environment, model_card, write_bill
from tasks.scoring.metrics import score
from tasks.stage import silent
from tests.fixtures.checkouts import with_stages
from tests.fixtures.photos import CHECKOUT

LOCK, PROJECT = CHECKOUT.root / "requirements.lock", CHECKOUT.root / "pyproject.toml"


def test_the_card_carries_data_phases_scores_and_verdict(params: Params) -> None:
    y = np.arange(12) % 6
    blind_to_3 = np.full((12, 6), 0.02) + np.eye(6)[np.where(y == 3, 0, y)] * 0.88
    metrics = score(blind_to_3, y, params.labels).to_json()
    history = {"images": 10, "epochs": [{}] * 3, "val_loss": 0.25, "val_accuracy": 0.9}

    def card(flip: bool) -> str:
        content = params.model_dump()
        content["augmentation"]["horizontal_flip"] = flip
        return model_card(
            metrics=metrics,
            gate=judge(metrics, 0, params.gate, params.labels),
            counts={"train": 100, "val": 10, "test": 12, "synthetic": 60},
            params=content,
            histories=[{"phase": name, **history} for name in params.phases],
            data_version="3f2a.dir",
            data_note="Rendered hands, no photos of people.",
        )

    text = card(flip=True)
    assert "not mirrored" in card(flip=False)
    for words in (
        "Version `3f2a.dir`. Rendered hands, no photos of people.",
        "used 60 synthetic (rendered) hands",
        "mirrored at random",
        "does not read sign language",
        "Failed: ",
        "Apache-2.0",
    ):
        assert words in text
    full = params.phases["full"]
    rows = [re.sub(r" *\| *", "|", line) for line in text.splitlines()]
    for row in (
        "|train|100|",
        f"|full|10|{full.trainable_layers}|{full.learning_rate:g}|3|0.2500|0.9000|",
        "|accuracy|0.8333 (95% Wilson: 0.5520 to 0.9530)|",
        "|1|1.0000|1.0000|1.0000|2|",
        "|3|-|0.0000|0.0000|2|",
    ):
        assert row in rows


def test_the_same_lock_gives_the_same_bill_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bill(LOCK, PROJECT, tmp_path / "a.json")
    lock, project = (Path(shutil.copy(path, tmp_path)) for path in (LOCK, PROJECT))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    write_bill(lock, project, tmp_path / "b.json")
    content = (tmp_path / "a.json").read_bytes()
    assert content == (tmp_path / "b.json").read_bytes()
    bill = json.loads(content)
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "handsigns")
    listed = {one["name"]: one for one in bill["components"]}
    locked = [line.split("==")[0] for line in LOCK.read_text().splitlines() if "==" in line[:60]]
    assert set(locked) == set(listed)
    assert listed["keras"]["externalReferences"][0]["hashes"]
    with pytest.raises(StageError, match=r"gone\.lock"):
        write_bill(tmp_path / "gone.lock", PROJECT, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


NOW = environment()
KERAS = {**NOW, "libraries": {**NOW["libraries"], "keras": "3.0"}}
RECORDED = {
    "audit": {"deps": [{"path": "data", "md5": "d"}], "outs": [{"path": "audit.json", "md5": "a"}]},
    "train@full": {"params": {"seed": 20}, "outs": [{"path": "weights", "md5": "w"}]},
    "evaluate": {"deps": [{"path": "weights", "md5": "w"}], "outs": []},
}


def write_build(project: Project, loss: float, stage: str = "audit", **changes: Any) -> None:
    """Write what is compared of a build, with changes to one stage in `dvc.lock`."""
    project.artifacts.mkdir(parents=True)
    write_json(project.metrics, {"accuracy": 0.5, "loss": loss, "auc": 1.0, "ece": 0.0})
    for path in (project.model, project.graph, project.gate):
        path.write_bytes(b"{}")
    stages = {**RECORDED, stage: {**RECORDED[stage], **changes}}
    project.lock.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


@pytest.mark.parametrize(
    ("loss", "stage", "part", "then", "words"),
    [
        (1.0, "train@full", "outs", NOW, "cccc: identical."),
        (2.0, "audit", None, NOW, "files outside of the pipeline differ. .* none that is recorded"),
        (2.0, "audit", "deps", None, "deps of stage audit differ. .* unknown: the release does"),
        (2.0, "train@full", "params", KERAS, "params of stage train@full differ. .* keras 3.0 ->"),
        (2.0, "train@full", "outs", {**NOW, "cores": 96}, "outs of stage .* another cores 96 ->"),
    ],
)
def test_a_rebuilt_model_is_identical_or_the_first_difference_and_its_cause_are_named(
    tmp_path: Path, loss: float, stage: str, part: str | None, then: Any, words: str
) -> None:
    first, built, release = Project(tmp_path / "a"), Project(tmp_path / "b"), tmp_path / "release"
    write_build(first, 1.0)
    write_build(built, loss, stage, **({part: []} if part else {}))
    shutil.copytree(first.artifacts, release)
    shutil.copy(first.lock, release)
    found = replace(compare_builds(release, built, then, NOW), release="a" * 32, revision="c" * 40)
    assert found.identical == (loss == 1.0)
    assert found.metrics["loss"] == (1.0, loss)
    assert re.fullmatch(f"Release a{{32}} was rebuilt from .*{words}.*", found.describe())


def test_what_is_in_no_commit_cannot_be_rebuilt() -> None:
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


def test_a_missing_commit_or_version_of_the_photos_is_named_and_no_worktree_is_left(
    tmp_path: Path,
) -> None:
    project, release = with_stages(tmp_path / "checkout"), tmp_path / "release"

    def git(*words: str) -> str:
        author = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        command = ["git", "-C", project.root, *author, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("add", "-A")
    git("commit", "-qm", "Old")
    release.mkdir()
    (release / "data.dvc").write_text(f"outs:\n- md5: {'0' * 32}.dir\n  path: data\n")
    (release / "dvc.lock").write_text("stages: {}\n")
    shutil.copy(project.params, release)
    workspace = Workspace(project, Settings())
    with (
        pytest.raises(ServiceError, match=r"0\.dir are not available .*HANDSIGNS_DVC_REMOTE_URL"),
        checkout(project, "HEAD") as built,
    ):
        rebuild(workspace, release, built, None, silent)
    assert not built.root.parent.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    with pytest.raises(ReleaseError, match="git fetch"), checkout(project, "f" * 40):
        pass

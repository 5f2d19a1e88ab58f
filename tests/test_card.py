"""The model card and the bill of materials say what the files say, and nothing that varies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import StageError
from tasks.gate import judge
from tasks.params import Params
from tasks.releases.card import model_card
from tasks.releases.provenance import environment, write_bill
from tasks.scoring.metrics import score
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
        "test photos",
        "Apache-2.0",
    ):
        assert words in text
    full = params.phases["full"]
    layers, rate = str(full.trainable_layers), f"{full.learning_rate:g}"
    blocks = [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("|")
    ]
    assert all(len({len(row) for row in block}) == 1 for block in blocks)
    rows = [row for block in blocks for row in block]
    for row in (
        ["train", "100"],
        ["full", "10", layers, rate, "3", "0.2500", "0.9000"],
        ["accuracy", "0.8333 (95% Wilson: 0.5520 to 0.9530)"],
        ["1", "1.0000", "1.0000", "1.0000", "2"],
        ["3", "-", "0.0000", "0.0000", "2"],
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
    with pytest.raises(StageError, match=r"gone\.lock") as caught:
        write_bill(tmp_path / "gone.lock", PROJECT, tmp_path / "c.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c.json").exists()
    found = environment()
    assert {"keras", "numpy", "openvino"} <= found["libraries"].keys()
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found

"""The bill of materials of a release."""

import json
from pathlib import Path

import pytest

from tasks.errors import StageError
from tasks.releases.provenance import environment, write_bill
from tests.fixtures.photos import CHECKOUT

LOCK, PROJECT = CHECKOUT.root / "requirements.lock", CHECKOUT.root / "pyproject.toml"


def test_the_same_lock_gives_the_same_bytes_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bill(LOCK, PROJECT, tmp_path / "a.json")
    (tmp_path / "elsewhere").mkdir()
    lock, project = tmp_path / "elsewhere/requirements.lock", tmp_path / "elsewhere/pyproject.toml"
    lock.write_bytes(LOCK.read_bytes())
    project.write_bytes(PROJECT.read_bytes())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    write_bill(lock, project, tmp_path / "b.json")
    content = (tmp_path / "a.json").read_bytes()
    assert content == (tmp_path / "b.json").read_bytes()
    assert str(CHECKOUT.root).encode() not in content
    bill = json.loads(content)
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "handsigns"
    assert "timestamp" not in bill["metadata"]
    listed = {one["name"]: one for one in bill["components"]}
    locked = [line.split("==")[0] for line in LOCK.read_text().splitlines() if "==" in line[:60]]
    assert set(locked) == set(listed)
    assert listed["keras"]["externalReferences"][0]["hashes"]


def test_no_lock_no_bill(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"gone\.lock") as caught:
        write_bill(tmp_path / "gone.lock", PROJECT, tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.json").exists()


def test_the_environment_names_what_can_change_a_digit() -> None:
    found = environment()
    assert {"keras", "numpy", "openvino"} <= found["libraries"].keys()
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found

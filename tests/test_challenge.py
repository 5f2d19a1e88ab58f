"""A champion that cannot be examined is no reason to crown anybody."""

from pathlib import Path

import pytest

from tasks.errors import PromotionError
from tasks.labels import LABELS
from tasks.layout import Layout
from tasks.releases.challenge import challenge
from tasks.releases.pointer import Champion, Pointer, move_champion
from tasks.releases.release import publish
from tasks.services.storage import Storage
from tasks.whole import write_json


def champion_with(
    storage: Storage, folder: Path, labels: list[str], model: bytes = b"no graph"
) -> Champion:
    """Make a release champion that holds these labels and this model."""
    folder.mkdir()
    write_json(folder / "labels.json", labels)
    write_json(folder / "dataset.json", {"photos": []})
    (folder / "params.yaml").write_text("preprocess: {detail: 64}\n")
    (folder / "model.pb").write_bytes(model)
    release = publish(storage, {path.name: path for path in folder.iterdir()}, {})
    return move_champion(storage, None, Pointer(release=release.id, version=1))


def test_without_a_champion_there_is_nothing_to_compare_with(
    storage: Storage, tmp_path: Path
) -> None:
    decision = challenge(Layout(tmp_path), storage, None)
    assert (decision.won, decision.comparison) == (True, None)


def test_labels_in_another_order_are_refused(storage: Storage, tmp_path: Path) -> None:
    champion = champion_with(storage, tmp_path / "made", [*LABELS[1:], LABELS[0]])
    with pytest.raises(PromotionError, match=r"champion cannot be scored.*in this order") as caught:
        challenge(Layout(tmp_path), storage, champion)
    assert "\n" not in str(caught.value)


def test_a_champion_that_cannot_be_loaded_is_refused(storage: Storage, tmp_path: Path) -> None:
    champion = champion_with(storage, tmp_path / "made", list(LABELS))
    with pytest.raises(PromotionError, match=r"champion cannot be scored.*model\.pb"):
        challenge(Layout(tmp_path), storage, champion)


def test_a_champion_whose_release_is_gone_is_refused(storage: Storage, tmp_path: Path) -> None:
    nowhere = Champion(Pointer(release="0" * 32, version=1), "etag")
    with pytest.raises(PromotionError, match=r"champion cannot be scored.*no complete release"):
        challenge(Layout(tmp_path), storage, nowhere)

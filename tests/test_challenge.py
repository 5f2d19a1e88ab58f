"""A champion that cannot be examined is no reason to set_champion anybody."""

from pathlib import Path

import numpy as np
import pytest

from tasks import audit, preprocess
from tasks.data.dataset import open_dataset
from tasks.errors import PromotionError
from tasks.io import write_json
from tasks.model.inference import Classifier
from tasks.params import LABELS, Params
from tasks.project import Project
from tasks.releases.challenger import compare_with_champion
from tasks.releases.pointer import Champion, Pointer, move_champion
from tasks.releases.release import publish
from tasks.services.s3 import Storage
from tasks.stage import Context
from tests.fixtures.photos import write_photos


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
    decision = compare_with_champion(Project(tmp_path), storage, None)
    assert (decision.won, decision.comparison) == (True, None)


def test_labels_in_another_order_are_refused(storage: Storage, tmp_path: Path) -> None:
    champion = champion_with(storage, tmp_path / "made", [*LABELS[1:], LABELS[0]])
    with pytest.raises(PromotionError, match=r"champion cannot be scored.*in this order") as caught:
        compare_with_champion(Project(tmp_path), storage, champion)
    assert "\n" not in str(caught.value)


def test_a_champion_that_cannot_be_loaded_is_refused(storage: Storage, tmp_path: Path) -> None:
    champion = champion_with(storage, tmp_path / "made", list(LABELS))
    with pytest.raises(PromotionError, match=r"champion cannot be scored.*model\.pb"):
        compare_with_champion(Project(tmp_path), storage, champion)


def test_photos_that_went_during_the_run_are_named(
    storage: Storage, tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path)
    context = Context(project, params)
    write_photos(project.data / "train", 8)
    audit.run(context)
    preprocess.run(context)
    dataset = open_dataset(project.dataset)
    names = [dataset.names[row] for row in dataset.rows("test")]
    told = [{"name": name, "probabilities": [1 / 6] * 6} for name in names]
    write_json(project.predictions, {"photos": told})
    champion = champion_with(storage, tmp_path / "made", list(LABELS))
    even = Classifier(lambda images: np.full((len(images), 6), 1 / 6, np.float32), 64, 32)
    monkeypatch.setattr("tasks.releases.challenger.open_release", lambda _folder: even)
    assert compare_with_champion(project, storage, champion).won
    gone = project.data / names[0]  # a path, for every class has a photo of this name
    gone.unlink()
    with pytest.raises(PromotionError, match=rf"1 unreadable.*'{gone.name}' \(no such file\)"):
        compare_with_champion(project, storage, champion)


def test_a_champion_whose_release_is_gone_is_refused(storage: Storage, tmp_path: Path) -> None:
    nowhere = Champion(Pointer(release="0" * 32, version=1), "etag")
    with pytest.raises(PromotionError, match=r"champion cannot be scored.*no complete release"):
        compare_with_champion(Project(tmp_path), storage, nowhere)

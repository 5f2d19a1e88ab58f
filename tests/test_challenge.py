"""A new model is compared with the champion on photos that are new to the champion."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import audit, preprocess
from tasks.data.dataset import open_dataset
from tasks.errors import PromotionError, ServiceError
from tasks.io import read_json, write_json
from tasks.model.inference import Classifier
from tasks.params import Params, load_params
from tasks.project import Project
from tasks.releases.champion import compare_with_champion
from tasks.releases.pointer import KEY, Champion, Pointer, move_champion
from tasks.releases.release import publish
from tasks.services.s3 import S3Address, Storage
from tasks.stage import Context
from tests.fixtures.photos import CHECKOUT, LABELS, write_photos


def champion_with(
    storage: Storage, folder: Path, labels: list[str], photos: Any = (), model: bytes = b"no graph"
) -> Champion:
    """Make a release champion that holds these labels, photos and this model."""
    folder.mkdir()
    write_json(folder / "labels.json", labels)
    write_json(folder / "dataset.json", {"photos": list(photos)})
    (folder / "params.yaml").write_text("preprocess: {detail: 64}\n")
    (folder / "model.pb").write_bytes(model)
    release = publish(storage, {path.name: path for path in folder.iterdir()}, {})
    return move_champion(storage, None, Pointer(release=release.id, version=1))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with photos, split, and a prediction for each test photo."""
    project = Project(tmp_path_factory.mktemp("challenge"))
    params = load_params(CHECKOUT.params)
    none = params.synthetic.model_copy(update={"per_class": 0})
    context = Context(project, params.model_copy(update={"synthetic": none}))
    write_photos(project.data / "train", 8)
    audit.run(context)
    preprocess.run(context)
    told = [{"name": name, "probabilities": [1 / 6] * 6} for name in held_out(project)]
    write_json(project.predictions, {"photos": told})
    return project.root


@pytest.fixture
def project(
    prepared: Path, tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> Project:
    forward = lambda images: np.full((len(images), 6), 1 / 6, np.float32)  # noqa: E731
    even = Classifier(forward, params.preprocess, LABELS, 32)
    monkeypatch.setattr("tasks.releases.champion.open_release", lambda _folder: even)
    shutil.copytree(prepared, tmp_path / "checkout")
    return Project(tmp_path / "checkout")


def held_out(project: Project) -> list[str]:
    """Names of the test photos; paths, for every class has photos of the same names."""
    dataset = open_dataset(project.dataset)
    return [dataset.names[row] for row in dataset.rows("test")]


def test_a_champion_that_cannot_be_loaded_is_refused(storage: Storage, tmp_path: Path) -> None:
    decision = compare_with_champion(Project(tmp_path), storage, None)
    assert (decision.won, decision.comparison) == (True, None)
    nowhere = Champion(Pointer(release="0" * 32, version=1), "etag")
    twice = champion_with(storage, tmp_path / "twice", ["0", "0"])
    storage.remove(KEY)
    no_graph = champion_with(storage, tmp_path / "no graph", list(LABELS))
    for champion, words in (
        (nowhere, "no complete release"),
        (twice, "must list different labels"),
        (no_graph, r"model\.pb"),
    ):
        with pytest.raises(PromotionError, match=rf"champion cannot be scored.*{words}") as caught:
            compare_with_champion(Project(tmp_path), storage, champion)
        assert "\n" not in str(caught.value)
    down = Storage(S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "k", "s"))
    with pytest.raises(ServiceError):  # a service that fails says nothing of the champion
        compare_with_champion(Project(tmp_path), down, nowhere)


@pytest.mark.parametrize(
    ("labels", "difference"),
    [
        (("0", "1", "bus"), "only the champion has bus and only the new model has 2, 3, 4, 5"),
        (LABELS[::-1], "they are in another order"),
    ],
)
def test_a_champion_with_other_labels_is_not_comparable(
    project: Project,
    storage: Storage,
    tmp_path: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    labels: tuple[str, ...],
    difference: str,
) -> None:
    champion = champion_with(storage, tmp_path / "made", [*labels])
    other = Classifier(lambda _: pytest.fail("scored"), params.preprocess, labels, 32)
    monkeypatch.setattr("tasks.releases.champion.open_release", lambda _folder: other)
    decision = compare_with_champion(project, storage, champion)
    assert (decision.won, decision.comparison) == (False, None)
    reason = "not comparable with the champion, for their labels differ: "
    assert decision.reason == reason + difference


def test_photos_that_went_during_the_run_are_named(
    project: Project, storage: Storage, tmp_path: Path
) -> None:
    champion = champion_with(storage, tmp_path / "made", list(LABELS))
    decision = compare_with_champion(project, storage, champion)
    assert decision.won
    assert decision.comparison is not None
    assert decision.comparison.champion.n == len(held_out(project))
    gone = project.data / held_out(project)[0]
    gone.unlink()
    with pytest.raises(PromotionError, match=rf"1 unreadable.*'{gone.name}' \(no such file\)"):
        compare_with_champion(project, storage, champion)


@pytest.mark.parametrize("by_path", [True, False])
def test_photos_that_the_champion_trained_on_and_their_near_duplicates_are_left_out(
    project: Project, storage: Storage, tmp_path: Path, by_path: bool
) -> None:
    names = held_out(project)
    trained, copy = names[0], names[1]
    audited = read_json(project.audit)
    original = "train/0/original.png"  # only the champion's training split had it
    write_json(project.audit, {**audited, "groups": [[original, copy]]})
    known = [trained, original if by_path else Path(original).name]
    photos = [{"name": name, "split": "train", "label": "0"} for name in known]
    photos.append({"name": names[2], "split": "test", "label": "0"})
    champion = champion_with(storage, tmp_path / "made", list(LABELS), photos)
    found = compare_with_champion(project, storage, champion).comparison
    assert found is not None
    assert found.champion.n == len(names) - 2


def test_a_champion_that_trained_on_every_test_photo_is_refused(
    project: Project, storage: Storage, tmp_path: Path
) -> None:
    photos = [{"name": name, "split": "val", "label": "0"} for name in held_out(project)]
    champion = champion_with(storage, tmp_path / "made", list(LABELS), photos)
    with pytest.raises(PromotionError, match="trained on every test photo"):
        compare_with_champion(project, storage, champion)

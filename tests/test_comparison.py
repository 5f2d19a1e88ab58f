"""A new model beside the champion: the promotion rule, and which photos are compared."""

import shutil
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import audit, preprocess
from tasks.data.dataset import find_photos, open_dataset
from tasks.errors import DataError, PromotionError, ServiceError
from tasks.io import read_json, write_json
from tasks.params import load_params
from tasks.project import Project
from tasks.releases import comparison
from tasks.releases.champion import KEY, Champion, Pointer, move_champion
from tasks.releases.comparison import (
    LOSS_MARGIN,
    compare_releases,
    compare_with_champion,
    mcnemar,
)
from tasks.releases.release import publish
from tasks.services.s3 import S3Address, Storage
from tasks.stage import Context
from tests.fixtures.photos import CHECKOUT, LABELS, write_photos

FEW = settings(max_examples=30, deadline=None)  # a busy machine is no fault
SAME = "no significant difference"


def compare(champion: np.ndarray, challenger: np.ndarray, y: np.ndarray) -> comparison.Comparison:
    return comparison.compare(champion, challenger, y, [f"{n}.png" for n in range(len(y))], LABELS)


def certain(classes: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Probabilities that name `classes` with `confidence`; float64, (n, labels)."""
    p = np.full((len(classes), len(LABELS)), (1 - confidence) / (len(LABELS) - 1))
    p[np.arange(len(classes)), classes] = confidence
    return p


def models(both: int, won: int, lost: int, confidence: float = 0.9) -> list[np.ndarray]:
    """Champion, challenger and labels with these counts of right answers, and two wrong ones."""
    y = np.arange(both + won + lost + 2) % len(LABELS)
    champion, challenger = y.copy(), y.copy()
    champion[both : both + won] += 1
    challenger[both + won : both + won + lost] += 1
    champion[-2:] += 1
    challenger[-2:] += 1
    named = (certain(champion % len(LABELS)), certain(challenger % len(LABELS), confidence))
    return [*named, y]


@FEW
@given(st.integers(1, 40), st.integers(0, 25), st.integers(0, 25))
def test_the_test_is_mcnemars_and_swapping_the_models_mirrors_it(
    both: int, won: int, lost: int
) -> None:
    tail = sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert mcnemar(won, lost) == pytest.approx(min(1.0, 2 * tail))
    champion, challenger, y = models(both, won, lost)
    one, other = compare(champion, challenger, y), compare(challenger, champion, y)
    assert (one.won, one.lost) == (other.lost, other.won) == (won, lost)
    assert one.p_value == other.p_value == mcnemar(won, lost)
    assert other.verdict == {"better": "worse", "worse": "better"}.get(one.verdict, SAME)
    assert one.no_worse or other.no_worse


@pytest.mark.parametrize(
    ("won", "lost", "verdict", "words"),
    [
        (6, 0, "better", "right on significantly more photos than the champion: "),
        (0, 6, "worse", "right on significantly fewer photos than the champion: "),
        (12, 2, "better", "significantly more"),
        (2, 12, "worse", "significantly fewer"),
        (5, 0, SAME, "within noise, and the loss is "),
        (0, 5, SAME, "within noise, and the loss is "),
        (3, 3, SAME, "within noise, and the loss is "),
    ],
)
def test_significance_decides_and_within_noise_the_loss(
    won: int, lost: int, verdict: str, words: str
) -> None:
    for confidence, lower in ((0.99, True), (0.7, False)):
        result = compare(*models(2000, won, lost, confidence))
        old, new = result.champion, result.challenger
        assert (result.verdict, new.loss < old.loss) == (verdict, lower)
        assert result.no_worse == (lower if verdict == SAME else verdict == "better")
        assert words in result.reason
        if verdict == SAME:
            assert f"{'at most' if lower else 'more than'} 0.01 higher: " in result.reason
        assert f"accuracy {old.accuracy:.4f} -> {new.accuracy:.4f}" in result.reason
        assert f"loss {old.loss:.4f} -> {new.loss:.4f}" in result.reason
        assert f"{won} photos won, {lost} lost (McNemar p = " in result.reason


def test_the_loss_may_rise_by_its_margin_and_no_more() -> None:
    y = np.arange(60) % len(LABELS)
    kept = 0.9 * np.exp(-LOSS_MARGIN)
    for confidence, allowed in ((0.9, True), (kept + 1e-6, True), (kept - 1e-6, False)):
        assert compare(certain(y, 0.9), certain(y, confidence), y).no_worse is allowed


def test_changed_photos_and_recalls_are_listed() -> None:
    y = np.array([0, 1, 2, 3, 0, 4])
    was, now = np.array([0, 0, 2, 0, 5, 4]), np.array([0, 1, 5, 1, 0, 4])
    result = compare(certain(was), certain(now), y)
    assert [tuple(photo.values()) for photo in result.changed] == [
        ("1.png", "1", "0", "1", "right"),
        ("2.png", "2", "2", "5", "wrong"),
        ("3.png", "3", "0", "1", "still wrong"),
        ("4.png", "0", "5", "0", "right"),
    ]
    assert [tuple(one.values()) for one in result.recalls] == [
        ("0", 2, 0.5, 1.0, 0.5),
        ("1", 1, 0.0, 1.0, 1.0),
        ("2", 1, 1.0, 0.0, -1.0),
        ("3", 1, 0.0, 0.0, 0.0),
        ("4", 1, 1.0, 1.0, 0.0),
        ("5", 0, None, None, None),
    ]
    assert result.to_json()["changed"][0]["name"] == "1.png"
    assert compare(certain(was), certain(was), y).changed == ()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with photos, split, and a prediction for each test photo."""
    project = Project(tmp_path_factory.mktemp("comparison"))
    params = load_params(CHECKOUT.params)
    none = params.synthetic.model_copy(update={"per_class": 0})
    context = Context(project, params.model_copy(update={"synthetic": none}))
    write_photos(project.data / "train", 8)
    audit.run(context)
    preprocess.run(context)
    even = [{"name": name, "probabilities": [1 / 6] * 6} for name in held_out(project)]
    write_json(project.predictions, {"photos": even})
    return project.root


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Project:
    shutil.copytree(prepared, tmp_path / "checkout")
    return Project(tmp_path / "checkout")


def held_out(project: Project) -> list[str]:
    """Names of the test photos; paths, for every class has photos of the same names."""
    dataset = open_dataset(project.dataset)
    return [dataset.names[row] for row in dataset.rows("test")]


def write_release(
    folder: Path, model: bytes, labels: Any = LABELS, photos: dict[str, str] | None = None
) -> Path:
    """Write what is read of a release: these labels, this model, and the splits of photos."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [{"name": name, "split": split} for name, split in (photos or {}).items()]
    write_json(folder / "labels.json", [*labels])
    write_json(folder / "dataset.json", {"photos": rows})
    (folder / "params.yaml").write_text("preprocess: {detail: 64}\n")
    (folder / "model.pb").write_bytes(model)
    return folder


def make_champion(storage: Storage, *release: Any) -> Champion:
    """Publish such a release and make it champion."""
    folder = write_release(*release)
    made = publish(storage, {path.name: path for path in folder.iterdir()}, {})
    storage.remove(KEY)
    return move_champion(storage, None, Pointer(release=made.id, version=1))


def test_a_champion_that_cannot_be_scored_or_has_other_labels_is_not_replaced(
    project: Project, storage: Storage, tmp_path: Path, graphs: tuple[bytes, bytes]
) -> None:
    decision = compare_with_champion(project, storage, None)
    assert (decision.won, decision.comparison) == (True, None)
    nowhere = Champion(Pointer(release="0" * 32, version=1), "etag")
    for champion, words in (
        (nowhere, "no complete release"),
        (make_champion(storage, tmp_path / "made", graphs[0], "00"), "must list different labels"),
        (make_champion(storage, tmp_path / "made", b"no graph"), r"model\.pb"),
    ):
        with pytest.raises(PromotionError, match=rf"champion cannot be scored.*{words}") as caught:
            compare_with_champion(project, storage, champion)
        assert "\n" not in str(caught.value)
    down = Storage(S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "k", "s"))
    with pytest.raises(ServiceError):  # a service that fails says nothing of the champion
        compare_with_champion(project, down, nowhere)
    for labels, difference in (
        ([*LABELS[:5], "bus"], "only the champion has bus and only the new model has 5"),
        (LABELS[::-1], "they are in another order"),
    ):
        champion = make_champion(storage, tmp_path / "made", graphs[0], labels)
        decision = compare_with_champion(project, storage, champion)
        assert (decision.won, decision.comparison) == (False, None)
        reason = "not comparable with the champion, for their labels differ: "
        assert decision.reason == reason + difference


def test_photos_that_the_champion_trained_on_and_their_near_duplicates_are_left_out(
    project: Project, storage: Storage, tmp_path: Path, graphs: tuple[bytes, bytes]
) -> None:
    names, made = held_out(project), (storage, tmp_path / "made", graphs[0], LABELS)
    original = "train/0/original.png"  # only the champion's training split had it
    write_json(project.audit, {**read_json(project.audit), "groups": [[original, names[1]]]})
    for known in ([names[0], original], [names[0], Path(original).name]):
        champion = make_champion(*made, {**dict.fromkeys(known, "train"), names[2]: "test"})
        decision = compare_with_champion(project, storage, champion)
        found = decision.comparison
        assert found is not None
        assert (found.champion.n, decision.won) == (len(names) - 2, found.no_worse)
    gone = project.data / names[-1]
    gone.unlink()
    with pytest.raises(DataError, match=rf"1 photos .* cannot .*'{gone.name}' \(no such file\)"):
        compare_with_champion(project, storage, champion)
    champion = make_champion(*made, dict.fromkeys(names, "val"))
    with pytest.raises(PromotionError, match="trained on every test photo"):
        compare_with_champion(project, storage, champion)


def test_two_releases_are_compared_on_the_photos_that_neither_was_trained_on(
    project: Project, tmp_path: Path, graphs: tuple[bytes, bytes]
) -> None:
    keys = [photo.key for photo in find_photos(project.data)]
    first = write_release(tmp_path / "a", graphs[0], LABELS, dict.fromkeys(keys[:3], "train"))
    splits = {**dict.fromkeys(keys[3:5], "val"), **dict.fromkeys(keys[5:], "test")}
    second = write_release(tmp_path / "b", graphs[1], LABELS, splits)
    found, picture = compare_releases(project, {"1": first, "2": second})
    assert [one["support"] for one in found.recalls] == [3, 8, 8, 8, 8, 8]
    assert found.champion.n == len(keys) - 5
    assert {one["name"] for one in found.changed} <= set(keys[5:])
    assert all(one["label"] == one["name"].split("/")[1] for one in found.changed)
    assert picture == project.artifacts / "compare.png"
    with Image.open(picture) as drawn:
        assert drawn.width == 1200
    few = write_release(tmp_path / "few", graphs[0], LABELS, dict.fromkeys(keys[:-2], "train"))
    assert compare_releases(project, {"few": few, "2": second})[1] == picture
    assert compare_releases(project, {"1": first, "same": first})[1] is None
    assert not picture.exists()
    other = write_release(tmp_path / "c", graphs[0], [*LABELS[:5], "bus"])
    with pytest.raises(
        DataError, match=r"cannot be compared.* only 1 has 5 and only other has bus"
    ):
        compare_releases(project, {"1": first, "other": other})
    seen = write_release(tmp_path / "d", graphs[0], LABELS, dict.fromkeys(keys, "train"))
    with pytest.raises(DataError, match=r"All 48 photos in data/ .* in the training"):
        compare_releases(project, {"1": first, "seen": seen})

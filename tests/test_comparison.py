"""A new model beside the champion: the promotion rule, and which photos are compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks import audit, preprocess
from tasks.data.dataset import find_photos, open_dataset
from tasks.errors import DataError, PromotionError, ServiceError
from tasks.io import read_json, write_json
from tasks.params import load_params
from tasks.project import Project
from tasks.releases import comparison
from tasks.releases.champion import Champion, Pointer
from tasks.releases.comparison import LOSS_MARGIN, compare_releases, compare_with_champion
from tasks.releases.release import fetch
from tasks.services.s3 import S3Address, Storage
from tasks.stage import Context
from tests.fixtures.faults import one_line
from tests.fixtures.photos import CHECKOUT, LABELS, write_photos
from tests.fixtures.publishing import publish_contents

SAME = "no significant difference"


def compare(champion: np.ndarray, challenger: np.ndarray, y: np.ndarray) -> comparison.Comparison:
    return comparison.compare(champion, challenger, y, [f"{n}.png" for n in range(len(y))], LABELS)


def certain(classes: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Probabilities that name `classes` with `confidence`; float64, (n, labels)."""
    p = np.full((len(classes), len(LABELS)), (1 - confidence) / (len(LABELS) - 1))
    p[np.arange(len(classes)), classes % len(LABELS)] = confidence
    return p


@pytest.mark.parametrize(
    ("won", "lost", "p_value", "verdict"),
    [
        (6, 0, 2 / 2**6, "better"),
        (12, 2, 2 * (1 + 14 + 91) / 2**14, "better"),
        (5, 0, 2 / 2**5, SAME),
        (3, 3, 1, SAME),
        (0, 0, 1, SAME),
    ],
)
def test_mcnemars_test_or_loss_decides(won: int, lost: int, p_value: float, verdict: str) -> None:
    y = np.arange(2000 + won + lost) % len(LABELS)
    old, new = y.copy(), y.copy()
    old[:won] += 1
    new[won : won + lost] += 1
    old[-2:] = new[-2:] = y[-2:] + 1  # both are wrong
    for confidence, lower in ((0.99, True), (0.7, False)):
        models = certain(old), certain(new, confidence)
        result, mirrored = compare(*models, y), compare(*models[::-1], y)
        was, now = result.champion, result.challenger
        assert (result.verdict, now.loss < was.loss) == (verdict, lower)
        assert (result.won, result.lost, result.p_value) == (won, lost, pytest.approx(p_value))
        assert (mirrored.won, mirrored.lost, mirrored.p_value) == (lost, won, result.p_value)
        if verdict == SAME:
            assert (result.no_worse, mirrored.no_worse) == (lower, not lower)
            by = "at most" if lower else "more than"
            words = f"within noise, and the loss is {by} 0.01 higher"
        else:
            assert (result.no_worse, mirrored.no_worse) == (True, False)
            words = "right on significantly more photos than the champion"
            assert "right on significantly fewer photos than the champion: " in mirrored.reason
        assert mirrored.verdict == (SAME if verdict == SAME else "worse")
        assert result.reason.endswith(
            f"{words}: accuracy {was.accuracy:.4f} -> {now.accuracy:.4f}, loss {was.loss:.4f} -> "
            f"{now.loss:.4f}, photos won {won}, lost {lost} (McNemar p = {p_value:.3g})"
        )


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
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
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
    return project


def held_out(project: Project) -> list[str]:
    """Names of the test photos; paths, for every class has photos of the same names."""
    dataset = open_dataset(project.dataset)
    return [dataset.names[row] for row in dataset.rows("test")]


def make_release(
    storage: Storage, folder: Path, model: bytes, labels: Any = LABELS, **splits: Any
) -> Champion:
    """Publish a release with this model, these labels, and photos by split; as champion."""
    contents = {
        "labels.json": [*labels],
        "dataset.json": {
            "photos": [{"name": one, "split": name} for name in splits for one in splits[name]]
        },
        "params.yaml": b"preprocess: {detail: 64}\n",
        "model.pb": model,
    }
    release = publish_contents(storage, folder / "made", contents)
    return Champion(Pointer(release=release.id, version=1), "etag")


def test_a_champion_that_cannot_be_scored_or_has_other_labels_is_not_replaced(
    project: Project, storage: Storage, tmp_path: Path, graphs: tuple[bytes, bytes]
) -> None:
    decision = compare_with_champion(project, storage, None)
    assert (decision.won, decision.comparison) == (True, None)
    nowhere = Champion(Pointer(release="0" * 32, version=1), "etag")
    for champion, words in (
        (nowhere, "no complete release"),
        (make_release(storage, tmp_path, graphs[0], "00"), "must list different labels"),
        (make_release(storage, tmp_path, b"no graph"), r"model\.pb"),
    ):
        with one_line(PromotionError, rf"champion cannot be scored.*{words}"):
            compare_with_champion(project, storage, champion)
    down = Storage(S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "k", "s"))
    with pytest.raises(ServiceError):  # a service that fails says nothing of the champion
        compare_with_champion(project, down, nowhere)
    for labels, difference in (
        ([*LABELS[:5], "bus"], "only the champion has bus and only the new model has 5"),
        (LABELS[::-1], "they are in another order"),
    ):
        champion = make_release(storage, tmp_path, graphs[0], labels)
        decision = compare_with_champion(project, storage, champion)
        assert (decision.won, decision.comparison) == (False, None)
        reason = "not comparable with the champion, for their labels differ: "
        assert decision.reason == reason + difference


def test_photos_that_the_champion_trained_on_and_their_near_duplicates_are_left_out(
    project: Project, storage: Storage, tmp_path: Path, graphs: tuple[bytes, bytes]
) -> None:
    names, made = held_out(project), (storage, tmp_path, graphs[0])
    original = "train/0/original.png"  # only the champion's training split had it
    write_json(project.audit, {**read_json(project.audit), "groups": [[original, names[1]]]})
    for known in (original, Path(original).name):
        champion = make_release(*made, train=[names[0], known], test=[names[2]])
        found = compare_with_champion(project, storage, champion).comparison
        assert found
        assert found.champion.n == len(names) - 2
    gone = project.data / names[-1]
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(DataError, match=rf"1 photos .* cannot .*'{gone.name}' .*No such file"):
        compare_with_champion(project, storage, champion)
    gone.write_bytes(content)
    with pytest.raises(PromotionError, match="trained on every test photo"):
        compare_with_champion(project, storage, make_release(*made, val=names))


def test_two_releases_are_compared_on_the_photos_that_neither_was_trained_on(
    project: Project, storage: Storage, tmp_path: Path, graphs: tuple[bytes, bytes]
) -> None:
    keys = [photo.key for photo in find_photos(project.data)]

    def made(*contents: Any, **splits: Any) -> Path:
        release = make_release(storage, tmp_path, *contents, **splits).pointer.release
        return fetch(storage, release, tmp_path)

    first = made(graphs[0], train=keys[:3])
    second = made(graphs[1], val=keys[3:5], test=keys[5:])
    found, picture = compare_releases(project, {"1": first, "2": second})
    assert [one["support"] for one in found.recalls] == [3, 8, 8, 8, 8, 8]
    assert found.champion.n == len(keys) - 5
    assert {one["name"] for one in found.changed} <= set(keys[5:])
    assert all(one["label"] == one["name"].split("/")[1] for one in found.changed)
    assert picture == project.artifacts / "compare.png"
    with Image.open(picture) as drawn:
        assert drawn.width == 1440
    few = made(graphs[0], train=keys[:-2])
    assert compare_releases(project, {"few": few, "2": second})[1] == picture
    assert compare_releases(project, {"1": first, "same": first})[1] is None
    assert not picture.exists()
    for other, words in (
        (made(graphs[0], [*LABELS[:5], "bus"]), "only 1 has 5 and only other has bus"),
        (made(graphs[0], train=keys), r"All 48 photos in data/ .*training"),
    ):
        with pytest.raises(DataError, match=words):
            compare_releases(project, {"1": first, "other": other})

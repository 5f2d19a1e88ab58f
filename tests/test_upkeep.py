"""Prune removes what nobody needs; monitor compares production with what a release saw."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flows.upkeep import compare_with_reference
from tasks.data.capture import FolderStore
from tasks.data.traffic import Counts, Traffic, count_window, read_result
from tasks.errors import ServiceError
from tasks.io import write_json
from tasks.model.augment import enlarge
from tasks.model.files import export_graph
from tasks.model.inference import Engine
from tasks.project import Project
from tasks.releases.catalog import Pruned, prune_releases
from tasks.releases.champion import Move, read_champion, set_champion
from tasks.releases.quality import draw_quality, draw_traffic, read_quality
from tasks.releases.release import fetch, list_releases, verify
from tasks.services.dvc import Pipeline
from tasks.services.mlflow import CHALLENGER, Registry, Version
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import with_stages
from tests.fixtures.faults import on, proxy_to, resetting
from tests.fixtures.photos import CHECKOUT, LABELS, photo
from tests.fixtures.publishing import publish_contents, record, register
from tests.fixtures.service import capture

RELEASE = "0123456789abcdef" * 2


def test_only_what_champion_rollback_alias_tag_and_age_need_stays_though_a_prune_breaks_off(
    storage: Storage, tracking_uri: str, tmp_path: Path
) -> None:
    registry, project = Registry(tracking_uri, "signs", tmp_path / "ml"), Project(tmp_path / "at")

    def add(created: str = "2020-01-01T00:00:00+00:00", run: Any = None) -> Version:
        content = {"metrics.json": len(registry.versions())}
        release = publish_contents(storage, project.root, content, created=created)
        fetch(storage, release.id, project.releases)
        return register(registry, release, run)

    def prune(storage: Storage = storage, dry_run: bool = False) -> Pruned:
        return prune_releases(project, storage, registry, 1, 0.0, dry_run)

    (tmp_path / "model.keras").write_bytes(b"a model")
    first = add(run=record(registry, "0" * 32, tmp_path))
    second, third = add(), add()
    for version in (first, second, third):
        set_champion(storage, version, read_champion(storage), "better", {})
    challenger, tagged, lost = (add() for _ in range(3))
    young = add(created="2999-01-01T00:00:00+00:00")
    registry.set_alias(CHALLENGER, challenger.number)
    registry.set_tags(tagged.number, {"customer": "yes"})

    assert [*tmp_path.glob("ml/**/model.keras")]
    planned = prune(dry_run=True)
    assert len(list_releases(storage)) == 7
    assert set(planned.releases) == {first.content_id, lost.content_id}
    assert planned.bytes > 0
    assert planned.kept.pop(str(young.content_id))
    assert planned.kept == {
        third.content_id: "champion",
        second.content_id: "champion 1 before the present",
        challenger.content_id: "alias challenger",
        tagged.content_id: "tag customer",
    }
    # One that breaks off leaves complete releases, and the next completes it.
    with proxy_to(storage.address.endpoint_url) as proxy:
        through = Storage(replace(storage.address, endpoint_url=proxy.url))
        with proxy.failing(on("^DELETE", resetting, range(2, 9))), pytest.raises(ServiceError):
            prune(through)
    removed = [request for request in proxy.requests if request.startswith("DELETE")]
    assert removed[0].endswith("/manifest.json")
    assert len(list_releases(storage)) == 6
    for release in list_releases(storage):
        verify(storage, release)
    assert prune().releases == planned.releases
    assert not [path for path in tmp_path.glob("ml/**/*") if path.is_file()]
    kept = {one.content_id for one in (second, third, challenger, tagged, young)}
    assert {key.split("/")[1] for key in storage.keys("releases/")} == kept
    assert {one.content_id for one in registry.versions()} == kept
    assert {path.name for path in project.releases.iterdir()} == kept
    assert prune().releases == ()


def test_photos_of_kept_releases_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, kept = with_stages(tmp_path / "checkout"), list[str]()
    monkeypatch.chdir(project.root)
    pipeline = Pipeline(project)
    for content in (b"1", b"2", b"3"):
        (project.data / "train/0/new.png").write_bytes(content)
        pipeline.version_data("photos")
        kept.append(project.data_file.read_text())
    assert pipeline.remove_unused(kept[:1], dry_run=True) == 0
    assert pipeline.remove_unused(kept[:1]) > 0
    for version, there in zip(kept, (True, False, True), strict=True):
        project.data_file.write_text(version)
        assert Pipeline(project).checkout_data() is there


def test_answers_are_counted_by_the_hour_and_release_and_removed_in_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first, second = Traffic(store), Traffic(store)
    for release in (RELEASE, "another", RELEASE):
        first.add(RELEASE, "3", 0.95)
        second.add(release, "0", 1.0)
    assert count_window(store, RELEASE, hours=2).labels == {}
    for traffic in (first, second, second):
        traffic.save()
    found = count_window(store, RELEASE, hours=2)
    assert (found.labels, found.confidences) == ({"3": 3, "0": 2}, [*[0] * 9, 5])
    for hours in (5, 30, 24 * 31):
        hour = f"{datetime.now(UTC) - timedelta(hours=hours):%Y-%m-%dT%H}"
        content = b'{"labels": {"1": 1}, "confidences": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]}'
        store.put(f"traffic/{hour}/{RELEASE}-x.json", content)
    assert count_window(store, RELEASE, hours=24).labels == {"3": 3, "0": 2, "1": 1}
    assert not [key for key in store.keys("traffic/") if hour in key]
    assert read_result(store, RELEASE) == {}


def test_champions_are_scored_on_what_all_were_tested_on(storage: Storage, tmp_path: Path) -> None:
    def champion(version: int, labels: str, seconds: dict[str, float] | None) -> Move:
        """A release by its probability of the second label for each photo, named by its label."""
        photos = [
            {"name": name, "label": name[0], "probabilities": [1 - second, second]}
            for name, second in (seconds or {}).items()
        ]
        name = "predictions.json" if seconds else "metrics.json"
        contents = {name: {"labels": [*labels], "photos": photos}}
        release = publish_contents(storage, tmp_path, contents)
        return Move(release=release.id, version=version, metrics={"accuracy": 0.9, "photos": 80})

    moves = [
        champion(1, "01", None),  # made by an earlier program
        champion(2, "ab", {"a1": 0.9, "b1": 0.9}),
        champion(3, "01", {"01": 0.2, "11": 0.2, "12": 0.9, "02": 0.9}),
        champion(4, "01", {"01": 0.2, "11": 0.8, "12": 0.9, "03": 0.9}),
    ]
    drift = b'{"comparisons": [{"name": "labels", "value": 0.1, "limit": 0.2}]}'
    storage.put(f"monitor/{moves[3].release}.json", drift)
    champions, photos = read_quality(storage, [*moves, moves[2]], storage)
    accuracies = [(one.version, one.common.get("accuracy")) for one in champions]
    assert accuracies == [(1, None), (2, None), (3, pytest.approx(2 / 3)), (4, 1.0)]
    assert (photos, champions[0].own["photos"]) == (3, 80)
    assert [one.drift for one in champions] == [{}, {}, {}, {"labels": 0.5}]
    draw_quality(champions, photos, tmp_path / "quality.png")
    assert cv2.imread(str(tmp_path / "quality.png")).shape[1] == 1320
    assert read_quality(storage, moves[:1], storage)[1] == 0


def test_noise_is_drift_usual_photos_are_not_and_the_sample_decides(tmp_path: Path) -> None:
    from tasks.model.network import build_model

    (tmp_path / "model.pb").write_bytes(export_graph(build_model(6, seed=1)))
    (tmp_path / "params.yaml").write_text(CHECKOUT.params.read_text())
    write_json(tmp_path / "labels.json", list(LABELS))
    engine = Engine(tmp_path / "model.pb", embeddings=True)
    photos = enlarge(np.stack([photo(n % 6, n) for n in range(60)]), engine.size)
    np.savez(
        tmp_path / "reference.npz",
        labels=np.full(6, 10),
        confidences=np.array([0] * 9 + [60]),
        embeddings=np.array([*engine.stream(photos)], np.float16),
    )

    def verdicts(name: str, counts: Counts, **kept: list[Any]) -> list[str]:
        """Of labels, confidences, and embeddings of pictures kept for these reasons."""
        store = FolderStore(tmp_path / name)
        for reason, pictures in kept.items():
            for number, picture in enumerate(pictures):
                key = capture(reason).id(number)
                content = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
                store.put(f"photos/{key[:10]}/{key}.jpg", content)
        return [one.verdict for one in compare_with_reference(tmp_path, counts, store, hours=24)]

    noise = [*np.random.default_rng(1).integers(0, 256, (60, 64, 64, 3), np.uint8)]
    usual, counts = [photo(n % 6, 1000 + n) for n in range(60)], Counts()
    assert verdicts("few", counts, sample=usual[:3]) == ["too few samples"] * 3
    for number in range(600):
        counts.add(LABELS[number % 6], 0.97)
    assert verdicts("usual", counts, sample=usual, uncertain=noise) == ["no drift"] * 3
    for _ in range(600):
        counts.add("5", 0.35)
    assert verdicts("other", counts, sample=noise) == ["drift"] * 3
    draw_traffic(tmp_path, counts, tmp_path / "traffic.png")
    assert cv2.imread(str(tmp_path / "traffic.png")).shape[1] == 1320

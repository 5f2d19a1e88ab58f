"""What prune removes, what it keeps, and what a killed one leaves behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.errors import ServiceError
from tasks.project import Project
from tasks.releases.catalog import prune_releases
from tasks.releases.champion import read_champion, set_champion
from tasks.releases.release import list_releases, publish, verify
from tasks.services.dvc import Pipeline
from tasks.services.mlflow import CHALLENGER, Registry, RunRecord, Version
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import with_stages
from tests.fixtures.photos import write_photos

OLD = "2020-01-01T00:00:00+00:00"


class Shop:
    """Releases in storage with versions in a registry, and a checkout's copies of them."""

    def __init__(self, storage: Storage, tracking_uri: str, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self.project = Project(folder / "checkout")
        self.registry = Registry(tracking_uri, "signs", folder / "mlruns")

    def add(self, created: str = OLD, run: bool = False) -> Version:
        number = len(self.registry.versions())
        file = self.folder / f"{number}.json"
        file.write_text(json.dumps(number))
        release = publish(self.storage, {"metrics.json": file}, {"created": created})
        copy = self.project.releases / release.id
        copy.mkdir(parents=True)
        (copy / "metrics.json").write_bytes(file.read_bytes())
        recorded = self._record(release.id) if run else None
        return self.registry.register(recorded, release.id, {"release_uri": release.uri})

    def _record(self, release: str) -> Any:
        import keras

        photos = keras.Input((8, 8, 3))
        pooled = keras.layers.GlobalAveragePooling2D()(photos)
        model = keras.Model(photos, keras.layers.Dense(6)(pooled))
        model.save(self.folder / "model.keras")
        example = np.zeros((1, 8, 8, 3), np.uint8)
        record = RunRecord(release, {"seed": 1})
        return self.registry.record_run(record, self.folder / "model.keras", lambda: model, example)

    def crown(self, version: Version) -> None:
        set_champion(
            self.storage, self.registry, version, read_champion(self.storage), "better", {}
        )

    def prune(self, **options: Any) -> Any:
        settings = {"keep": 1, "days": 30.0, **options}
        return prune_releases(self.project, self.storage, self.registry, **settings)


@pytest.fixture
def shop(storage: Storage, tracking_uri: str, tmp_path: Path) -> Shop:
    return Shop(storage, tracking_uri, tmp_path)


def test_only_what_champion_rollback_alias_tag_and_age_need_stays(shop: Shop) -> None:
    first, second, third = (shop.add() for _ in range(3))
    for version in (first, second, third):
        shop.crown(version)
    challenger, tagged, lost = (shop.add() for _ in range(3))
    young = shop.add(created="2999-01-01T00:00:00+00:00")
    shop.registry.set_alias(CHALLENGER, challenger.number)
    shop.registry.set_tags(tagged.number, {"customer": "yes"})

    planned = shop.prune(dry_run=True)
    assert len(list_releases(shop.storage)) == 7
    found = shop.prune()

    assert found == planned
    assert set(found.releases) == {first.content_id, lost.content_id}
    assert found.bytes > 0
    kept = {one.release: one.reason for one in found.kept}
    assert kept[third.content_id] == "champion"
    assert kept[second.content_id] == "champion 1 before the present"
    assert kept[challenger.content_id] == "alias challenger"
    assert kept[tagged.content_id] == "tag customer"
    assert young.content_id in kept
    assert set(list_releases(shop.storage)) == set(kept)
    assert {one.content_id for one in shop.registry.versions()} == set(kept)
    assert {path.name for path in shop.project.releases.iterdir()} == set(kept)
    assert shop.prune().releases == ()


def test_the_files_of_an_mlflow_run_go_with_its_release(shop: Shop) -> None:
    shop.add(run=True)
    assert [*shop.folder.glob("mlruns/**/model.keras")]
    shop.prune(keep=0, days=0)
    assert not [path for path in shop.folder.glob("mlruns/**/*") if path.is_file()]


def test_a_prune_that_stops_midway_leaves_whole_releases_and_is_completed_later(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [shop.add() for _ in range(3)]
    removed: list[str] = []
    remove = Storage.remove

    def break_off(storage: Storage, key: str) -> None:
        removed.append(key)
        if len(removed) == 2:
            raise ServiceError("S3 does not answer.")
        remove(storage, key)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", break_off)
        with pytest.raises(ServiceError):
            shop.prune(keep=0, days=0)
    assert removed[0].endswith("/manifest.json")
    for release in list_releases(shop.storage):
        verify(shop.storage, release)
    assert len(list_releases(shop.storage)) == 2
    shop.prune(keep=0, days=0)
    assert [*shop.storage.list("releases/")] == [*shop.storage.list("pruning/")] == []
    assert len(versions) == 3
    assert shop.registry.versions() == []


def test_the_photos_of_kept_releases_stay_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(project.root)
    pipeline = Pipeline(project)
    kept = []
    for seed in (1, 2, 3):
        write_photos(project.data / "train", per_class=2, seed=seed)
        pipeline.version_data("photos")
        kept.append(project.data_file.read_text())
    assert pipeline.remove_unused(kept[:1], dry_run=True) == 0
    assert pipeline.remove_unused(kept[:1]) > 0
    for content, there in zip(kept, (True, False, True), strict=True):
        project.data_file.write_text(content)
        assert Pipeline(project).checkout_data() is there

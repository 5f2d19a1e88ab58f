"""Two promotions at once: one wins, the other changes nothing and says so."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PromotionError
from tasks.releases.champion import set_champion
from tasks.releases.pointer import Champion, read_champion
from tasks.releases.release import publish
from tasks.services.mlflow import CHAMPION, Registry, Version
from tasks.services.s3 import Storage

ROUNDS = 12


class Late(Registry):
    """The real registry, to which this process comes late with the alias."""

    def __init__(self, known: Registry, wait: threading.Event, moved: threading.Event) -> None:
        super().__init__(known.tracking_uri, known.model_name)
        self._wait, self._moved = wait, moved

    def set_alias(self, alias: str, number: int) -> None:
        self._moved.set()
        assert self._wait.wait(20)
        super().set_alias(alias, number)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow on one file for both tests; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def registry(database: str, storage: Storage) -> Registry:
    return Registry(database, f"signs-{storage.address.bucket}")


@pytest.fixture
def rivals(storage: Storage, registry: Registry, tmp_path: Path) -> list[Version]:
    """Three published and registered versions."""
    from mlflow import MlflowClient

    client = MlflowClient(registry.tracking_uri, registry.tracking_uri)
    client.create_registered_model(registry.model_name)
    for name in ("one", "two", "three"):
        path = tmp_path / name
        path.write_text(name)
        release = publish(storage, {"labels.json": path})
        client.create_model_version(
            registry.model_name, str(tmp_path), tags={"content_id": release.id}
        )
    return registry.versions()


def test_of_two_promotions_at_once_one_wins_and_the_other_changes_nothing(
    storage: Storage, registry: Registry, rivals: list[Version]
) -> None:
    def attempt(version: Version, expected: Champion | None, start: threading.Barrier) -> Any:
        start.wait()
        try:
            return set_champion(storage, registry, version, expected, f"by {version.number}", {})
        except PromotionError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        for number in range(ROUNDS):
            expected, start = read_champion(storage), threading.Barrier(2)
            now = expected and expected.pointer.release
            two = [rival for rival in rivals if rival.content_id != now][:2]
            outcomes = list(pool.map(lambda one, e=expected, b=start: attempt(one, e, b), two))
            (lost,) = [one for one in outcomes if isinstance(one, PromotionError)]
            (won,) = [one for one in outcomes if not isinstance(one, PromotionError)]
            assert "changed meanwhile" in str(lost)
            champion, alias = read_champion(storage), registry.version_by_alias(CHAMPION)
            assert champion is not None
            assert alias is not None
            assert champion.pointer.version == won.version == alias.number
            assert len(champion.pointer.moves) == number + 1


def test_a_promotion_that_is_overtaken_before_its_alias_leaves_the_later_one(
    storage: Storage, registry: Registry, rivals: list[Version]
) -> None:
    wait, moved = threading.Event(), threading.Event()
    late = Late(registry, wait, moved)
    slow = threading.Thread(target=set_champion, args=(storage, late, rivals[0], None, "slow", {}))
    slow.start()
    assert moved.wait(20)
    registry.set_alias(CHAMPION, rivals[0].number)  # as the next run mends it
    set_champion(storage, registry, rivals[1], read_champion(storage), "quick", {})
    wait.set()
    slow.join(30)
    champion, alias = read_champion(storage), registry.version_by_alias(CHAMPION)
    assert champion is not None
    assert alias is not None
    assert champion.pointer.version == alias.number == rivals[1].number

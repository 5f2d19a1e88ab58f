"""Two promotions at once: one wins, the other changes nothing and says so."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PromotionError
from tasks.releases.champion import Champion, read_champion, set_champion
from tasks.releases.release import publish
from tasks.services.mlflow import CHAMPION, Registry, Version
from tasks.services.s3 import Storage

ROUNDS = 12


@pytest.fixture
def registry(tracking_uri: str) -> Registry:
    return Registry(tracking_uri, "signs")


@pytest.fixture
def rivals(storage: Storage, registry: Registry, tmp_path: Path) -> list[Version]:
    """Three published and registered versions."""
    versions = []
    for name in ("one", "two", "three"):
        path = tmp_path / name
        path.write_text(name)
        release = publish(storage, {"labels.json": path})
        versions.append(registry.register(None, release.id, {"release_uri": release.uri}))
    return versions


class Late(Registry):
    """The real registry, to which this process comes late with the alias."""

    def __init__(self, known: Registry) -> None:
        super().__init__(known.tracking_uri, known.model_name)
        self.may, self.asked = threading.Event(), threading.Event()

    def set_alias(self, alias: str, number: int) -> None:
        self.asked.set()
        assert self.may.wait(20)
        super().set_alias(alias, number)


def test_of_two_promotions_at_once_one_wins_and_no_alias_is_left_behind(
    storage: Storage, registry: Registry, rivals: list[Version]
) -> None:
    def attempt(version: Version, expected: Champion | None, start: threading.Barrier) -> Any:
        start.wait()
        try:
            return set_champion(storage, registry, version, expected, f"by {version.number}", {})
        except PromotionError as error:
            return error

    def leader() -> Champion:
        champion, alias = read_champion(storage), registry.version_by_alias(CHAMPION)
        assert champion is not None
        assert alias is not None
        assert champion.pointer.version == alias.number
        return champion

    with ThreadPoolExecutor(2) as pool:
        for number in range(ROUNDS):
            expected, start = read_champion(storage), threading.Barrier(2)
            now = expected and expected.pointer.release
            two = [rival for rival in rivals if rival.content_id != now][:2]
            outcomes = list(pool.map(lambda one, e=expected, b=start: attempt(one, e, b), two))
            (lost,) = [one for one in outcomes if isinstance(one, PromotionError)]
            (won,) = [one for one in outcomes if not isinstance(one, PromotionError)]
            assert "changed meanwhile" in str(lost)
            assert leader().pointer.version == won.version
            assert len(leader().pointer.moves) == number + 1
    # One that is overtaken before it sets its alias leaves that of the later one.
    late, present = Late(registry), leader()
    first, second = [rival for rival in rivals if rival.content_id != present.pointer.release]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(set_champion, storage, late, first, present, "slow", {})
        assert late.asked.wait(20)
        registry.set_alias(CHAMPION, first.number)  # as the next run repairs it
        set_champion(storage, registry, second, read_champion(storage), "quick", {})
        late.may.set()
        slow.result(30)
    assert leader().pointer.version == second.number

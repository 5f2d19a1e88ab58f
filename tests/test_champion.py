"""Who may become champion, and what is kept of every move."""

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import OlderError, OvertakenError, PromotionError, ReleaseError
from tasks.gate import judge
from tasks.io import write_json
from tasks.params import GateParams
from tasks.releases.champion import comparison_tags, promote, rollback, set_champion
from tasks.releases.pointer import Champion, Move, read_champion, repair_alias
from tasks.releases.release import publish
from tasks.scoring.metrics import DIGITS
from tasks.services.mlflow import CHAMPION, CONTENT_ID, Registry, Version
from tasks.services.s3 import Storage

LIMITS = GateParams(min_accuracy=0.9, max_cross_split_duplicates=0)


class Court:
    """Registered versions with releases, and the champion among them."""

    def __init__(self, storage: Storage, registry: Registry, folder: Path) -> None:
        self.storage = storage
        self.registry = registry
        self.folder = folder
        self.client: Any = registry._client

    def add(self, accuracy: float, limits: GateParams = LIMITS, **facts: str) -> Version:
        """Publish and register a model that was tested with an accuracy."""
        number = len(self.registry.versions()) + 1
        content = {"accuracy": round(accuracy, DIGITS), "loss": 0.1, "auc": 1.0, "ece": 0.01}
        files = {
            "metrics.json": content | {"n": 100, "made": number},
            "gate.json": judge(content, 0, limits).to_json(),
            "dataset.json": {"leaks": 0, "photos": []},
        }
        for name, value in files.items():
            write_json(self.folder / str(number) / name, value)
        paths = {name: self.folder / str(number) / name for name in files}
        release = publish(self.storage, paths, facts)
        if number == 1:
            self.client.create_registered_model(self.registry.model_name)
        tags = {CONTENT_ID: release.id}
        self.client.create_model_version(self.registry.model_name, release.uri, tags=tags)
        return self.version(number)

    def version(self, number: int) -> Version:
        found = self.registry.version(number)
        assert found is not None
        return found

    def compared(self, number: int, won: bool) -> None:
        """Note that a version was compared with the present champion."""
        tags = comparison_tags(self.champion(), won, "no worse" if won else "worse by far")
        self.registry.set_tags(number, tags)

    def promote(self, number: int, reason: str = "a test", **options: Any) -> Move:
        limits = options.pop("limits", LIMITS)
        cache = self.folder / "cache"
        return promote(self.storage, self.registry, number, reason, cache, limits, **options)

    def rollback(self) -> Move:
        return rollback(self.storage, self.registry, "back", by="Ann")

    def champion(self) -> Champion:
        found = read_champion(self.storage)
        assert found is not None
        return found

    def alias(self) -> int | None:
        held = self.registry.version_by_alias(CHAMPION)
        return held and held.number


@pytest.fixture
def court(storage: Storage, tmp_path: Path, migrated: Path) -> Court:
    """Three versions; the first is champion, the second won against it, the third lost."""
    database = shutil.copy(migrated, tmp_path / "mlflow.db")
    made = Court(storage, Registry(f"sqlite:///{database}", "hand-signs"), tmp_path)
    for accuracy in (0.95, 0.97, 0.92):
        made.add(accuracy)
    made.promote(1, by="Ann")
    made.compared(2, won=True)
    made.compared(3, won=False)
    return made


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's empty database, whose making takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    assert Registry(f"sqlite:///{path}", "none").versions() == []
    return path


def test_the_history_says_who_when_why_and_with_which_metrics(court: Court) -> None:
    court.promote(2, "it is better", by="Ben")
    first, second = court.champion().pointer.moves
    assert (first.by, first.previous, first.version) == ("Ann", None, 1)
    assert (second.by, second.previous, second.version) == ("Ben", 1, 2)
    assert second.reason == "it is better"
    assert second.metrics == {"accuracy": 0.97, "loss": 0.1, "auc": 1.0, "ece": 0.01}
    assert not second.forced
    assert first.at <= second.at
    assert "Ben: it is better" in second.describe()
    assert court.alias() == 2


def test_what_speaks_against_a_version_needs_force_and_is_kept(court: Court) -> None:
    court.add(0.93)
    court.add(0.5)
    before = court.champion()
    for number, limits, words in (
        (3, LIMITS, "compared with version 1 it is worse by far"),
        (4, LIMITS, "not compared with the present champion, version 1"),
        (5, LIMITS, "its own gate did not pass it"),
        (2, GateParams(min_accuracy=0.99), r"today's gate refuses it, accuracy: 0\.9700 misses"),
        (2, GateParams(), "no limit is set"),
    ):
        with pytest.raises(PromotionError, match=f"{words}.*--force"):
            court.promote(number, limits=limits)
    with pytest.raises(PromotionError, match="by force needs a reason"):
        court.promote(5, " ", force=True)
    assert court.champion() == before
    move = court.promote(5, "the boss wants it", force=True, by="Ann")
    assert move.forced
    assert "FORCED" in move.describe()
    tags = court.version(5).tags
    assert (tags["forced_by"], tags["forced_because"]) == ("Ann", "the boss wants it")
    assert "accuracy: 0.5000 misses" in tags["forced_over"]
    assert court.champion().pointer.overruled == move.overruled
    court.promote(2, force=True)
    assert court.champion().pointer.moves[-2].overruled == move.overruled


def test_force_where_nothing_speaks_against_is_no_forced_promotion(court: Court) -> None:
    assert not court.promote(2, force=True).forced


def test_rollback_goes_back_one_promotion_at_a_time(court: Court) -> None:
    court.promote(2)
    court.compared(3, won=False)
    third = court.promote(3, "I say so", force=True)
    assert [court.rollback().version for _ in range(2)] == [2, 1]
    assert court.champion().pointer.release == court.version(1).content_id
    assert court.alias() == 1
    with pytest.raises(PromotionError, match="no earlier champion"):
        court.rollback()
    told = [move.forced for move in court.champion().pointer.moves]
    assert told == [False, False, True, False, False]
    assert court.champion().pointer.moves[2] == Move(**third.model_dump(exclude={"history"}))


def test_a_deleted_version_is_not_returned_to(court: Court) -> None:
    court.promote(2)
    court.client.delete_model_version("hand-signs", "1")
    before = court.champion()
    with pytest.raises(PromotionError, match=r"gone from the registry\. Received: version 1"):
        court.rollback()
    assert court.champion() == before


def test_a_deleted_object_is_not_returned_to(court: Court) -> None:
    court.promote(2)
    release = court.version(1).content_id
    court.storage._client.delete_object(
        Bucket=court.storage.address.bucket, Key=f"releases/{release}/metrics.json"
    )
    before = court.champion()
    with pytest.raises(ReleaseError, match=r"metrics\.json"):
        court.rollback()
    assert court.champion() == before
    assert court.alias() == 2


def test_an_alias_moved_by_hand_before_the_promotion_refuses_it(court: Court) -> None:
    seen = court.champion()
    court.registry.set_alias(CHAMPION, 3)
    with pytest.raises(PromotionError, match=r"alias.*changed meanwhile.*Received: version 3"):
        set_champion(court.storage, court.registry, court.version(2), seen, "it won", {})
    assert court.champion() == seen
    assert court.alias() == 3
    court.client.delete_registered_model_alias("hand-signs", CHAMPION)
    with pytest.raises(PromotionError, match="Received: nothing"):
        set_champion(court.storage, court.registry, court.version(2), seen, "it won", {})


def test_a_promotion_that_came_meanwhile_is_what_a_later_one_is_told_of(court: Court) -> None:
    seen = court.champion()
    court.promote(2)
    with pytest.raises(OvertakenError, match=r"by another promotion. Received: version 1"):
        set_champion(court.storage, court.registry, court.version(3), seen, "it won", {})
    assert court.alias() == 2


def test_what_a_wrong_clock_made_is_promoted_by_force_alone(court: Court) -> None:
    ahead = court.add(0.97, created="2036-01-01T00:00:00+00:00")
    court.compared(ahead.number, won=True)
    court.promote(ahead.number)
    right = court.add(0.98, created="2026-11-24T00:00:00+00:00")
    court.compared(right.number, won=True)
    with pytest.raises(PromotionError, match="a clock was wrong"):
        court.promote(right.number)
    champion = court.champion()
    assert champion.pointer.version == ahead.number
    with pytest.raises(OlderError, match="--force and a --reason"):
        set_champion(court.storage, court.registry, right, champion, "by itself", {})
    assert court.champion() == champion
    move = court.promote(right.number, "the clock was ahead", force=True)
    assert [fault for fault in move.overruled if "older than the champion's" in fault]
    later = court.add(0.99, created="2026-11-25T00:00:00+00:00")
    court.compared(later.number, won=True)
    assert not court.promote(later.number).forced


@pytest.mark.parametrize("force", [False, True])
def test_a_registry_that_cannot_follow_does_not_undo_or_repeat_a_move(
    court: Court, caplog: pytest.LogCaptureFixture, force: bool
) -> None:
    court.promote(2)
    with sqlite3.connect(court.folder / "mlflow.db") as database:
        for when in ("insert", "update", "delete"):
            database.execute(
                f"create trigger full_{when} before {when} on registered_model_aliases "
                "begin select raise(abort, 'database or disk is full'); end"
            )
    move = court.promote(3, "it must", force=True) if force else court.rollback()
    assert court.champion().pointer.version == move.version == (3 if force else 1)
    assert len(court.champion().pointer.moves) == 3
    assert f"Version {move.version} is champion, and the registry could not be told" in caplog.text
    assert court.alias() == 2


def test_an_alias_that_a_crash_left_behind_is_mended_and_told(court: Court) -> None:
    court.registry.set_alias(CHAMPION, 2)
    said = repair_alias(court.registry, court.champion())
    assert said == "The alias named version 2; it follows the pointer to version 1 again."
    assert court.alias() == 1
    assert repair_alias(court.registry, court.champion()) is None


def test_an_alias_cannot_follow_to_a_version_that_the_registry_never_had(
    court: Court, migrated: Path
) -> None:
    other = Registry(f"sqlite:///{migrated}", "hand-signs")
    assert "not in this registry" in str(repair_alias(other, court.champion()))


def test_what_is_champion_already_or_unknown_is_refused(court: Court) -> None:
    with pytest.raises(PromotionError, match="champion already"):
        court.promote(1)
    with pytest.raises(PromotionError, match="Received: 9; known: 1, 2, 3"):
        court.promote(9)

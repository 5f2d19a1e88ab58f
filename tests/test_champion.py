"""Who may become champion, and what is kept of every move."""

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.errors import OvertakenError, PromotionError, ReleaseError
from tasks.gate import judge
from tasks.io import write_json
from tasks.params import GateParams
from tasks.project import Project
from tasks.releases.challenger import PromotionDecision, record_comparison
from tasks.releases.champion import find_release, promote, rebuild_registry, rollback, set_champion
from tasks.releases.pointer import KEY, Champion, Move, read_champion, sync_alias
from tasks.releases.release import publish
from tasks.scoring.metrics import DIGITS
from tasks.services.mlflow import CHAMPION, CONTENT_ID, Registry, Version
from tasks.services.s3 import Storage
from tests.fixtures import faults
from tests.fixtures.faults import proxy_to
from tests.fixtures.photos import CHECKOUT

LIMITS = GateParams(min_accuracy=0.9, max_cross_split_duplicates=0)


class Court:
    """Registered versions with releases, and the champion among them."""

    def __init__(self, storage: Storage, registry: Registry, folder: Path) -> None:
        self.storage = storage
        self.registry = registry
        self.folder = folder

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.registry.tracking_uri, self.registry.tracking_uri)

    def add(self, accuracy: float, **facts: Any) -> Version:
        """Publish and register a model that was tested with an accuracy."""
        number = len(self.registry.versions()) + 1
        content = {"accuracy": round(accuracy, DIGITS), "loss": 0.1, "auc": 1.0, "ece": 0.01}
        files = {
            "metrics.json": content | {"n": 100, "made": number},
            "gate.json": judge(content, 0, LIMITS).to_json(),
            "dataset.json": {"leaks": 0, "photos": []},
        }
        for name, value in files.items():
            write_json(self.folder / str(number) / name, value)
        paths = {name: self.folder / str(number) / name for name in files}
        release = publish(self.storage, paths, facts)
        return self.registry.register(None, release.id, {"release_uri": release.uri})

    def version(self, number: int) -> Version:
        found = self.registry.version(number)
        assert found is not None
        return found

    def compared(self, number: int, won: bool) -> None:
        """Record a comparison of a version with the present champion."""
        decision = PromotionDecision(won, "no worse" if won else "worse by far")
        record_comparison(self.registry, number, self.champion(), decision)

    def promote(self, number: int, reason: str = "a test", **options: Any) -> Move:
        content = yaml.safe_load(CHECKOUT.params.read_text())
        content["gate"] = options.pop("limits", LIMITS).model_dump()
        (self.folder / "params.yaml").write_text(yaml.safe_dump(content))
        return promote(self.storage, self.registry, Project(self.folder), number, reason, **options)

    def rollback(self, **options: Any) -> Move:
        return rollback(self.storage, self.registry, "back", by="Ann", **options)

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


def test_failed_checks_need_force_and_are_kept(court: Court) -> None:
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
    with pytest.raises(PromotionError, match="no version 9 in the registry, only: 1, 2, 3, 4, 5"):
        court.promote(9)
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


def test_force_without_failed_checks_is_no_forced_promotion(court: Court) -> None:
    assert not court.promote(2, force=True).forced


def test_a_version_that_lost_to_an_earlier_champion_says_so(court: Court) -> None:
    court.promote(2)
    with pytest.raises(PromotionError) as caught:
        court.promote(3)
    assert "compared with version 1 it is worse by far" in str(caught.value)
    assert "not compared with the present champion, version 2" in str(caught.value)


def test_a_former_champion_is_told_what_it_lost_to(court: Court) -> None:
    court.promote(2)
    with pytest.raises(PromotionError, match="version 2 took its place: no worse"):
        court.promote(1)


def test_rollback_goes_back_one_promotion_at_a_time(court: Court) -> None:
    court.promote(2)
    court.promote(3, "I say so", force=True)
    kept = court.champion().pointer.moves
    assert court.rollback().version == 2
    assert court.rollback(expected=court.version(2).content_id).version == 1
    assert court.champion().pointer.release == court.version(1).content_id
    assert court.alias() == 1
    with pytest.raises(PromotionError, match="no earlier champion"):
        court.rollback(expected=court.version(1).content_id)
    assert court.champion().pointer.moves[:3] == kept
    assert [move.forced for move in kept] == [False, False, True]


def test_a_repeated_rollback_changes_nothing_and_says_so(
    court: Court, caplog: pytest.LogCaptureFixture
) -> None:
    court.promote(2)
    court.compared(3, won=True)
    bad = court.promote(3).release
    first = court.rollback(expected=bad)
    after = court.champion()
    for again in (court.rollback(expected=bad), court.rollback()):
        assert again == first
    assert court.champion() == after
    assert "Version 2 is champion already; nothing was moved." in caplog.text
    assert "rollback --from 2" in caplog.text


def test_a_rollback_whose_every_answer_was_lost_is_made_once(court: Court) -> None:
    bad = court.promote(2).release
    with proxy_to(court.storage.address.endpoint_url) as proxy:
        through = Storage(replace(court.storage.address, endpoint_url=proxy.url))
        with proxy.failing(faults.on(f"^PUT .*{KEY}", faults.forgetful)):
            move = rollback(through, court.registry, "back", expected=bad)
    assert move.version == court.rollback(expected=bad).version == 1
    assert len(court.champion().pointer.moves) == 3


def test_a_repeated_promotion_changes_nothing(court: Court) -> None:
    first = court.promote(2)
    after = court.champion()
    court.registry.set_alias(CHAMPION, 1)  # as a crash between pointer and alias leaves it
    assert court.promote(2) == first
    assert court.champion() == after
    assert court.alias() == 2


def test_a_move_that_expects_another_champion_is_refused(court: Court) -> None:
    seen = court.champion().pointer.release
    court.promote(2)
    before = court.champion()
    court.compared(3, won=True)
    with pytest.raises(OvertakenError, match=rf"it is version 2, .* and not release {seen}"):
        court.promote(3, expected=seen)
    with pytest.raises(OvertakenError, match="changed meanwhile"):
        court.rollback(expected=seen)
    assert court.champion() == before


def test_a_deleted_version_is_not_returned_to(court: Court) -> None:
    court.promote(2)
    court.client().delete_model_version("hand-signs", "1")
    before = court.champion()
    with pytest.raises(PromotionError, match=r"version 1, is gone from the registry"):
        court.rollback()
    assert court.champion() == before


def test_a_deleted_object_is_not_returned_to(court: Court) -> None:
    court.promote(2)
    court.storage.remove(f"releases/{court.version(1).content_id}/metrics.json")
    before = court.champion()
    with pytest.raises(ReleaseError, match=r"metrics\.json"):
        court.rollback()
    assert court.champion() == before
    assert court.alias() == 2


def test_an_alias_moved_by_hand_refuses_an_automatic_promotion(court: Court) -> None:
    seen = court.champion()
    court.registry.set_alias(CHAMPION, 3)
    with pytest.raises(PromotionError, match=r"alias.*changed in the registry: it names version 3"):
        set_champion(court.storage, court.registry, court.version(2), seen, "it won", {})
    assert court.champion() == seen
    assert court.alias() == 3
    court.client().delete_registered_model_alias("hand-signs", CHAMPION)
    with pytest.raises(PromotionError, match="it is gone"):
        set_champion(court.storage, court.registry, court.version(2), seen, "it won", {})


def test_the_second_of_two_automatic_promotions_is_refused(court: Court) -> None:
    seen = court.champion()
    court.promote(2)
    with pytest.raises(OvertakenError, match=r"by another promotion: version 1 was champion"):
        set_champion(court.storage, court.registry, court.version(3), seen, "it won", {})
    assert court.alias() == 2


def test_a_wrong_clock_blocks_no_later_promotion(court: Court) -> None:
    ahead = court.add(0.97, created="2036-01-01T00:00:00+00:00", pointer_moves=1)
    court.compared(ahead.number, won=True)
    court.promote(ahead.number)
    right = court.add(0.98, created="2026-11-24T00:00:00+00:00", pointer_moves=2)
    court.compared(right.number, won=True)
    assert not court.promote(right.number).forced


@pytest.mark.parametrize("moves", [{}, {"pointer_moves": 0}])
def test_an_older_release_under_a_newer_number_needs_force(
    court: Court, moves: dict[str, int]
) -> None:
    newer = court.add(0.97, pointer_moves=1)
    court.compared(newer.number, won=True)
    court.promote(newer.number)
    older = court.add(0.99, **moves)
    court.compared(older.number, won=True)
    with pytest.raises(PromotionError, match=r"older than that of version 4.*after move 1"):
        court.promote(older.number)
    assert court.promote(older.number, "it is right", force=True).forced


@pytest.mark.parametrize("force", [False, True])
def test_a_registry_that_cannot_follow_does_not_undo_a_move(
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
    assert "The alias in the registry could not be updated" in caplog.text
    assert court.alias() == 2


def test_an_alias_left_behind_by_a_crash_follows_again(court: Court) -> None:
    court.registry.set_alias(CHAMPION, 2)
    said = sync_alias(court.storage, court.registry)
    assert said == "The alias named version 2; it follows the pointer to version 1 again."
    assert court.alias() == 1
    assert sync_alias(court.storage, court.registry) is None


def test_a_registry_begun_anew_is_rebuilt_from_storage(
    court: Court, migrated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    court.promote(2)
    releases = {court.version(number).content_id for number in (1, 2, 3)}
    champion = court.champion().pointer.release
    other = Court(
        court.storage,
        Registry(f"sqlite:///{shutil.copy(migrated, court.folder / 'new.db')}", "hand-signs"),
        court.folder / "new",
    )
    assert "rebuild-registry" in str(sync_alias(other.storage, other.registry))
    fresh = other.add(0.96)  # takes the number 1, which the history gives to another release
    with pytest.raises(PromotionError, match="rebuild-registry"):
        other.rollback()
    court.storage.put(f"releases/{'0' * 32}/manifest.json", b"damaged")
    added = rebuild_registry(other.storage, other.registry)
    assert {version.content_id for version in added} == releases
    assert f"Release {'0' * 32} is left out" in caplog.text
    assert rebuild_registry(other.storage, other.registry) == []
    held = other.registry.version_by_alias(CHAMPION)
    assert held is not None
    assert held.content_id == champion
    for version in (fresh, *added):
        named = find_release(other.storage, lambda: other.registry, str(version.number))
        assert named == version.content_id
    back = other.rollback()
    assert back.release == court.version(1).content_id
    assert back.version == other.registry.find(back.release).number  # type: ignore[union-attr]
    assert other.alias() == back.version


def test_a_version_of_another_program_is_not_promoted(court: Court) -> None:
    court.client().create_model_version(
        "hand-signs", str(court.folder), tags={CONTENT_ID + "x": ""}
    )
    with pytest.raises(ReleaseError, match="Version 4 names no release"):
        court.promote(4)

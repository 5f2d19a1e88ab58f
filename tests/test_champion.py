"""Who may become champion, what is kept of every move, and what follows the pointer."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tasks.errors import OvertakenError, PromotionError, ReleaseError
from tasks.gate import judge
from tasks.params import GateParams
from tasks.project import Project
from tasks.releases.catalog import find_release, rebuild_registry
from tasks.releases.champion import (
    KEY,
    Champion,
    Move,
    promote,
    read_champion,
    record_comparison,
    rollback,
    set_champion,
    sync_alias,
)
from tasks.services.mlflow import CHALLENGER, CHAMPION, Registry, Version
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.faults import proxy_to
from tests.fixtures.photos import CHECKOUT, LABELS
from tests.fixtures.publishing import publish_contents, register

LIMITS = GateParams(min_accuracy=0.9, max_cross_split_duplicates=0)
SPLITS = ("train", "train", "test")


@dataclass(frozen=True)
class Models:
    """Registered versions with releases, and the champion among them."""

    storage: Storage
    registry: Registry
    folder: Path

    def add(self, accuracy: float, won: bool | None = None, **facts: Any) -> int:
        """Publish and register a model with this test accuracy, compared or not; its number."""
        number = len(self.registry.versions()) + 1
        scores = {"accuracy": accuracy, "loss": 0.1, "auc": 1.0, "ece": 0.01}
        contents = {
            "metrics.json": scores | {"n": 100, "made": number},
            "gate.json": judge(scores, 0, LIMITS, LABELS),
            "dataset.json": {"leaks": 0, "photos": [{"split": one} for one in SPLITS]},
            "labels.json": LABELS,
        }
        release = publish_contents(self.storage, self.folder / str(number), contents, **facts)
        register(self.registry, release)
        if won is not None:
            reason = "no worse" if won else "worse by far"
            record_comparison(self.registry, number, read_champion(self.storage), won, reason)
        return number

    def version(self, number: int) -> Version:
        found = self.registry.find(number)
        assert found
        return found

    def promote(self, number: int, reason: str = "a test", **options: Any) -> Move:
        content = yaml.safe_load(CHECKOUT.params.read_text())
        content["gate"] = options.pop("limits", LIMITS).model_dump()
        (self.folder / "params.yaml").write_text(yaml.safe_dump(content))
        return promote(self.storage, self.registry, Project(self.folder), number, reason, **options)

    def rollback(self, expected: int | None = None) -> Move:
        seen = self.version(expected).release if expected else None
        return rollback(self.storage, self.registry, "back", by="Ann", expected=seen)

    def set_champion(self, number: int, expected: Champion | None) -> Move:
        return set_champion(self.storage, self.version(number), expected, "won", {"loss": 0.5})

    def champion(self) -> Champion:
        found = read_champion(self.storage)
        assert found
        return found

    def named(self) -> int:
        """The version that MLflow's alias names."""
        found = self.registry.find(CHAMPION)
        return found.number if found else 0

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.registry.tracking_uri, self.registry.tracking_uri)


@pytest.fixture
def models(bucket: S3Address, tmp_path: Path, tracking_uri: str) -> Models:
    """Three versions; the first is champion, the second won against it, the third lost."""
    storage = Storage(bucket)
    storage.remove(KEY)
    made = Models(storage, Registry(tracking_uri, "hand-signs"), tmp_path)
    made.promote(made.add(0.95), by="Ann")
    made.add(0.97, won=True)
    made.add(0.92, won=False)
    return made


def test_the_history_says_who_when_why_and_a_repeat_changes_nothing(models: Models) -> None:
    seen = models.champion()
    models.promote(2, "it is better", by="Ben", force=True)
    first, second = models.champion().pointer.moves
    assert not second.forced
    scores = {"accuracy": 0.97, "loss": 0.1, "auc": 1.0, "ece": 0.01, "photos": 2}
    assert second.metrics == scores
    assert "T" in first.at <= second.at
    assert first.describe() == f"{first.at} promote: none -> version 1, by Ann: a test"
    said = "promote: version 1 -> version 2, by Ben: it is better"
    assert second.describe() == f"{second.at} {said}"
    after = models.champion()
    assert models.promote(2) == models.set_champion(2, seen) == after.pointer
    # What was decided against an earlier champion is refused.
    for expected, words in ((seen, "version 1 was champion"), (None, "there was no champion")):
        with pytest.raises(OvertakenError, match=f"by another promotion: {words}"):
            models.set_champion(3, expected)
    with pytest.raises(OvertakenError, match=r"it is version 2, release .* and not release"):
        models.rollback(expected=1)
    assert models.champion() == after
    third = models.set_champion(3, after)
    assert third.metrics == {"loss": 0.5}
    assert third.by


def test_failed_checks_need_force_and_are_kept(models: Models) -> None:
    models.add(0.93)
    models.add(0.5)
    before = models.champion()
    lost = "compared with version 1 it is worse by far"
    for number, limits, reason, words in (
        (3, LIMITS, "why", rf"{lost}\. Nothing was moved.*--force"),
        (4, LIMITS, "why", "not compared with the present champion, version 1.*--force"),
        (5, LIMITS, "why", "its own gate did not pass it.*--force"),
        (2, GateParams(min_accuracy=0.99), "why", r"today's gate .*0\.9700 < 0\.9900.*--force"),
        (2, GateParams(), "why", "no limit is set.*--force"),
        (2, GateParams(min_recall=0.5), "why", "today's gate refuses it, recall of 0.*--force"),
        (9, LIMITS, "why", "no version 9 in the registry, only: 1, 2, 3, 4, 5"),
        (2, LIMITS, " ", "A promotion needs a reason"),
    ):
        with pytest.raises(PromotionError, match=words):
            models.promote(number, reason, limits=limits)
    with pytest.raises(PromotionError, match="promotion by force needs a reason"):
        models.promote(5, " ", force=True)
    with pytest.raises(PromotionError, match="A rollback needs a reason"):
        rollback(models.storage, models.registry, "")
    assert models.champion() == before
    move = models.promote(5, "the boss wants it", force=True, by="Ann")
    assert "(FORCED: " in move.describe()
    assert "accuracy 0.5000 < " in "; ".join(move.overruled)
    assert models.champion().pointer.model_dump()["forced"]
    models.promote(2, force=True)
    assert models.champion().pointer.moves[-2].overruled == move.overruled
    # The third lost against another, the fifth lost its place to the present champion.
    with pytest.raises(PromotionError, match=f"{lost}; it was not compared with the present"):
        models.promote(3)
    with pytest.raises(PromotionError, match=r"champion: version 2 took its place: no worse\."):
        models.promote(1)


def test_rollback_goes_back_one_promotion_at_a_time_and_repeats_change_nothing(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    models.promote(2)
    models.promote(3, "I say so", force=True)
    kept = models.champion().pointer.moves
    with proxy_to(models.storage.address.endpoint_url) as proxy:
        through = Storage(replace(models.storage.address, endpoint_url=proxy.url))
        with proxy.failing(faults.on(f"^PUT .*{KEY}", faults.losing_the_answer)):
            bad = models.version(3).release
            first = rollback(through, models.registry, "back", by="Ann", expected=bad)
    after = models.champion()
    assert (first.version, first.previous, first.action, first.by) == (2, 3, "rollback", "Ann")
    for again in (models.rollback(expected=3), models.rollback()):
        assert again == first
    assert models.champion() == after
    assert "champion already; nothing was moved. To go back further, run `h" in caplog.text
    assert "rollback --from 2" in caplog.text
    # It needs every byte of the release, and its version.
    metrics = f"releases/{models.version(1).release}/metrics.json"
    content = models.storage.get(metrics)
    models.storage.remove(metrics)
    with pytest.raises(ReleaseError, match=r"metrics\.json"):
        models.rollback(expected=2)
    models.storage.put(metrics, content)
    assert models.rollback(expected=2).version == 1
    assert models.champion().pointer.release == models.version(1).release
    with pytest.raises(PromotionError, match="no earlier champion"):
        models.rollback(expected=1)
    with pytest.raises(OvertakenError, match="it is version 1, release"):
        models.rollback(expected=3)
    assert models.champion().pointer.moves[:3] == kept
    models.storage.remove(KEY)
    with pytest.raises(PromotionError, match="no earlier champion"):
        models.rollback()
    with pytest.raises(OvertakenError, match="it is nobody and not release"):
        models.rollback(expected=1)
    assert sync_alias(models.storage, models.registry) is None
    assert models.promote(3, force=True).overruled == ()  # nobody to compare with


class Late(Registry):
    """The real registry, to which this process comes late with the alias."""

    may, asked = Event(), Event()

    def set_alias(self, alias: str, number: int) -> None:
        self.asked.set()
        assert self.may.wait(20)
        super().set_alias(alias, number)


def test_of_two_promotions_at_once_one_wins_and_no_alias_is_left_behind(models: Models) -> None:
    def move(number: int, expected: Champion, registry: Registry = models.registry) -> int:
        try:
            models.set_champion(number, expected)
        except OvertakenError:
            return 0
        sync_alias(models.storage, registry)
        return number

    with ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            now = models.champion()
            others = {1, 2, 3} - {now.pointer.version}
            lost, won = sorted(pool.map(move, others, (now, now)))
            assert (lost, models.champion().pointer.version, models.named()) == (0, won, won)
        # One that is overtaken before it sets its alias leaves that of the later one.
        first, second = {1, 2, 3} - {won}
        late = Late(models.registry.tracking_uri, models.registry.model_name)
        slow = pool.submit(move, first, models.champion(), late)
        assert late.asked.wait(20)
        models.registry.set_alias(CHAMPION, first)  # as the next run repairs it
        assert move(second, models.champion()) == second
        late.may.set()
        slow.result(30)
    assert models.named() == models.champion().pointer.version == second
    assert len(models.champion().pointer.moves) == 1 + 8 + 2


def test_releases_are_ordered_by_the_pointers_counter_and_not_by_clocks(models: Models) -> None:
    ahead = models.add(0.97, won=True, created="2036-01-01T00:00:00+00:00", pointer_moves=1)
    assert models.promote(ahead).version == ahead
    right = models.add(0.98, won=True, created="2026-11-24T00:00:00+00:00", pointer_moves=1)
    assert not models.promote(right).forced
    for facts, made in (({}, "by an earlier program version"), ({"pointer_moves": 0}, "move 0")):
        older = models.add(0.99, won=True, **facts)
        with pytest.raises(PromotionError, match=rf"older than .* version 5.*{made}.*after move 1"):
            models.promote(older)
    assert models.promote(older, "it is right", force=True).forced


def test_a_name_that_stands_for_no_release_is_explained(models: Models) -> None:
    def find(name: str) -> str:
        return find_release(models.storage, lambda: models.registry, name)

    models.registry.set_alias(CHALLENGER, 3)
    assert find("challenger") == find("3") == models.version(3).release
    models.client.create_model_version("hand-signs", "elsewhere", tags={"another": "program"})
    models.storage.remove(KEY)
    for name, words in (
        ("7", "no model 7 in the registry.*rebuild-registry"),
        ("4", "Version 4 names no release"),
        ("best", "'best' names no model"),
        ("champion", "no champion yet"),
    ):
        with pytest.raises(ReleaseError, match=words):
            find(name)


def test_alias_and_registry_follow_what_is_in_storage(
    storage: Storage, models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    for was in ("version 2", "nothing"):
        models.registry.set_alias(CHAMPION, 2)
        if was == "nothing":
            models.client.delete_registered_model_alias("hand-signs", CHAMPION)
        said = sync_alias(models.storage, models.registry)
        assert said == f"The alias named {was}; it follows the pointer to version 1 again."
        assert models.named() == 1
        assert sync_alias(models.storage, models.registry) is None

    old = Models(storage, replace(models.registry, model_name="old"), models.folder)
    for moves in (2, 1, 0):
        old.add(0.9 + moves / 100, pointer_moves=moves)
    for number in (3, 2):
        old.set_champion(number, read_champion(storage))
    new = Models(storage, replace(models.registry, model_name="new"), models.folder)
    assert "rebuild-registry" in str(sync_alias(storage, new.registry))
    new.add(0.99)  # takes the number 1, which the history gives to another release
    with pytest.raises(PromotionError, match="rebuild-registry"):
        new.rollback()
    storage.put(f"releases/{'0' * 32}/manifest.json", b"damaged")
    added = rebuild_registry(storage, new.registry)
    assert [one.release for one in added] == [old.version(n).release for n in (3, 2, 1)]
    assert f"Release {'0' * 32} is left out" in caplog.text
    assert rebuild_registry(storage, new.registry) == []
    assert new.version(new.named()).release == old.version(2).release
    back = new.rollback()
    assert back.release == old.version(3).release == new.version(back.version).release

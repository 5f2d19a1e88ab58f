"""Promotion as a person meets it: approval, comparison and history, beside an earlier release."""

import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PromotionError
from tasks.project import Project
from tasks.releases.champion import Champion, read_champion, set_champion, sync_alias
from tasks.releases.release import publish
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.checkouts import QUICK, Repo
from tests.fixtures.faults import Answer, Exchange, proxy_to
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.servers import PrefectApi, s3_client
from tests.fixtures.service import named as storage_named
from tests.fixtures.service import soon
from tests.fixtures.trained import Trained

COMMIT = "f2455f0"
ARCHIVE = CHECKOUT.root / f"tests/fixtures/releases/{COMMIT}.tar.xz"
BUCKET = f"release-{COMMIT}"  # the champion's signature covers the bucket's name
RELEASES = {"1": "646b9a4d37e1b222c8639efc5ee8c0b8", "2": "5640018f52a3ccefbca53f50ea7a419e"}
ROUNDS = 8


def paused(api: PrefectApi) -> tuple[Any, str]:
    """Wait until a retrain asks for approval; the run, and the question."""

    def asking() -> tuple[Any, str] | None:
        for run in api.runs("retrain"):
            keys = run["state"]["state_details"].get("run_input_keyset")
            if run["state_type"] == "PAUSED" and keys:
                path = f"flow_runs/{run['id']}/input/filter"
                if asked := api.ask(path, {"prefix": keys["description"]}):
                    return run, str(asked[0]["value"])
        return None

    return soon(asking, 500)


def resume(api: PrefectApi, run: Any, **answer: str) -> str:
    return str(api.ask(f"flow_runs/{run['id']}/resume", {"run_input": answer})["status"])


def artifact(api: PrefectApi, run: Any, key: str) -> Any:
    of_run = {"flow_run_id": {"any_": [run["id"]]}, "key": {"any_": [key]}}
    return api.ask("artifacts/filter", {"artifacts": of_run})[0]


@pytest.fixture(scope="module")
def repo(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    made = trained.checkout(tmp_path_factory.mktemp("promotion") / "checkout")
    made.handsigns("import", trained.photos)
    return made


@pytest.fixture(scope="module")
def earlier(s3_server: S3Address, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the earlier version left behind, with its releases in a bucket of the real server."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    client, bucket = s3_client(s3_server), folder / "bucket"
    client.create_bucket(Bucket=BUCKET)  # one file of tests has it: the pointer names it
    for path in filter(Path.is_file, bucket.rglob("*")):
        client.upload_file(str(path), BUCKET, path.relative_to(bucket).as_posix())
    return folder


@pytest.fixture(scope="module")
def named(
    repo: Repo, earlier: Path, s3_server: S3Address, prefect_api: PrefectApi
) -> dict[str, str]:
    """Services that outlive a run; an earlier version's release is champion there."""
    repo.project.local.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(earlier / "mlflow.db", repo.project.local)
    made = repo.handsigns("keys", "new")
    return {
        **storage_named(replace(s3_server, bucket=BUCKET)),
        **prefect_api.named,
        "HANDSIGNS_SIGNING_KEY": made["private"],
        "HANDSIGNS_PUBLIC_KEYS": f"{earlier / 'signing.pub.pem'}:{made['public']}",
    }


@contextmanager
def retraining(repo: Repo, seconds: int, named: dict[str, str]) -> Iterator[Future[Any]]:
    """Run a retrain that waits so long for a person; its report is there after the block."""
    policy = {"HANDSIGNS_PROMOTION": "approval", "HANDSIGNS_APPROVAL_SECONDS": str(seconds)}
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(repo.handsigns, "retrain", **named, **policy)


def test_an_earlier_release_verifies_and_predicts_as_it_did_then(
    repo: Repo, named: dict[str, str], earlier: Path
) -> None:
    for version, release in RELEASES.items():
        verified = repo.handsigns("verify", version, **named)
        assert verified["id"] == release
        assert verified["facts"]["git_revision"].startswith(COMMIT)
        recorded = json.loads((earlier / "predictions.json").read_text())[version]
        then = {earlier / name: shares for name, shares in recorded.items()}
        now = repo.handsigns("predict", "--model", version, *then, **named)
        for one in now["predictions"]:
            assert one["probabilities"] == pytest.approx(then[Path(one["file"])], abs=0.02)
    compared = repo.handsigns("compare", "1", "2", **named)
    assert compared["champion"]["n"] == 120
    assert Path(compared["picture"]).is_file() == bool(compared["changed"])


def test_a_better_model_waits_for_a_person_and_then_is_champion(
    repo: Repo, prefect_api: PrefectApi, named: dict[str, str]
) -> None:
    with retraining(repo, 200, named) as started:
        run, question = paused(prefect_api)
        for words in ("Version 3", "McNemar", "Recall of each sign", "changed verdict"):
            assert words in question
        assert run["name"] == "v3 waits for approval"
        # Nothing is locked meanwhile, and the champion still is the old one.
        repo.run("dvc", "status", "gate")
        assert repo.handsigns("status", **named)["champion"]["release"] == RELEASES["2"]
        for answer in ({}, {"name": "Ann"}, {"name": "", "decision": "approve"}):
            assert resume(prefect_api, run, **answer) == "REJECT"
        given = {"name": "Ann", "decision": "approve", "comment": "looks right"}
        assert resume(prefect_api, run, **given) == "ACCEPT"
    report = started.result()
    assert report["status"] == "promoted", report["reason"]
    assert "approved by Ann: looks right" in report["reason"]
    found = report["comparison"]
    assert found["no_worse"]
    assert found["champion"]["accuracy"] < found["challenger"]["accuracy"]
    assert found["won"] == sum(photo["now"] == "right" for photo in found["changed"])
    assert (report["data"]["changes"]["since"], report["data"]["synthetic"]) == (2, 12)
    move = repo.handsigns("status", **named)["history"][-1]
    assert (move["by"], move["previous"], move["version"]) == ("Ann", 2, 3)
    for key, words in (
        ("champion-history", "Ann"),
        ("comparison", "McNemar"),
        ("audit", "Photos since version 2"),
        ("gate", "| accuracy |"),
    ):
        assert words in artifact(prefect_api, run, key)["data"]
    assert prefect_api.ask(f"flow_runs/{run['id']}")["name"].startswith("v3 promoted: 0.")


def test_the_champion_is_moved_by_hand_with_or_without_a_prefect_that_works(
    repo: Repo, prefect_api: PrefectApi, named: dict[str, str]
) -> None:
    refused = repo.handsigns("promote", "2", code=1, **named)
    assert "should not be champion: version 3 took its place: " in refused
    why = ("--force", "--reason", "the new one dazzles")
    assert repo.handsigns("promote", "2", *why, **named)["forced"]
    described = repo.handsigns("status", **named)["history"][-1]["told"]
    assert "FORCED" in described
    assert repo.handsigns("verify", "2", **named)["forced"] == [described]
    (run,) = [one for one in prefect_api.runs("promote") if described == one["state"]["message"]]
    assert (run["name"], run["state_name"]) == ("promote version 2", "Promoted")
    assert "promote, FORCED" in artifact(prefect_api, run, "champion-history")["data"]

    def rollback(*words: str, **environment: str) -> str:
        return repo.run("handsigns", "rollback", *words, **{**named, **environment}).stderr

    def other_version(exchange: Exchange) -> None:
        exchange.send(Answer(200, "OK", [("content-type", "application/json")], b'"2.20.0"'))

    with proxy_to(prefect_api.url.removesuffix("/api")) as prefect:
        for fault in (faults.answering(500, "Down"), other_version):
            with prefect.failing(faults.on("/api/(?!health)", fault)):
                said = rollback("--from", "2", PREFECT_API_URL=f"{prefect.url}/api")
            assert f"Prefect at {prefect.url}/api cannot be used (" in said
    said = rollback("--from", "2", PREFECT_API_AUTH_STRING="some:body")
    assert "cannot be used (401)" in said
    assert "set PREFECT_API_AUTH_STRING to user:password" in said
    assert repo.handsigns("status", **named)["champion"]["version"] == 3


@pytest.mark.slow
def test_a_promotion_meanwhile_a_rejection_and_silence_leave_the_champion(
    repo: Repo, prefect_api: PrefectApi, named: dict[str, str]
) -> None:
    versions = repo.handsigns("versions", **named)["versions"]
    number, before = 1 + max(one["version"] for one in versions), None
    for seconds, answer, reason in (
        (200, {"name": "Ann", "decision": "approve"}, "The champion was changed meanwhile"),
        (200, {"name": "Ben", "decision": "reject", "comment": "no"}, "rejected by Ben: no."),
        (3, {}, "nobody approved it within 3 s."),
    ):
        # A release differs by its parameters too, so there is a version without training.
        repo.change("gate", max_loss=5 - number / 10)
        with retraining(repo, seconds, named) as started:
            run, _ = paused(prefect_api)
            if before is None:
                repo.handsigns("promote", "1", "--force", "--reason", "first", **named)
            assert not answer or resume(prefect_api, run, **answer) == "ACCEPT"
        report = started.result()
        assert report["status"] == "registered"
        assert report["reason"].startswith(f"Version {number} stays challenger: {reason}")
        assert (report["model"]["version"], report["model"]["alias"]) == (number, "challenger")
        run = prefect_api.ask(f"flow_runs/{run['id']}")
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Registered")
        status = repo.handsigns("status", **named)
        assert status["champion"]["version"] == 1
        assert before in (None, status["history"])
        number, before = number + 1, status["history"]


@pytest.mark.slow
def test_an_earlier_release_is_rebuilt_bit_by_bit_with_the_stages_of_its_commit(
    trained: Trained, s3: S3Address, tmp_path: Path
) -> None:
    def clone(name: str, revision: str) -> Repo:
        root = tmp_path / name
        subprocess.run(["git", "clone", "-q", CHECKOUT.root, root], check=True)
        subprocess.run(["git", "-C", root, "checkout", "-q", revision], check=True)
        return Repo(Project(root))

    environment = {**storage_named(s3), "HANDSIGNS_DVC_REMOTE_URL": str(tmp_path / "remote")}
    then = clone("then", COMMIT)
    backbone = Path(".local/backbone")
    shutil.copytree(trained.repo.project.root / backbone, then.project.root / backbone)
    then.change("features", views=1)
    then.change("gate", **QUICK["gate"] | {"min_accuracy": 0.0})
    for phase in ("base", "fine_tune", "full"):
        then.change(f"phases.{phase}", epochs=1, data_fraction=1.0)
    # The installed command would run today's code.
    command = ("python", "-c", "from flows.cli import main; main()")
    then.run(*command, "import", "--replace", trained.photos, **environment)
    done = then.run(*command, "retrain", "--json", **environment)
    assert json.loads(done.stdout)["status"] == "promoted"
    rebuilt = clone("now", "HEAD").handsigns("reproduce", "champion", **environment)
    assert rebuilt["identical"], rebuilt


class Late(Registry):
    """The real registry, to which this process comes late with the alias."""

    may: threading.Event
    asked: threading.Event

    def set_alias(self, alias: str, number: int) -> None:
        self.asked.set()
        assert self.may.wait(20)
        super().set_alias(alias, number)


def test_of_two_promotions_at_once_one_wins_and_no_alias_is_left_behind(
    storage: Storage, tracking_uri: str, tmp_path: Path
) -> None:
    registry, rivals = Registry(tracking_uri, "signs"), []
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(name)
        release = publish(storage, {"labels.json": tmp_path / name})
        rivals.append(registry.register(None, release.id, {"release_uri": release.uri}))

    def move(version: Any, expected: Champion | None, of: Registry = registry) -> Any:
        try:
            moved = set_champion(storage, version, expected, "better", {})
            sync_alias(storage, of)
            return moved
        except PromotionError as error:
            return error

    def others(champion: Champion | None) -> list[Any]:
        return [
            one for one in rivals if champion is None or one.content_id != champion.pointer.release
        ]

    with ThreadPoolExecutor(2) as pool:
        for number in range(ROUNDS):
            present = read_champion(storage)
            outcomes = [*pool.map(move, others(present)[:2], (present, present))]
            (lost,) = [one for one in outcomes if isinstance(one, PromotionError)]
            (won,) = [one for one in outcomes if not isinstance(one, PromotionError)]
            assert "changed meanwhile" in str(lost)
            now, alias = read_champion(storage), registry.find(CHAMPION)
            assert now is not None
            assert alias is not None
            assert now.pointer.version == won.version == alias.number
            assert len(now.pointer.moves) == number + 1
        # One that is overtaken before it sets its alias leaves that of the later one.
        late = Late(tracking_uri, "signs")
        late.may, late.asked = threading.Event(), threading.Event()
        first, second = others(now)
        slow = pool.submit(move, first, now, late)
        assert late.asked.wait(20)
        registry.set_alias(CHAMPION, first.number)  # as the next run repairs it
        assert move(second, read_champion(storage)).version == second.number
        late.may.set()
        slow.result(30)
    alias = registry.find(CHAMPION)
    assert alias is not None
    assert alias.number == second.number

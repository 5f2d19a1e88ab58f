"""Promotion as a person meets it: approval, comparison and history, beside an earlier release."""

import json
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tasks.project import Project
from tasks.services.s3 import S3Address
from tests.fixtures import faults
from tests.fixtures.checkouts import QUICK, Repo, Trained, git
from tests.fixtures.faults import Answer, proxy_to
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.servers import PrefectApi, s3_client
from tests.fixtures.service import named as storage_named
from tests.fixtures.service import soon

COMMIT = "f2455f0"
ARCHIVE = CHECKOUT.root / f"tests/fixtures/releases/{COMMIT}.tar.xz"
BUCKET = f"release-{COMMIT}"  # the champion's signature covers the bucket's name
RELEASES = {"1": "646b9a4d37e1b222c8639efc5ee8c0b8", "2": "5640018f52a3ccefbca53f50ea7a419e"}


@dataclass(frozen=True)
class Team:
    """A checkout, and services that outlive a run, where an earlier release is champion."""

    repo: Repo
    api: PrefectApi
    services: dict[str, str]
    earlier: Path  # what the earlier version left behind

    def handsigns(self, *words: str | Path, code: int = 0, **changes: str) -> Any:
        return self.repo.handsigns(*words, code=code, **{**self.services, **changes})

    def paused(self) -> tuple[Any, str] | None:
        """A retrain that asks for approval, and its question."""
        for run in self.api.runs("retrain"):
            keys = run["state"]["state_details"].get("run_input_keyset")
            if run["state_type"] == "PAUSED" and keys:
                path = f"flow_runs/{run['id']}/input/filter"
                if asked := self.api.ask(path, {"prefix": keys["description"]}):
                    return run, str(asked[0]["value"])
        return None

    def resume(self, run: Any, answer: dict[str, str]) -> str:
        return str(self.api.ask(f"flow_runs/{run['id']}/resume", {"run_input": answer})["status"])

    def retrain(self, seconds: int, talk: Callable[[Any, str], None]) -> tuple[Any, Any]:
        """Retrain, and talk to a run that waits so long for an answer; its report, and the run."""
        policy = {"HANDSIGNS_PROMOTION": "approval", "HANDSIGNS_APPROVAL_SECONDS": str(seconds)}
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(self.handsigns, "retrain", **policy)
            run, question = soon(self.paused, 500)
            talk(run, question)
        return started.result(), self.api.ask(f"flow_runs/{run['id']}")

    def artifact(self, run: Any, key: str) -> str:
        of_run = {"flow_run_id": {"any_": [run["id"]]}, "key": {"any_": [key]}}
        return str(self.api.ask("artifacts/filter", {"artifacts": of_run})[0]["data"])


@pytest.fixture(scope="module")
def team(
    trained: Trained,
    s3_server: S3Address,
    prefect_api: PrefectApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> Team:
    earlier = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(earlier, filter="data")
    client, bucket = s3_client(s3_server), earlier / "bucket"
    client.create_bucket(Bucket=BUCKET)  # one file of tests has it: the pointer names it
    for path in filter(Path.is_file, bucket.rglob("*")):
        client.upload_file(str(path), BUCKET, path.relative_to(bucket).as_posix())
    repo = trained.checkout(tmp_path_factory.mktemp("promotion") / "checkout")
    repo.handsigns("import", trained.photos)
    shutil.copy(earlier / "mlflow.db", repo.project.local)
    made = repo.handsigns("keys", "new")
    services = {
        **storage_named(replace(s3_server, bucket=BUCKET)),
        **prefect_api.named,
        "HANDSIGNS_SIGNING_KEY": made["private"],
        "HANDSIGNS_PUBLIC_KEYS": f"{earlier / 'signing.pub.pem'}:{made['public']}",
    }
    return Team(repo, prefect_api, services, earlier)


def test_an_earlier_release_verifies_and_predicts_as_it_did_then(team: Team) -> None:
    recorded = json.loads((team.earlier / "predictions.json").read_text())
    for version, release in RELEASES.items():
        verified = team.handsigns("verify", version)
        assert verified["id"] == release
        assert verified["facts"]["git_revision"].startswith(COMMIT)
        then = {team.earlier / name: shares for name, shares in recorded[version].items()}
        now = team.handsigns("predict", "--model", version, *then)
        for one in now["predictions"]:
            assert one["probabilities"] == pytest.approx(then[Path(one["file"])], abs=0.02)
    compared = team.handsigns("compare", "1", "2")
    assert compared["champion"]["n"] == 120
    assert Path(compared["picture"]).is_file() == bool(compared["changed"])


def test_a_better_model_waits_for_approval_by_a_person(team: Team, s3_server: S3Address) -> None:
    def approve(run: Any, question: str) -> None:
        for words in ("Version 3", "accuracy 0.", "McNemar", "`comparison`"):
            assert words in question
        assert len(question) < 400  # the fields are in view below it
        assert run["name"] == "v3 waits for approval"
        # Nothing is locked meanwhile, and the champion still is the old one.
        team.repo.run("dvc", "status", "gate")
        assert team.handsigns("status")["champion"]["release"] == RELEASES["2"]
        for answer in ({}, {"name": "Ann"}, {"name": "", "decision": "approve"}):
            assert team.resume(run, answer) == "REJECT"
        given = {"name": "Ann", "decision": "approve", "comment": "looks right"}
        assert team.resume(run, given) == "ACCEPT"

    report, run = team.retrain(200, approve)
    assert report["status"] == "promoted", report["reason"]
    assert "approved by Ann: looks right" in report["reason"]
    assert report["comparison"]["no_worse"]
    assert (report["data"]["changes"]["since"], report["data"]["synthetic"]) == (2, 12)
    move = team.handsigns("status")["history"][-1]
    assert (move["by"], move["previous"], move["version"]) == ("Ann", 2, 3)
    for key, words in (
        ("champion-history", "Ann"),
        ("comparison", "McNemar"),
        ("audit", "Photos since version 2"),
        ("gate", "| accuracy |"),
    ):
        assert words in team.artifact(run, key)
    assert run["name"].startswith("v3 promoted: 0.")
    key = f"releases/{report['release']['id']}/model_card.md"
    card = s3_client(s3_server).get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()
    for words in (
        f"Version `{report['data']['version']}`. The photos were imported.",
        "Training also used 12 synthetic (rendered) hands.",
        f"| train | {report['data']['train']} |",
        f"| accuracy | {report['test']['accuracy']:.4f} (95% Wilson: ",
        "| full | ",
        "Passed. `gate.json` has every check",
    ):
        assert words in card, card


def test_the_champion_is_moved_by_hand_with_or_without_a_prefect_that_works(team: Team) -> None:
    refused = team.handsigns("promote", "2", code=1)
    assert "should not be champion: version 3 took its place: " in refused
    team.handsigns("promote", "2", "--force", "--reason", "the new one dazzles")
    described = team.handsigns("status")["history"][-1]["told"]
    assert "FORCED" in described
    assert team.handsigns("verify", "2")["forced"] == [described]
    (run,) = [one for one in team.api.runs("promote") if described == one["state"]["message"]]
    assert (run["name"], run["state_name"]) == ("promote version 2", "Promoted")
    assert "promote, FORCED" in team.artifact(run, "champion-history")

    def rollback(**changes: str) -> str:
        variables = {**team.services, **changes}
        return team.repo.run("handsigns", "rollback", "--from", "2", **variables).stderr

    older = Answer(200, b'"2.20.0"', {"content-type": "application/json"})
    with proxy_to(team.api.url.removesuffix("/api")) as prefect:
        for fault in (faults.answering(500, "Down"), lambda exchange: exchange.send(older)):
            with prefect.failing(faults.on("/api/(?!health)", fault)):
                said = rollback(PREFECT_API_URL=f"{prefect.url}/api")
            assert f"Prefect at {prefect.url}/api cannot be used (" in said
    said = rollback(PREFECT_API_AUTH_STRING="some:body")
    assert "cannot be used (401)" in said
    assert "set PREFECT_API_AUTH_STRING to user:password" in said
    assert team.handsigns("status")["champion"]["version"] == 3


@pytest.mark.slow
def test_a_promotion_meanwhile_a_rejection_and_silence_leave_the_champion(team: Team) -> None:
    number = 1 + max(one["version"] for one in team.handsigns("versions")["versions"])
    for seconds, answer, reason in (
        (200, {"name": "Ann", "decision": "approve"}, "The champion was changed meanwhile"),
        (200, {"name": "Ben", "decision": "reject", "comment": "no"}, "rejected by Ben: no."),
        (3, {}, "nobody approved it within 3 s."),
    ):

        def talk(run: Any, _: str, answer: dict[str, str] = answer) -> None:
            team.handsigns("promote", "1", "--force", "--reason", "first")  # repeated: no move
            assert not answer or team.resume(run, answer) == "ACCEPT"

        # A release differs by its parameters too, so there is a version without training.
        team.repo.change("gate", max_loss=5 - number / 10)
        report, run = team.retrain(seconds, talk)
        assert report["status"] == "registered"
        assert report["reason"].startswith(f"Version {number} stays challenger: {reason}")
        assert (report["model"]["version"], report["model"]["alias"]) == (number, "challenger")
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Registered")
        status = team.handsigns("status")
        assert (status["champion"]["version"], status["history"][-1]["reason"]) == (1, "first")
        number += 1


@pytest.mark.slow
def test_an_earlier_release_is_rebuilt_bit_by_bit_with_the_stages_of_its_commit(
    trained: Trained, s3: S3Address, tmp_path: Path
) -> None:
    def clone(name: str, revision: str) -> Repo:
        root = tmp_path / name
        git(tmp_path, "clone", "-q", str(CHECKOUT.root), name)
        git(root, "checkout", "-q", revision)
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

"""Promotion as a person meets it: approval, comparison and history, beside an earlier release."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PromotionError
from tasks.project import Project
from tasks.releases.champion import Champion, read_champion, set_champion
from tasks.releases.release import publish
from tasks.services.mlflow import CHAMPION, Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import Workshop
from tests.fixtures.earlier import COMMIT, Earlier
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.service import named as storage_named
from tests.fixtures.trained import Trained

RELEASES = {"1": "646b9a4d37e1b222c8639efc5ee8c0b8", "2": "5640018f52a3ccefbca53f50ea7a419e"}
ROUNDS = 12


@dataclass(frozen=True)
class Api:
    """What the UI shows of runs and lets a person answer."""

    prefect: PrefectApi

    def paused(self, seconds: float = 500) -> tuple[Any, str]:
        """Wait until a retrain asks for approval; the run, and the question."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for run in self.prefect.runs("retrain"):
                keys = run["state"]["state_details"].get("run_input_keyset")
                if run["state_type"] == "PAUSED" and keys:
                    path = f"flow_runs/{run['id']}/input/filter"
                    if asked := self.prefect.ask(path, {"prefix": keys["description"]}):
                        return run, str(asked[0]["value"])
            time.sleep(0.3)
        raise TimeoutError

    def resume(self, run: Any, **answer: str) -> str:
        done = self.prefect.ask(f"flow_runs/{run['id']}/resume", {"run_input": answer})
        return str(done["status"])

    def artifact(self, key: str) -> Any:
        """The latest artifact with a key."""
        wanted = {"artifacts": {"key": {"any_": [key]}}}
        return self.prefect.ask("artifacts/latest/filter", wanted)[0]


@pytest.fixture(scope="module")
def api(prefect_alone: PrefectApi) -> Api:
    return Api(prefect_alone)


@pytest.fixture(scope="module")
def workshop(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = trained.checkout(tmp_path_factory.mktemp("promotion") / "checkout")
    made.handsigns("import", trained.photos)
    return made


@pytest.fixture(scope="module")
def named(workshop: Workshop, earlier: Earlier, prefect_alone: PrefectApi) -> dict[str, str]:
    """Services that outlive a run; an earlier version's release is champion there."""
    return {**earlier.adopt(workshop), **prefect_alone.named}


@contextmanager
def retraining(workshop: Workshop, seconds: int, named: dict[str, str]) -> Iterator[Future[Any]]:
    """Run a retrain that waits so long for a person; its report is there after the block."""
    policy = {"HANDSIGNS_PROMOTION": "approval", "HANDSIGNS_APPROVAL_SECONDS": str(seconds)}
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(workshop.handsigns, "retrain", **named, **policy)


def test_an_earlier_release_verifies_and_predicts_as_it_did_then(
    workshop: Workshop, named: dict[str, str], earlier: Earlier
) -> None:
    for version, release in RELEASES.items():
        verified = workshop.handsigns("verify", version, **named)
        assert verified["id"] == release
        assert verified["facts"]["git_revision"].startswith(COMMIT)
        then = earlier.predictions(version)
        now = workshop.handsigns("predict", "--model", version, *then, **named)
        for one in now["predictions"]:
            assert one["probabilities"] == pytest.approx(then[Path(one["file"])], abs=0.02)


def test_a_better_model_waits_for_a_person_and_then_is_champion(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    told = workshop.handsigns("retrain", "--force", code=1, HANDSIGNS_PROMOTION="approval")
    assert "without PREFECT_API_URL and HANDSIGNS_S3_ENDPOINT_URL" in told["reason"]
    with retraining(workshop, 200, named) as started:
        run, question = api.paused()
        for words in ("Version 3", "McNemar", "Recall of each sign", "changed verdict"):
            assert words in question
        assert api.prefect.runs("retrain")[0]["name"] == "v3 waits for approval"
        # Nothing is locked meanwhile, and the champion still is the old one.
        workshop.run("dvc", "status", "gate")
        assert workshop.handsigns("status", **named)["champion"]["release"] == RELEASES["2"]
        assert api.resume(run) == "REJECT"
        assert api.resume(run, name="Ann") == "REJECT"
        assert api.resume(run, name="", decision="approve") == "REJECT"
        answer = {"name": "Ann", "decision": "approve", "comment": "looks right"}
        assert api.resume(run, **answer) == "ACCEPT"
    report = started.result()
    assert report["status"] == "promoted", report["reason"]
    assert "approved by Ann: looks right" in report["reason"]
    found = report["comparison"]
    assert found["no_worse"]
    assert found["champion"]["accuracy"] < found["challenger"]["accuracy"]
    assert found["won"] == sum(photo["now"] == "right" for photo in found["changed"])
    assert [row["label"] for row in found["recalls"]] == list("012345")
    assert report["data"]["changes"]["since"] == 2
    assert report["data"]["synthetic"] == 12
    move = workshop.handsigns("status", **named)["history"][-1]
    assert (move["by"], move["previous"], move["version"]) == ("Ann", 2, 3)
    assert "Ann" in api.artifact("champion-history")["data"]
    assert "McNemar" in api.artifact("comparison")["data"]
    summary = api.artifact("summary")
    assert "Photos since version 2" in summary["data"]
    assert "| accuracy |" in summary["data"]
    assert summary["description"].startswith("v3 promoted: 0.")
    assert api.prefect.runs("retrain")[0]["name"].startswith("v3 promoted: ")


def test_the_champion_is_moved_by_hand_in_flow_runs_that_say_what_they_are(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    refused = workshop.handsigns("promote", "2", code=1, **named)
    assert "should not be champion: version 3 took its place: " in refused
    why = ("--force", "--reason", "the new one dazzles")
    assert workshop.handsigns("promote", "2", *why, **named)["forced"]
    status = workshop.handsigns("status", **named)
    assert "FORCED" in status["history"][-1]["told"]
    assert workshop.handsigns("verify", "2", **named)["forced"] == [status["history"][-1]["told"]]
    assert "promote, FORCED" in api.artifact("champion-history")["data"]
    # Without Prefect the same is done.
    apart = {name: text for name, text in named.items() if name != "PREFECT_API_URL"}
    assert workshop.handsigns("rollback", **apart)["version"] == 3
    assert workshop.handsigns("rollback", "--from", "3", **named)["version"] == 2
    moves = api.prefect.runs("promote") + api.prefect.runs("rollback")
    runs = {(run["name"], run["state_name"]) for run in moves}
    assert {("promote version 2", "Promoted"), ("rollback version 2", "Rolled back")} <= runs


@contextmanager
def sick_prefect(version: str) -> Iterator[str]:
    """A server that says it is well, and which version of Prefect it is, and fails all else."""

    class Sick(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            known = {"/api/health": b"true", "/api/admin/version": f'"{version}"'.encode()}
            content = known.get(self.path, b"{}")
            self.send_response(200 if self.path in known else 500)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Sick) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_a_move_does_not_depend_on_a_prefect_that_fails(
    workshop: Workshop, named: dict[str, str], prefect_alone: PrefectApi
) -> None:
    def rollback(**environment: str) -> str:
        return workshop.run("handsigns", "rollback", **{**named, **environment}).stderr

    for version in ("3.6.0", "2.20.0"):
        with sick_prefect(version) as url:
            assert f"Prefect at {url} cannot be used (" in rollback(PREFECT_API_URL=url)
    said = rollback(PREFECT_API_AUTH_STRING="some:body")
    assert f"Prefect at {prefect_alone.url} cannot be used (401)" in said
    assert "set PREFECT_API_AUTH_STRING to user:password" in said


@pytest.mark.slow
def test_a_promotion_meanwhile_a_rejection_and_silence_leave_the_champion(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    # A release differs by its parameters too, so there is a version without training.
    workshop.change("gate", max_loss=4.9)
    with retraining(workshop, 200, named) as started:
        run, _ = api.paused()
        assert workshop.handsigns("promote", "3", **named)["version"] == 3
        assert api.resume(run, name="Ann", decision="approve") == "ACCEPT"
    overtaken, before = started.result(), workshop.handsigns("status", **named)
    workshop.change("gate", max_loss=4.8)
    with retraining(workshop, 200, named) as started:
        run, _ = api.paused()
        answer = {"name": "Ben", "decision": "reject", "comment": "too early"}
        assert api.resume(run, **answer) == "ACCEPT"
    rejected = started.result()
    workshop.change("gate", max_loss=4.7)
    with retraining(workshop, 3, named) as started:
        silent = started.result()
    for number, report, told in (
        (4, overtaken, "Version 4 stays challenger: The champion was changed meanwhile"),
        (5, rejected, "Version 5 stays challenger: rejected by Ben: too early."),
        (6, silent, "Version 6 stays challenger: nobody approved it within 3 s."),
    ):
        assert report["status"] == "registered"
        assert report["reason"].startswith(told)
        assert (report["model"]["version"], report["model"]["alias"]) == (number, "challenger")
    after = workshop.handsigns("status", **named)
    assert after["champion"]["version"] == 3
    assert (after["champion"], after["history"]) == (before["champion"], before["history"])
    # A run that was not answered ends as what it is: done.
    ended = [(run["state_type"], run["state_name"]) for run in api.prefect.runs("retrain")[:2]]
    assert ended == [("COMPLETED", "Registered")] * 2


@pytest.mark.slow
def test_an_earlier_release_is_rebuilt_bit_by_bit_with_the_stages_of_its_commit(
    trained: Trained, s3: S3Address, tmp_path: Path
) -> None:
    def clone(name: str, *revision: str) -> Workshop:
        root = tmp_path / name
        subprocess.run(["git", "clone", "-q", CHECKOUT.root, root], check=True)
        subprocess.run(["git", "-C", root, "checkout", "-q", *revision], check=True)
        return Workshop(Project(root))

    environment = {**storage_named(s3), "HANDSIGNS_DVC_REMOTE_URL": str(tmp_path / "remote")}
    then = clone("then", COMMIT)
    backbone = Path(".local/backbone")
    shutil.copytree(trained.workshop.project.root / backbone, then.project.root / backbone)
    then.change("features", views=1)
    then.change("gate", confidence=None, min_accuracy=0.0, min_recall=0.0, min_test_photos=6)
    then.change("gate", min_robust_accuracy=0.0, max_loss=9.0, max_calibration_error=1.0)
    for phase in ("base", "fine_tune", "full"):
        then.change(f"phases.{phase}", epochs=1, data_fraction=1.0)
    then.handsigns("import", "--replace", trained.photos, **environment)
    assert then.handsigns("retrain", **environment)["status"] == "promoted"
    rebuilt = clone("now", "HEAD").handsigns("reproduce", "champion", **environment)
    assert rebuilt["identical"], rebuilt


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
    storage: Storage, tracking_uri: str, tmp_path: Path
) -> None:
    registry, rivals = Registry(tracking_uri, "signs"), []
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(name)
        release = publish(storage, {"labels.json": tmp_path / name})
        rivals.append(registry.register(None, release.id, {"release_uri": release.uri}))

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

            def attempt(version: Any, expected: Any = expected, start: Any = start) -> Any:
                start.wait()
                try:
                    return set_champion(storage, registry, version, expected, "better", {})
                except PromotionError as error:
                    return error

            outcomes = list(pool.map(attempt, [one for one in rivals if one.content_id != now][:2]))
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

"""Promotion as a person meets it: approval, comparison and history in the Prefect UI."""

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import boto3
import pytest

from tasks.services.s3 import S3Address
from tests.fixtures.checkouts import Workshop
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.trained import Trained


@dataclass(frozen=True)
class Api:
    """What the UI shows of runs and lets a person answer."""

    prefect: PrefectApi

    def post(self, path: str, **body: Any) -> Any:
        return self.prefect.ask(path, body)

    def runs(self, flow: str) -> list[Any]:
        """Runs of a flow, the latest first."""
        found = self.post(
            "flow_runs/filter",
            flows={"name": {"any_": [flow]}},
            sort="EXPECTED_START_TIME_DESC",
        )
        return list(found)

    def paused(self, flow: str, seconds: float = 500) -> Any:
        """Wait until a run of a flow asks for approval."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for run in self.runs(flow):
                keys = run["state"]["state_details"].get("run_input_keyset")
                if run["state_type"] == "PAUSED" and self.inputs(run, keys["description"]):
                    return run
            time.sleep(0.3)
        raise TimeoutError(flow)

    def inputs(self, run: Any, key: str) -> str:
        """What a paused run shows above or in its form."""
        found = self.post(f"flow_runs/{run['id']}/input/filter", prefix=key)
        return str(found[0]["value"]) if found else ""

    def resume(self, run: Any, **answer: str) -> str:
        done = self.post(f"flow_runs/{run['id']}/resume", run_input=answer)
        return str(done["status"])

    def artifact(self, key: str) -> Any:
        """The latest artifact with a key."""
        return self.post("artifacts/latest/filter", artifacts={"key": {"any_": [key]}})[0]


@pytest.fixture(scope="module")
def api(prefect_alone: PrefectApi) -> Api:
    return Api(prefect_alone)


@pytest.fixture(scope="module")
def named(s3_server: S3Address, prefect_alone: PrefectApi) -> dict[str, str]:
    """Services that outlive a run, with a bucket of this module's own."""
    address = replace(s3_server, bucket=f"test-{uuid.uuid4().hex[:16]}")
    keys = {
        "aws_access_key_id": str(address.access_key_id),
        "aws_secret_access_key": str(address.secret_access_key),
    }
    client = boto3.client(
        "s3", endpoint_url=address.endpoint_url, region_name=address.region, **keys
    )
    client.create_bucket(Bucket=address.bucket)
    return {
        "HANDSIGNS_S3_ENDPOINT_URL": address.endpoint_url,
        "HANDSIGNS_BUCKET": address.bucket,
        **prefect_alone.named,
        **{name.upper(): text for name, text in keys.items()},
    }


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, trained: Trained, named: dict[str, str]
) -> Workshop:
    """A checkout whose champion hardly learned anything."""
    folder = tmp_path_factory.mktemp("promotion")
    made = trained.checkout(folder / "checkout")
    made.change("gate", min_accuracy=0.0)
    for phase in ("base", "fine_tune", "full"):
        made.change(f"phases.{phase}", epochs=1, learning_rate=1e-7)
    made.handsigns("import", trained.photos, **named)
    first = made.handsigns("retrain", **named)
    assert first["status"] == "promoted", first["reason"]
    assert first["test"]["accuracy"] < 0.7
    return made


@contextmanager
def retraining(workshop: Workshop, seconds: int, named: dict[str, str]) -> Iterator[Future[Any]]:
    """Run a retrain that waits so long for a person; its report is there after the block."""
    policy = {"HANDSIGNS_PROMOTION": "approval", "HANDSIGNS_APPROVAL_SECONDS": str(seconds)}
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(workshop.handsigns, "retrain", **named, **policy)


def test_a_better_model_waits_for_a_person_and_then_is_champion(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    for phase, rate in (("base", 0.001), ("fine_tune", 0.0001), ("full", 0.0005)):
        workshop.change(f"phases.{phase}", epochs=3, learning_rate=rate)
    with retraining(workshop, 200, named) as started:
        run = api.paused("retrain")
        question = api.inputs(run, run["state"]["state_details"]["run_input_keyset"]["description"])
        for words in ("Version 2", "McNemar", "better", "Recall of each sign", "changed verdict"):
            assert words in question
        # Nothing is locked meanwhile, and the champion still is the old one.
        workshop.run("dvc", "status", "gate")
        assert workshop.handsigns("status", **named)["champion"]["version"] == 1
        assert api.resume(run) == "REJECT"
        assert api.resume(run, name="Ann") == "REJECT"
        assert api.resume(run, name="", decision="approve") == "REJECT"
        answer = {"name": "Ann", "decision": "approve", "comment": "looks right"}
        assert api.resume(run, **answer) == "ACCEPT"
    report = started.result()
    assert report["status"] == "promoted"
    assert "approved by Ann: looks right" in report["reason"]
    found = report["comparison"]
    assert (found["verdict"], found["no_worse"]) == ("better", True)
    assert found["won"] == sum(photo["now"] == "right" for photo in found["changed"])
    assert [row["label"] for row in found["recalls"]] == list("012345")
    assert report["data"]["changes"]["since"] == 1
    assert report["data"]["synthetic"] == 12
    assert report["data"]["changes"]["added"] == report["data"]["changes"]["removed"] == 0
    move = workshop.handsigns("status", **named)["history"][-1]
    assert (move["by"], move["previous"], move["version"]) == ("Ann", 1, 2)
    assert "Ann" in api.artifact("champion-history")["data"]
    assert "McNemar" in api.artifact("comparison")["data"]
    assert "since version 1" in api.artifact("data-changes")["data"]
    assert api.artifact("summary")["description"].startswith("v2 promoted: 0.")
    assert not api.post("artifacts/filter", artifacts={"type": {"any_": ["progress"]}})
    (retrained,) = [one for one in api.runs("retrain") if one["id"] == run["id"]]
    assert retrained["name"].startswith("v2 promoted: ")


def test_the_champion_is_moved_by_hand_in_flow_runs_that_say_what_they_are(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    refused = workshop.handsigns("promote", "1", code=1, **named)
    assert "should not be champion: it was not compared with the present champion" in refused
    why = ("--force", "--reason", "the new one dazzles")
    forced = workshop.handsigns("promote", "1", *why, **named)
    assert forced["forced"]
    status = workshop.handsigns("status", **named)
    assert "FORCED" in status["history"][-1]["told"]
    assert workshop.handsigns("verify", "1", **named)["forced"] == [status["history"][-1]["told"]]
    assert "promote, FORCED" in api.artifact("champion-history")["data"]
    # Without Prefect the same is done, and sooner.
    apart = {name: text for name, text in named.items() if name != "PREFECT_API_URL"}
    began = time.monotonic()
    assert workshop.handsigns("rollback", fresh=True, **apart)["version"] == 2
    assert time.monotonic() - began < 30
    assert workshop.handsigns("rollback", "--from", "2", **named)["version"] == 1
    runs = {(run["name"], run["state_name"]) for run in api.runs("promote") + api.runs("rollback")}
    assert {("promote version 1", "Promoted"), ("rollback version 1", "Rolled back")} <= runs


def test_approval_without_services_that_outlive_the_run_is_refused(workshop: Workshop) -> None:
    told = workshop.handsigns("retrain", "--force", code=1, HANDSIGNS_PROMOTION="approval")
    assert told["status"] == "failed"
    assert "without PREFECT_API_URL and HANDSIGNS_S3_ENDPOINT_URL" in told["reason"]


def test_a_rejection_and_silence_both_leave_the_champion(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    before = workshop.handsigns("status", **named)
    assert before["champion"]["version"] == 1
    # A release differs by its parameters too, so there is a version each without training.
    workshop.change("gate", max_loss=4.9)
    with retraining(workshop, 200, named) as started:
        run = api.paused("retrain")
        answer = {"name": "Ben", "decision": "reject", "comment": "too early"}
        assert api.resume(run, **answer) == "ACCEPT"
    rejected = started.result()
    workshop.change("gate", max_loss=4.8)
    with retraining(workshop, 3, named) as started:
        silent = started.result()
    for number, report, told in (
        (3, rejected, "Version 3 stays challenger: rejected by Ben: too early."),
        (4, silent, "Version 4 stays challenger: nobody approved it within 3 s."),
    ):
        assert (report["status"], report["reason"]) == ("registered", told)
        assert report["comparison"]["verdict"] == "better"
        assert (report["model"]["version"], report["model"]["alias"]) == (number, "challenger")
    assert workshop.report() == silent
    after = workshop.handsigns("status", **named)
    assert (after["champion"], after["history"]) == (before["champion"], before["history"])
    assert after["challenger"]["version"] == 4
    # A run that was not answered ends as what it is: done.
    ended = [(run["state_type"], run["state_name"]) for run in api.runs("retrain")[:2]]
    assert ended == [("COMPLETED", "Registered")] * 2


def test_a_promotion_by_hand_while_a_person_is_asked_wins(
    workshop: Workshop, api: Api, named: dict[str, str]
) -> None:
    workshop.change("gate", max_loss=4.7)
    with retraining(workshop, 200, named) as started:
        run = api.paused("retrain")
        why = ("--force", "--reason", "cannot wait")
        assert workshop.handsigns("promote", "2", *why, **named)["version"] == 2
        assert api.resume(run, name="Ann", decision="approve") == "ACCEPT"
    report = started.result()
    assert report["status"] == "registered"
    assert "Version 5 stays challenger: The champion was changed meanwhile" in report["reason"]
    assert workshop.handsigns("status", **named)["champion"]["version"] == 2

"""What people see of runs: the comparison, outcomes in a few words, and notifications."""

import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stamina
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_UI_URL,
    temporary_settings,
)
from prefect.states import Crashed

from flows import ui
from flows.local import servers
from flows.local.clients import local_credentials
from flows.output import retrain_listing
from flows.report import ModelReport, RunReport
from flows.retrain import retrain
from flows.settings import Settings
from flows.ui import MOST_PHOTOS, comparison_text, notify_bad_end
from tasks.releases.comparison import PromotionDecision, compare
from tasks.services.notify import notify
from tests.fixtures.faults import receiving
from tests.fixtures.photos import LABELS
from tests.fixtures.servers import PrefectApi, running
from tests.fixtures.service import soon

SECRET = "sentinel-do-not-show"


def certain(classes: list[int]) -> np.ndarray:
    """Probabilities of a model that is sure of these signs."""
    return np.eye(6)[classes] * 0.94 + 0.01


def test_the_comparison_shows_scores_recalls_and_the_photos_that_changed() -> None:
    truth = [number % 6 for number in range(60)]
    names = [f"<b>{number}|.png" for number in range(60)]
    found = compare(certain([0] * 60), certain(truth), np.array(truth), names, classes=LABELS)
    text = comparison_text(PromotionDecision(True, found.reason, found))
    assert "50 photos only the challenger has right, 0 only the champion" in text
    assert "**better**" in text
    assert "| 60 photos | champion | challenger |" in text
    assert "| 3 | 10 | 0.0000 | 1.0000 | 1.0000 |" in text
    assert text.count("| right |") == MOST_PHOTOS
    assert "<b>" not in text
    rows = [line for line in text.splitlines() if line.endswith("| right |")]
    assert rows[0] == "| &lt;b&gt;1\\|.png | 1 | 0 | 1 | right |"
    none = comparison_text(PromotionDecision(False, "The champion cannot be scored: <broken>"))
    assert "cannot be scored: &lt;broken&gt;" in none


def report(status: Any, **parts: Any) -> RunReport:
    return RunReport(status=status, model=ModelReport(name="signs", version=4), **parts)


def test_an_outcome_is_a_few_words_and_a_rejection_says_by_how_much() -> None:
    compared = {"champion": {"accuracy": 0.982}, "challenger": {"accuracy": 0.991}}
    promoted = report("promoted", comparison=compared)
    promoted.data.changes = {"since": 3, "added": 84, "removed": 0}
    assert promoted.headline() == "v4 promoted: 0.982 -> 0.991, +84 photos"
    for status in ("unchanged", "cancelled"):
        assert report(status, reason="Nothing changed.").headline() == status
    reasons = ["accuracy 0.9630 < 0.9900", *(f"recall of {n} 0.7000 < 0.7500" for n in range(5))]
    rejected = report("rejected", gate={"reasons": reasons, "checks": [{}]})
    assert rejected.headline() == f"rejected: {'; '.join(reasons[:2])}; 4 more"
    listing = retrain_listing(rejected)
    assert dict(listing.rows)["gate"] == f"failed: {'; '.join(reasons[:5])}; 1 more"
    assert "params.yaml" in listing.notes[0]


def test_an_error_of_the_ui_is_logged_once_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ui, "_failed", False)
    nowhere = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(nowhere):
        ui.show_drift([], "none", Path("none"))
        ui.show_text("comparison", "", "none")
    assert len([line for line in caplog.messages if "does not show everything" in line]) == 1


def test_a_crash_is_notified_and_bad_settings_stop_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retrain.on_crashed_hooks == retrain.on_failure_hooks == [notify_bad_end]
    assert not retrain.on_cancellation_hooks
    run = FlowRun(flow_id=uuid.uuid4(), name="dancing-monkey")
    state = Crashed(message="Process exited with status code: -9.")
    with receiving(SECRET) as receiver, temporary_settings({PREFECT_UI_URL: "http://ui"}):
        monkeypatch.setenv("HANDSIGNS_NOTIFY_URLS", receiver.address)
        notify_bad_end(retrain, run, state)
        monkeypatch.setenv("HANDSIGNS_NONSENSE", "1")
        notify_bad_end(retrain, run, state)
    (crashed,) = receiver.messages
    assert (crashed["title"], crashed["type"]) == ("handsigns: retrain crashed", "failure")
    assert crashed["message"].startswith("Process exited with status code: -9.\nhttp://ui/runs/")


@pytest.mark.parametrize("address", ["json://user:{}@127.0.0.1:9/", "nosuch://{}", "slack://{}"])
def test_an_address_that_fails_keeps_nobody_else_from_it_and_is_not_shown(
    address: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with receiving(SECRET) as receiver, caplog.at_level(logging.DEBUG):
        assert not notify(f"{address.format(SECRET)} {receiver.address}", "title", "body")
    assert [message["title"] for message in receiver.messages] == ["title"]
    assert "HANDSIGNS_NOTIFY_URLS was refused or did not answer" in caplog.text
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.slow
def test_sqlite_loses_nothing_of_three_runs_at_once(tmp_path: Path) -> None:
    def work(worker: int) -> list[str]:
        flow, runs = ask("flows/", {"name": f"work-{worker}"})["id"], []
        for _ in range(20):
            run = ask("flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
            now = datetime.now(UTC).isoformat()
            line = {"name": "load", "level": 20, "timestamp": now, "flow_run_id": run}
            ask("logs/", [{**line, "message": str(number)} for number in range(20)])
            event = {"resource": {"prefect.resource.id": run}, "event": "load", "occurred": now}
            ask("events", [{**event, "id": str(uuid.uuid4())} for _ in range(20)])
            ask(f"flow_runs/{run}/set_state", {"state": {"type": "COMPLETED"}})
            runs.append(run)
        return runs

    def received(event: str) -> dict[str, int]:
        found = ask("events/count-by/resource", {"filter": {"event": {"name": [event]}}})
        return {one["value"]: one["count"] for one in found}

    with running(tmp_path, "prefect", partial(servers.prefect, tmp_path, Settings())) as program:
        api = PrefectApi(program.url, local_credentials(tmp_path).login)
        # On a busy machine the five attempts of Prefect's client may be too few.
        ask = stamina.retry(on=PrefectHTTPStatusError, attempts=None, timeout=300)(api.ask)
        with ThreadPoolExecutor(3) as pool:
            runs = [run for each in pool.map(work, range(3)) for run in each]
        ended = {f"prefect.flow-run.{run}" for run in runs}
        # Events are written behind the answer.
        soon(lambda: received("load") == dict.fromkeys(runs, 20), 180)
        soon(lambda: ended <= received("prefect.flow-run.Completed").keys(), 180)
        assert all(set(api.logged(run)) == set(map(str, range(20))) for run in runs)

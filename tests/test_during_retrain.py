"""What happens while a retrain runs: an import, a lost terminal."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.fixtures.checkouts import BIN, Workshop, make_checkout
from tests.fixtures.photos import write_photos
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(trained: Trained, tmp_path: Path, prefect_alone: PrefectApi) -> Workshop:
    """A checkout with imported photos, whose stages DVC restores."""
    made = trained.checkout(tmp_path / "checkout")
    made.change("gate", min_accuracy=0.0)
    made.handsigns("import", trained.photos)
    return made


@contextmanager
def retraining(checkout: Workshop, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A retrain that is past its first stage."""
    with subprocess.Popen(
        [BIN / "handsigns", "retrain", "--json"],
        cwd=checkout.project.root,
        env=checkout.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Stage audit"):
                break
        yield process


def test_an_import_waits_for_the_retrain_whose_release_names_what_it_was_trained_on(
    checkout: Workshop, prefect_alone: PrefectApi, tmp_path: Path
) -> None:
    more = write_photos(tmp_path / "more", per_class=2, seed=9)
    with retraining(checkout, **prefect_alone.named) as process:
        imported = checkout.handsigns("import", more)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert report["status"] == "promoted"
    assert imported["version"] != report["data"]["version"]
    facts = checkout.handsigns("verify", "champion")["facts"]
    assert facts["data_version"] == report["data"]["version"]
    stages = yaml.safe_load(checkout.project.lock.read_text())["stages"]
    used = {dep["md5"] for one in stages.values() for dep in one["deps"] if dep["path"] == "data"}
    assert used == {report["data"]["version"]}


def test_a_lost_terminal_cancels_the_run_and_says_so_everywhere(
    checkout: Workshop, prefect_alone: PrefectApi
) -> None:
    with retraining(checkout, **prefect_alone.named) as process:
        process.send_signal(signal.SIGHUP)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert checkout.report()["status"] == "cancelled"
    wanted = {"flows": {"name": {"any_": ["retrain"]}}, "sort": "EXPECTED_START_TIME_DESC"}
    run = prefect_alone.ask("flow_runs/filter", wanted)[0]
    assert (run["state_type"], run["name"]) == ("CANCELLED", "cancelled")


def test_a_run_of_the_schedule_logs_its_reason_and_no_traceback(
    prefect_alone: PrefectApi, tmp_path: Path
) -> None:
    made = make_checkout(tmp_path / "checkout")
    worker = {**prefect_alone.named, "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks"}
    code = "from flows.retrain import retrain; state = retrain(return_state=True)"
    code += "; print(state.state_details.flow_run_id)"
    run = made.run("python", "-c", code, **worker).stdout.split()[-1]
    found = prefect_alone.ask(f"flow_runs/{run}")
    reason = "There are no photos yet. Run `handsigns import FOLDER`"
    assert found["name"].startswith(f"failed: {reason}")
    assert (found["state_type"], found["state_name"]) == ("FAILED", "Failed")
    logs = prefect_alone.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
    lines = [line["message"] for line in logs]
    assert "Signatures are not checked: no public key is configured." in lines
    assert any(line.startswith(f"failed: {reason}") for line in lines)
    assert not [line for line in lines if "Traceback" in line]

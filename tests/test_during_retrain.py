"""What happens while a retrain runs: an import, a lost terminal; and a run of the schedule."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.services.dvc import check_trained_on
from tests.fixtures.checkouts import BIN, Workshop, make_checkout
from tests.fixtures.photos import write_photos
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.trained import Trained


@pytest.fixture
def checkout(trained: Trained, tmp_path: Path, prefect_alone: PrefectApi) -> Workshop:
    """A checkout with imported photos, whose stages DVC restores."""
    made = trained.checkout(tmp_path / "checkout")
    made.handsigns("import", trained.photos)
    return made


@contextmanager
def retraining(checkout: Workshop, api: PrefectApi) -> Iterator["subprocess.Popen[str]"]:
    """A retrain that is past its first stage."""
    with subprocess.Popen(
        [BIN / "handsigns", "retrain", "--json"],
        cwd=checkout.project.root,
        env=checkout.environment(**api.named),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Stage audit"):
                break
        yield process


@pytest.mark.slow
def test_an_import_waits_for_the_retrain_whose_release_names_what_it_was_trained_on(
    checkout: Workshop, prefect_alone: PrefectApi, tmp_path: Path
) -> None:
    more = write_photos(tmp_path / "more", per_class=2, seed=9)
    before = checkout.project.data_file.read_bytes()
    with retraining(checkout, prefect_alone) as process:
        imported = checkout.handsigns("import", more)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert report["status"] == "promoted"
    assert imported["version"] != report["data"]["version"]
    facts = checkout.handsigns("verify", "champion")["facts"]
    assert facts["data_version"] == report["data"]["version"]
    checkout.project.data_file.write_bytes(before)
    check_trained_on(checkout.project, report["data"]["version"])


@pytest.mark.slow
def test_a_lost_terminal_cancels_the_run_and_says_so_everywhere(
    checkout: Workshop, prefect_alone: PrefectApi
) -> None:
    with retraining(checkout, prefect_alone) as process:
        process.send_signal(signal.SIGHUP)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert checkout.report()["status"] == "cancelled"
    assert checkout.handsigns("status")["last_run"]["status"] == "cancelled"
    run = prefect_alone.runs("retrain")[0]
    assert (run["state_type"], run["name"]) == ("CANCELLED", "cancelled")


def test_a_run_of_the_schedule_logs_what_the_command_says_and_no_traceback(
    prefect_api: PrefectApi, tmp_path: Path
) -> None:
    made = make_checkout(tmp_path / "checkout")
    worker = {**prefect_api.named, "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks"}
    code = "from flows.retrain import retrain; state = retrain(return_state=True)"
    code += "; print(state.state_details.flow_run_id)"
    run = made.run("python", "-c", code, **worker).stdout.split()[-1]
    found = prefect_api.ask(f"flow_runs/{run}")
    reason = "There are no photos yet. Run `handsigns import FOLDER`"
    assert found["name"].startswith(f"failed: {reason}")
    assert (found["state_type"], found["state_name"]) == ("FAILED", "Failed")
    lines = prefect_api.logged(run)
    assert any(line.startswith(f"failed: {reason}") for line in lines)
    assert not [line for line in lines if "Traceback" in line]
    said = made.run("handsigns", "retrain", code=1, **prefect_api.named).stderr.splitlines()
    assert said[0] == "Signatures are not checked: no public key is configured."
    assert set(said) <= set(lines)
    assert made.handsigns("status")["last_run"]["reason"].startswith(reason)

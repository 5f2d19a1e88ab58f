"""The command's manners: instant help, exit codes, one line for what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fixtures.checkouts import BIN, Workshop, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos

VERBS = (
    "sample", "import", "retrain", "status", "evaluate", "predict", "promote", "rollback", "verify",
    "up", "down", "deploy", "serve", "reproduce",
)  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A checkout without photos."""
    return make_checkout(tmp_path_factory.mktemp("cli") / "checkout")


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\nfrom flows.cli import app\n"
        "with contextlib.suppress(SystemExit): app(['--help'])\n"
        "heavy = {'tensorflow', 'keras', 'prefect', 'mlflow', 'boto3', 'dvc', 'numpy'}\n"
        "sys.exit(1 if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(verb: str, tmp_path: Path) -> None:
    done = subprocess.run([BIN / "handsigns", verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize("words", [["nonsense"], ["promote"], ["promote", "three"], ["predict"]])
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    done = subprocess.run([BIN / "handsigns", *words], capture_output=True, text=True)
    assert done.returncode == 2


def test_outside_a_checkout_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "handsigns", "status"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no dvc.yaml" in done.stderr


def test_an_unknown_parameter_is_named_and_reported(workshop: Workshop) -> None:
    kept = workshop.project.params.read_text()
    workshop.change("gate", min_acuracy=0.9)
    try:
        told = workshop.handsigns("retrain", code=1)
    finally:
        workshop.project.params.write_text(kept)
    assert told["status"] == "failed"
    assert "gate.min_acuracy" in told["reason"]
    assert workshop.report() == told


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "params.yaml is not valid YAML"),
        (b"seed: yes", "seed: must not be true or false (received True)"),
    ],
)
def test_parameters_that_cannot_be_read_are_reported(
    workshop: Workshop, content: bytes, reason: str
) -> None:
    kept = workshop.project.params.read_bytes()
    workshop.project.params.write_bytes(
        content if content[0] == 0xFF else kept.replace(b"seed: 20", content)
    )
    try:
        told = workshop.handsigns("retrain", code=1)
    finally:
        workshop.project.params.write_bytes(kept)
    assert reason in told["reason"]
    assert workshop.report() == told


@pytest.mark.parametrize("verb", [("promote", "1"), ("rollback",)])
def test_a_reason_that_is_no_utf_8_is_wrong_usage(
    workshop: Workshop, verb: tuple[str, ...]
) -> None:
    latin = os.fsdecode("zur\xfcck".encode("latin-1"))
    told = workshop.run("handsigns", *verb, "--reason", latin, code=2).stderr
    assert "must be UTF-8" in told
    assert "Traceback" not in told


def test_status_names_parameters_that_are_gone(workshop: Workshop) -> None:
    kept = workshop.project.params.read_bytes()
    workshop.project.params.unlink()
    try:
        told = workshop.handsigns("status", code=1)
    finally:
        workshop.project.params.write_bytes(kept)
    assert "Parameters cannot be read" in told


def test_a_damaged_version_of_the_photos_is_told_before_they_are_exchanged(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    workshop.handsigns("import", write_photos(tmp_path / "first", per_class=1))
    before = sorted(path.name for path in workshop.project.data.rglob("*.png"))
    other = write_photos(tmp_path / "other", per_class=1, seed=3)
    for damage in (b"{", b"\xff\xfe\x00"):
        workshop.project.data_file.write_bytes(damage)
        told = workshop.handsigns("import", other, "--replace", code=1)
        assert "data.dvc is not what DVC writes" in told
    assert sorted(path.name for path in workshop.project.data.rglob("*.png")) == before
    workshop.project.data_file.unlink()
    workshop.handsigns("import", other, "--replace")
    assert sorted(path.name for path in workshop.project.data.rglob("*.png")) != before


@pytest.mark.parametrize("seconds", ["nan", "inf", "-5", "30"])
def test_a_silence_that_would_crash_healthy_runs_is_wrong_usage(
    workshop: Workshop, seconds: str
) -> None:
    api = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    told = workshop.run("handsigns", "deploy", "--silence", seconds, code=2, **api).stderr
    assert "must be more than the 30 s" in told


def test_json_is_json_on_a_terminal_that_knows_few_letters() -> None:
    code = "from flows.output import print_json; print_json({'file': 'ü手.png'})"
    known = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True)
    assert json.loads(done.stdout) == {"file": "ü手.png"}


def test_an_interrupted_command_says_what_that_means(workshop: Workshop) -> None:
    code = (
        "import signal, sys\n"
        "from flows import cli\n"
        "import flows.cli as runs\n"
        # A shell has what it starts in the background ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runs.open_workspace = lambda: signal.raise_signal(signal.SIGINT)\n"
        "sys.argv = ['handsigns', 'status']\n"
        "cli.main()\n"
    )
    done = workshop.run("python", "-c", code, code=130)
    assert done.stderr == "Interrupted. What was there before is whole; run again to go on.\n"


def test_a_mistyped_setting_is_named(workshop: Workshop) -> None:
    told = workshop.handsigns("status", code=1, HANDSIGNS_BUKET="x")
    assert "HANDSIGNS_BUCKET" in told


def test_a_server_that_takes_no_deployment_is_named_in_one_line(workshop: Workshop) -> None:
    told = workshop.handsigns("deploy", code=1, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert "Prefect did not do as asked (ConnectError). Received: http://127.0.0.1:9/api." in told
    assert told.count("\n") == 1


@pytest.fixture
def declared(workshop: Workshop) -> Iterator[Path]:
    """The checkout's `prefect.yaml`, which others need as it is."""
    path = workshop.project.root / "prefect.yaml"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoilt", "fault"),
    [
        ("deployments:\n- name: retrain\n  work_pool: {", "line 3, column 15"),
        ("- retrain", "the file: Input should be"),
        ("deployments: 3", "deployments: Input should be"),
        ("deployments: [{name: retrain}]", "deployments.0.entrypoint: Field required"),
    ],
)
@pytest.mark.parametrize("verb", ["deploy", "up"])
def test_a_misspelt_schedule_is_told_before_any_server_is_asked_or_started(
    workshop: Workshop, declared: Path, verb: str, spoilt: str, fault: str
) -> None:
    def logs() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workshop.project.local.glob("logs/*")}

    before = logs()
    declared.write_text(spoilt)
    api = {"PREFECT_API_URL": "http://127.0.0.1:9/api"} if verb == "deploy" else {}
    told = workshop.handsigns(verb, code=1, **api)
    assert f"declared for Prefect cannot be read. Received: '{declared}' (" in told
    assert fault in told
    assert told.count("\n") == 1
    assert logs() == before


def test_no_photos_yet_says_how_to_get_some(workshop: Workshop) -> None:
    told = workshop.handsigns("retrain", code=1)
    assert told["status"] == "failed"
    assert "handsigns import" in told["reason"]


def test_a_missing_source_is_refused_in_one_line(workshop: Workshop) -> None:
    told = workshop.handsigns("import", "nowhere", code=1)
    assert "nowhere" in told
    assert told.strip().count("\n") == 0


def test_import_tells_what_was_taken_and_what_not_and_why(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    photos = write_photos(tmp_path / "photos", per_class=3)
    (photos / "1/broken.jpg").write_bytes(b"")
    (photos / "six").mkdir()
    (photos / "six/hand.png").write_bytes((photos / "5/0000.png").read_bytes())
    report = workshop.handsigns("import", photos)
    assert sum(report["taken"]["train"].values()) == 18
    reasons = {Path(one["origin"]).name: one["reason"] for one in report["quarantined"]}
    assert set(reasons) == {"broken.jpg", "hand.png"}
    assert (workshop.project.quarantine / "quarantine.json").is_file()
    record = yaml.safe_load((workshop.project.root / "data.dvc").read_text())
    assert record["outs"][0]["md5"] == report["version"]
    assert record["meta"] == {"source": "photos"}
    again = workshop.run("handsigns", "import", photos).stdout
    assert "already there" in again
    assert report["version"] in again


@pytest.mark.slow
def test_the_sample_is_the_one_that_the_committed_version_names(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    told = workshop.handsigns("sample")
    committed = yaml.safe_load((CHECKOUT.root / "data.dvc").read_text())
    assert committed["meta"] == {"source": "sample"}
    assert told["version"] == committed["outs"][0]["md5"]
    # Photos that are added to it are not mixed with drawings in silence.
    done = workshop.run("handsigns", "import", write_photos(tmp_path / "photos", per_class=1))
    assert "data/ holds the rendered sample beside these photos" in done.stderr

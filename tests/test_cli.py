"""The command's manners: instant help, exit codes, one line for what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from tests.fixtures.checkouts import BIN, Workshop, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos

VERBS = (
    "sample", "import", "retrain", "status", "evaluate", "predict", "promote", "rollback", "verify",
    "up", "down", "deploy", "serve", "reproduce", "versions", "rebuild-registry",
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


@pytest.mark.parametrize("verb", [*VERBS, "keys new", "keys sign"])
def test_each_verb_explains_itself(verb: str) -> None:
    done = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert done.exit_code == 0
    assert "--json" in done.output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nonsense"], "nonsense"),
        (["promote"], "version"),
        (["promote", "two"], "'two' is not a number"),
        (["predict"], "FILES"),
        (["promote", "1", "--reason", os.fsdecode(b"zur\xfcck")], "must be UTF-8"),
        (["rollback", "--reason", os.fsdecode(b"zur\xfcck")], "must be UTF-8"),
        (["deploy", "--silence", "nan"], "must be more than the 30 s"),
        (["deploy", "--silence", "inf"], "must be more than the 30 s"),
        (["deploy", "--silence", "-5"], "must be more than the 30 s"),
        (["deploy", "--silence", "30"], "must be more than the 30 s"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert reason.lower() in done.output.lower()


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"handsigns {version('handsigns')}\n")


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
        (b"seed: yes", "seed: Input should be a valid integer, not 'yes'"),
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


def test_status_names_parameters_that_are_gone(workshop: Workshop) -> None:
    kept = workshop.project.params.read_bytes()
    workshop.project.params.unlink()
    try:
        told = workshop.handsigns("status", code=1)
    finally:
        workshop.project.params.write_bytes(kept)
    assert "params.yaml' cannot be read" in told


def test_a_damaged_version_of_the_photos_is_told_before_they_are_exchanged(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    workshop.handsigns("import", write_photos(tmp_path / "first", per_class=3))
    before = sorted(path.name for path in workshop.project.data.rglob("*.png"))
    other = write_photos(tmp_path / "other", per_class=3, seed=3)
    for damage in (b"{", b"\xff\xfe\x00"):
        workshop.project.data_file.write_bytes(damage)
        told = workshop.handsigns("import", other, "--replace", code=1)
        assert "data.dvc is not what DVC writes" in told
    assert sorted(path.name for path in workshop.project.data.rglob("*.png")) == before
    workshop.project.data_file.unlink()
    workshop.handsigns("import", other, "--replace")
    assert sorted(path.name for path in workshop.project.data.rglob("*.png")) != before


def test_json_is_json_on_a_terminal_that_knows_few_letters() -> None:
    code = "from flows.output import echo; echo(True, {'file': 'ü手.png'}, '')"
    known = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True)
    assert json.loads(done.stdout) == {"file": "ü手.png"}


def test_an_interrupted_command_says_what_that_means(workshop: Workshop) -> None:
    code = (
        "import signal, sys\n"
        "from flows import cli\n"
        # A shell has what it starts in the background ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "cli.open_workspace = lambda: signal.raise_signal(signal.SIGINT)\n"
        "sys.argv = ['handsigns', 'status']\n"
        "cli.main()\n"
    )
    done = workshop.run("python", "-c", code, code=130)
    assert done.stderr == "Interrupted. Nothing is lost; run again to continue.\n"


def test_a_mistyped_setting_is_named(workshop: Workshop) -> None:
    told = workshop.handsigns("status", code=1, HANDSIGNS_BUKET="x")
    assert "HANDSIGNS_BUCKET" in told


def test_a_server_that_takes_no_deployment_is_named_in_one_line(workshop: Workshop) -> None:
    told = workshop.handsigns("deploy", code=1, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert "Prefect at http://127.0.0.1:9/api failed (ConnectError)." in told
    assert told.count("\n") == 1


@pytest.fixture
def declared(workshop: Workshop) -> Iterator[Path]:
    """The checkout's `prefect.yaml`, which others need as it is."""
    path = workshop.project.root / "prefect.yaml"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("verb", "spoilt", "fault"),
    [
        ("up", "deployments:\n- name: retrain\n  work_pool: {", "line 3, column 15"),
        ("deploy", "- retrain", "the file: Input should be"),
        ("deploy", "deployments: [{name: retrain}]", "deployments.0.entrypoint: Field required"),
    ],
)
def test_a_misspelt_schedule_is_told_before_any_server_is_asked_or_started(
    workshop: Workshop, declared: Path, verb: str, spoilt: str, fault: str
) -> None:
    def logs() -> dict[Path, int]:
        found = workshop.project.local.glob("logs/*")
        return {path: path.stat().st_mtime_ns for path in found if path.stem != verb}

    before = logs()
    declared.write_text(spoilt)
    api = {"PREFECT_API_URL": "http://127.0.0.1:9/api"} if verb == "deploy" else {}
    told = workshop.handsigns(verb, code=1, **api)
    assert f"'{declared}' cannot be read (" in told
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
    done = workshop.run("handsigns", "import", write_photos(tmp_path / "photos", per_class=3))
    assert "data/ holds the rendered sample beside these photos" in done.stderr

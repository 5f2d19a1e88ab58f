"""The command line: fast help, exit codes, one line for what is refused."""

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from flows.keys import refuse_tracked
from tasks.errors import SettingsError
from tasks.project import Project
from tasks.releases.comparison import compare_releases
from tasks.releases.release import fetch
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import BIN, Workshop, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos
from tests.fixtures.service import grey, publish_graph

VERBS = (
    "sample", "import", "retrain", "status", "evaluate", "predict", "promote", "rollback", "verify",
    "up", "down", "deploy", "serve", "reproduce", "versions", "rebuild-registry", "prune",
    "runs", "compare", "open",
)  # fmt: skip
NOT_UTF_8 = b"zur\xfcck".decode(errors="surrogateescape")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A checkout without photos."""
    return make_checkout(tmp_path_factory.mktemp("cli") / "checkout")


@pytest.fixture
def changed(workshop: Workshop) -> Iterator[Workshop]:
    """The same checkout, whose files are put back afterwards."""
    paths = (workshop.project.params, workshop.project.root / "prefect.yaml")
    before = {path: path.read_bytes() for path in paths}
    yield workshop
    for path, content in before.items():
        path.write_bytes(content)


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
    for verb in (*VERBS, "keys new", "keys sign"):
        explained = CliRunner().invoke(app, [*verb.split(), "--help"])
        assert explained.exit_code == 0
        assert "--json" in explained.output
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"handsigns {version('handsigns')}\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nonsense"], "nonsense"),
        (["retrian"], "Did you mean 'retrain'?"),
        (["promote"], "version"),
        (["open", "mlfow"], "'mlfow' is not one of"),
        (["promote", "two"], "'two' is not a number"),
        (["predict"], "FILES"),
        (["promote", "1", "--reason", NOT_UTF_8], "must be UTF-8"),
        (["rollback", "--reason", NOT_UTF_8], "must be UTF-8"),
        (["deploy", "--silence", "nan"], "--silence"),
        (["deploy", "--silence", "30"], "--silence"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert reason.lower() in done.output.lower()


def test_outside_a_checkout_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [BIN / "handsigns", "status"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no dvc.yaml" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"min_accuracy", b"min_acuracy", "gate.min_acuracy"),
        (b"seed: 20", b"seed: yes", "seed: Input should be a valid integer, not 'yes'"),
        (b"seed: 20", b"\xff\xfe\x00", "params.yaml is not valid YAML"),
        (b"", b"", "handsigns import"),  # there are no photos yet
    ],
)
def test_what_cannot_be_trained_on_is_reported(
    changed: Workshop, old: bytes, new: bytes, reason: str
) -> None:
    params = changed.project.params
    params.write_bytes(params.read_bytes().replace(old, new) if old else params.read_bytes())
    report = changed.handsigns("retrain", code=1)
    assert report["status"] == "failed"
    assert reason in report["reason"]
    assert changed.report() == report


@pytest.mark.parametrize(
    ("words", "environment", "reason"),
    [
        (["status"], {"HANDSIGNS_BUKET": "x"}, "HANDSIGNS_BUCKET"),
        (["import", "nowhere"], {}, "nowhere"),
        (
            ["deploy"],
            {"PREFECT_API_URL": "http://127.0.0.1:9/api"},
            "Prefect at http://127.0.0.1:9/api failed (ConnectError).",
        ),
        (["deploy", "--pool", "nobody"], {}, "There is no work pool 'nobody'."),
        (["open", "mlflow"], {}, "No mlflow is up. Start it with `handsigns up`."),
        (["status", "without params.yaml"], {}, "params.yaml' cannot be read"),
    ],
)
def test_a_refusal_is_one_line(
    changed: Workshop, words: list[str], environment: dict[str, str], reason: str
) -> None:
    if words[-1] == "without params.yaml":
        changed.project.params.unlink()
        words = words[:1]
    said = changed.handsigns(*words, code=1, **environment)
    assert reason in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "content", "fault"),
    [
        ("up", "deployments:\n- name: retrain\n  work_pool: {", "line 3, column 15"),
        ("deploy", "- retrain", "the file: Input should be"),
        ("deploy", "deployments: [{name: retrain}]", "deployments.0.entrypoint: Field required"),
    ],
)
def test_a_damaged_prefect_yaml_is_named_before_any_server_is_asked_or_started(
    changed: Workshop, verb: str, content: str, fault: str
) -> None:
    def logs() -> dict[Path, int]:
        found = changed.project.local.glob("logs/*")
        return {path: path.stat().st_mtime_ns for path in found if path.stem != verb}

    before, declared = logs(), changed.project.root / "prefect.yaml"
    declared.write_text(content)
    api = {"PREFECT_API_URL": "http://127.0.0.1:9/api"} if verb == "deploy" else {}
    said = changed.handsigns(verb, code=1, **api)
    assert f"'{declared}' cannot be read (" in said
    assert fault in said
    assert said.count("\n") == 1
    assert logs() == before


def test_open_prints_an_address(workshop: Workshop) -> None:
    named = {"PREFECT_API_URL": "https://prefect.example/api"}
    assert workshop.handsigns("open", "prefect", **named)["url"] == "https://prefect.example"
    assert workshop.handsigns("open", "page")["url"] == "http://127.0.0.1:8000"


def test_runs_show_how_each_run_ended_and_why(changed: Workshop) -> None:
    changed.project.params.write_text("seed: yes")
    for _ in range(2):
        changed.handsigns("retrain", code=1)
    found = changed.handsigns("runs", "-n", "2")["runs"]
    assert [one["status"] for one in found] == ["failed", "failed"]
    assert "params.yaml" in found[0]["reason"]
    shown = changed.run("handsigns", "runs", "-n", "1").stdout
    assert "params.yaml" in shown
    assert shown.count("failed") == 1


def test_two_releases_are_compared_on_the_same_photos(
    storage: Storage, graphs: tuple[bytes, bytes], tmp_path: Path
) -> None:
    project = Project(tmp_path)
    releases = {}
    for name, graph in zip("12", graphs, strict=True):
        made = publish_graph(storage, tmp_path / f"made{name}", graph)
        releases[name] = fetch(storage, made.id, tmp_path / "releases")
    for sign in range(6):
        (project.data / f"train/{sign}").mkdir(parents=True)
        (project.data / f"train/{sign}/{sign}.png").write_bytes(grey(sign))
    found, picture = compare_releases(project, releases)
    assert (found.champion.accuracy, found.challenger.accuracy) == (1.0, 0.0)
    assert (found.won, found.lost) == (0, 6)
    assert picture is not None
    assert Image.open(picture).width >= 1000
    assert compare_releases(project, {"1": releases["1"], "again": releases["1"]})[1] is None


def test_an_interrupted_command_says_what_that_means(workshop: Workshop) -> None:
    code = (
        "import signal, sys\n"
        "from flows import cli, look\n"
        # A shell has what it starts in the background ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "look.open_workspace = lambda: signal.raise_signal(signal.SIGINT)\n"
        "sys.argv = ['handsigns', 'status']\n"
        "cli.main()\n"
    )
    done = workshop.run("python", "-c", code, code=130)
    assert done.stderr == "Interrupted. Nothing is lost; run again to continue.\n"


def test_import_says_what_was_taken_and_what_not_and_why(tmp_path: Path) -> None:
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
    record = yaml.safe_load(workshop.project.data_file.read_text())
    assert record["outs"][0]["md5"] == report["version"]
    assert record["meta"] == {"source": "photos"}
    again = workshop.run("handsigns", "import", photos).stdout
    assert "already there" in again
    assert report["version"] in again


def test_a_damaged_data_dvc_is_named_before_photos_are_replaced(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    workshop.handsigns("import", write_photos(tmp_path / "first", per_class=3))
    before = sorted(path.name for path in workshop.project.data.rglob("*.png"))
    other = write_photos(tmp_path / "other", per_class=3, seed=3)
    for damage in (b"{", b"\xff\xfe\x00"):
        workshop.project.data_file.write_bytes(damage)
        said = workshop.handsigns("import", other, "--replace", code=1)
        assert "data.dvc is not what DVC writes" in said
    assert sorted(path.name for path in workshop.project.data.rglob("*.png")) == before
    workshop.project.data_file.unlink()
    workshop.handsigns("import", other, "--replace")
    assert sorted(path.name for path in workshop.project.data.rglob("*.png")) != before


@pytest.mark.slow
def test_the_sample_is_the_one_that_the_committed_version_names(tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    rendered = workshop.handsigns("sample")
    committed = yaml.safe_load((CHECKOUT.root / "data.dvc").read_text())
    assert committed["meta"] == {"source": "sample"}
    assert rendered["version"] == committed["outs"][0]["md5"]
    done = workshop.run("handsigns", "import", write_photos(tmp_path / "photos", per_class=3))
    assert "data/ holds the rendered sample beside these photos" in done.stderr


def test_a_new_key_pair_is_private_and_replaces_none(tmp_path: Path) -> None:
    command = [BIN / "handsigns", "keys", "new", "--folder", tmp_path / "keys", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    made = json.loads(done.stdout)
    assert done.returncode == 0
    assert stat.S_IMODE(Path(made["private"]).stat().st_mode) == 0o600
    assert len(made["key"]) == 16
    Path(made["private"]).unlink()  # half a pair is not replaced either
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1
    assert "must not be replaced" in again.stderr
    assert again.stderr.count("\n") == 1
    assert [str(path) for path in (tmp_path / "keys").iterdir()] == [made["public"]]


def test_no_private_key_where_git_would_take_it(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("/.local/\n")
    refuse_tracked(tmp_path / ".local" / "keys")
    with pytest.raises(SettingsError, match="git would take a private key"):
        refuse_tracked(tmp_path / "keys")

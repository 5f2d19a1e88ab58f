"""The command line: fast help, exit codes, one line for what is refused."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from tasks.project import Project
from tasks.releases.comparison import compare_releases
from tasks.releases.release import fetch
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import BIN, Repo, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos
from tests.fixtures.service import grey, publish_graph

NOWHERE = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """A checkout without photos."""
    return make_checkout(tmp_path_factory.mktemp("cli") / "checkout")


@pytest.fixture
def changed(repo: Repo) -> Iterator[Repo]:
    """The same checkout, whose files are put back afterwards."""
    paths = (repo.project.params, repo.project.root / "prefect.yaml")
    before = {path: path.read_bytes() for path in paths}
    yield repo
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
    verbs = [*typer.main.get_command(app).commands]  # type: ignore[attr-defined]
    assert len(verbs) >= 20
    for verb in verbs:
        assert f" {verb} " in done.stdout
    for words in (*map(str.split, verbs), ["keys", "new"], ["keys", "sign"]):
        explained = CliRunner().invoke(app, [*words, "--help"])
        assert explained.exit_code == 0
        assert "--json" in explained.output or words == ["keys"]
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"handsigns {version('handsigns')}\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("retrian", "Did you mean 'retrain'?"),
        ("promote", "version"),
        ("open mlfow", "'mlfow' is not one of"),
        ("promote two", "'two' is not a number"),
        ("predict", "FILES"),
        ("deploy --silence 30", "--silence"),
        ("import x --set-labels", "needs --replace"),
    ],
)
def test_wrong_usage_exits_with_2(words: str, reason: str) -> None:
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2
    assert reason.lower() in done.output.lower()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"min_accuracy", b"min_acuracy", "gate.min_acuracy"),
        (b"seed: 20", b"seed: yes", "seed: Input should be a valid integer, not 'yes'"),
        (b"seed: 20", b"\xff\xfe\x00", "params.yaml is not valid YAML"),
    ],
)
def test_what_cannot_be_trained_on_is_reported(
    changed: Repo, old: bytes, new: bytes, reason: str
) -> None:
    params = changed.project.params
    params.write_bytes(params.read_bytes().replace(old, new))
    report = changed.handsigns("retrain", code=1)
    assert report["status"] == "failed"
    assert reason in report["reason"]
    assert changed.report() == report
    (run,) = changed.handsigns("runs", "-n", "1")["runs"]
    assert (run["status"], run["reason"]) == ("failed", report["reason"])


@pytest.mark.parametrize(
    ("words", "environment", "reason"),
    [
        ("status", {"HANDSIGNS_BUKET": "x"}, "HANDSIGNS_BUCKET"),
        ("import nowhere", {}, "nowhere"),
        ("deploy", NOWHERE, "Prefect at http://127.0.0.1:9/api failed (ConnectError)."),
        ("deploy --pool nobody", {}, "There is no work pool 'nobody'."),
        ("open mlflow", {}, "No mlflow is up. Start it with `handsigns up`."),
    ],
)
def test_a_refusal_is_one_line(
    repo: Repo, words: str, environment: dict[str, str], reason: str
) -> None:
    said = repo.handsigns(*words.split(), code=1, **environment)
    assert reason in said
    assert said.count("\n") == 1


def test_missing_and_damaged_files_are_named_before_a_server_is_asked_or_started(
    changed: Repo, tmp_path: Path
) -> None:
    outside = subprocess.run(
        [BIN / "handsigns", "status"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (outside.returncode, outside.stderr.count("\n")) == (1, 1)
    assert "no dvc.yaml" in outside.stderr
    declared = changed.project.root / "prefect.yaml"
    for verb, content, fault in (
        ("up", "deployments:\n- name: retrain\n  work_pool: {", "line 3, column 15"),
        ("deploy", "deployments: [{name: retrain}]", "'entrypoint'"),
    ):
        declared.write_text(content)
        said = changed.handsigns(verb, code=1, **(NOWHERE if verb == "deploy" else {}))
        assert f"'{declared}' cannot be read (" in said
        assert fault in said
        assert said.count("\n") == 1
    changed.project.params.unlink()
    assert "params.yaml' cannot be read" in changed.handsigns("status", code=1)
    logs = {path.stem for path in changed.project.local.glob("logs/*")}
    assert not logs & {"mlflow", "prefect", "worker"}


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


def test_import_says_what_was_taken_and_what_not_and_why(tmp_path: Path) -> None:
    made = make_checkout(tmp_path / "checkout")
    project, photos = made.project, write_photos(tmp_path / "photos", per_class=3)
    (photos / "1/broken.jpg").write_bytes(b"")
    (photos / "six").mkdir()
    (photos / "six/hand.png").write_bytes((photos / "5/0000.png").read_bytes())
    report = made.handsigns("import", photos)
    assert sum(report["taken"]["train"].values()) == 18
    reasons = {Path(one["origin"]).name: one["reason"] for one in report["quarantined"]}
    assert set(reasons) == {"broken.jpg", "hand.png"}
    assert (project.quarantine / "quarantine.json").is_file()
    record = yaml.safe_load(project.data_file.read_text())
    assert record["outs"][0]["md5"] == report["version"]
    assert record["meta"] == {"source": "photos"}
    again = made.run("handsigns", "import", photos).stdout
    assert "already there" in again
    assert report["version"] in again
    (photos / "4").rename(photos / "four")
    said = made.run("handsigns", "import", photos, "--replace", code=1).stderr
    unknown = "unknown label folder: 'four' is none of 0, 1, 2, 3, 4, 5; 3 files quarantined. To "
    assert f"{unknown}take a source's folders as the labels: --replace --set-labels." in said
    assert "there are none in train/4" in said
    # A damaged data.dvc is named before photos are replaced.
    before = sorted(path.name for path in project.data.rglob("*.png"))
    other = write_photos(tmp_path / "other", per_class=3, seed=3)
    project.data_file.write_bytes(b"\xff\xfe\x00")
    said = made.handsigns("import", other, "--replace", code=1)
    assert "data.dvc is not what DVC writes" in said
    assert sorted(path.name for path in project.data.rglob("*.png")) == before


@pytest.mark.slow
def test_the_sample_is_the_one_that_the_committed_version_names(tmp_path: Path) -> None:
    made = make_checkout(tmp_path / "checkout")
    rendered = made.handsigns("sample")
    committed = yaml.safe_load((CHECKOUT.root / "data.dvc").read_text())
    assert committed["meta"] == {"source": "sample"}
    assert rendered["version"] == committed["outs"][0]["md5"]
    done = made.run("handsigns", "import", write_photos(tmp_path / "photos", per_class=3))
    assert "data/ holds the rendered sample beside these photos" in done.stderr


def test_a_new_key_pair_is_private_and_replaces_none(repo: Repo, tmp_path: Path) -> None:
    made = repo.handsigns("keys", "new", "--folder", tmp_path / "keys")
    assert stat.S_IMODE(Path(made["private"]).stat().st_mode) == 0o600
    assert len(made["key"]) == 16
    Path(made["private"]).unlink()  # half a pair is not replaced either
    said = repo.handsigns("keys", "new", "--folder", tmp_path / "keys", code=1)
    assert "must not be replaced" in said
    assert said.count("\n") == 1
    assert [str(path) for path in (tmp_path / "keys").iterdir()] == [made["public"]]

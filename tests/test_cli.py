"""The command line: fast help, exit codes, one line for what is refused."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from flows.cli import app
from tasks.project import Project
from tests.fixtures.checkouts import Repo, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos

NOWHERE = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\nfrom flows.cli import app\nfrom flows.local import stack\n"
        "with contextlib.suppress(SystemExit): app(['--help'])\n"
        "heavy = {'tensorflow', 'keras', 'prefect', 'mlflow', 'boto3', 'dvc', 'numpy'}\n"
        "sys.exit(1 if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    verbs = [*typer.main.get_command(app).commands]  # type: ignore[attr-defined]
    assert len(verbs) >= 20
    for words in (*map(str.split, verbs), ["keys", "new"], ["keys", "sign"]):
        assert f" {words[0]} " in done.stdout
        explained = CliRunner().invoke(app, [*words, "--help"])
        assert explained.exit_code == 0
        assert "--json" in explained.output or words == ["keys"]
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"handsigns {version('handsigns')}\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("retrian", "Did you mean 'retrain'?"),
        ("open mlfow", "'mlfow' is not one of"),
        ("promote two", "Invalid value for 'version'"),
        ("predict", "FILES"),
        ("import x --set-labels", "needs --replace"),
    ],
)
def test_wrong_usage_exits_with_2(words: str, reason: str) -> None:
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2
    assert reason.lower() in done.output.lower()


def test_a_refusal_is_one_line_before_a_server_is_asked_or_started(tmp_path: Path) -> None:
    project = make_checkout(tmp_path / "checkout").project

    def refused(*words: str, root: Path = project.root, **environment: str) -> str:
        there = Repo(Project(root))
        said = str(there.handsigns(*words, code=1, PYTHONPATH=str(CHECKOUT.root), **environment))
        assert said.count("\n") == 1
        return said

    assert "HANDSIGNS_BUCKET" in refused("status", HANDSIGNS_BUKET="x")
    assert "nowhere" in refused("import", "nowhere")
    assert "No mlflow is up. Start it with `handsigns up`." in refused("open", "mlflow")
    failed = "Prefect at http://127.0.0.1:9/api failed (ConnectError)."
    assert failed in refused("deploy", **NOWHERE)
    assert "no dvc.yaml" in refused("status", root=tmp_path)
    declared = project.root / "prefect.yaml"
    for verb, content, fault, environment in (
        ("up", "deployments:\n- name: retrain\n  work_pool: {", "line 3, column 15", {}),
        ("deploy", "deployments: [{name: retrain}]", "'entrypoint'", NOWHERE),
    ):
        declared.write_text(content)
        said = refused(verb, **environment)
        assert f"'{declared}' cannot be read (" in said
        assert fault in said
    project.params.unlink()
    assert "params.yaml' cannot be read" in refused("status")
    logs = {path.stem for path in project.local.glob("logs/*")}
    assert not logs & {"mlflow", "prefect", "worker"}


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
    record = yaml.safe_load(project.data_file.read_text())
    assert record["outs"][0]["md5"] == report["version"]
    assert record["meta"] == {"source": "photos"}
    (photos / "4").rename(photos / "four")
    said = made.run("handsigns", "import", photos, "--replace", code=1)
    assert "already there, train" in said.stdout
    unknown = "unknown label folder: 'four' is none of 0, 1, 2, 3, 4, 5; 3 files quarantined. To "
    assert f"{unknown}take a source's folders as the labels: --replace" in said.stderr
    assert "there are none in train/4" in said.stderr
    # A damaged data.dvc is named before photos are replaced.
    before = sorted(path.name for path in project.data.rglob("*.png"))
    project.data_file.write_bytes(b"\xff\xfe\x00")
    refused = made.handsigns("import", photos, "--replace", code=1)
    assert "data.dvc is not what DVC writes" in refused
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

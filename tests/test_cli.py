"""The command line: help, exit codes, settings, one line for what is refused, and the terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.settings import load_settings
from tasks.errors import SettingsError
from tasks.project import Project
from tasks.services.s3 import S3Address, redact_url
from tests.fixtures.checkouts import BIN, SERVICES, Repo, Trained, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos
from tests.fixtures.servers import MlflowServer, PrefectApi
from tests.fixtures.service import named

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
    failed = "Prefect at http://127.0.0.1:9/api cannot be used ("
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


SECRET = "sentinel-do-not-show"
S3, DATABASE = "HANDSIGNS_S3_ENDPOINT_URL", "DATABASE_URL"
REFUSED = [
    (S3, "localhost:9000", f"{S3}: must be an addr"),
    (S3, f"http://user:{SECRET}@host:9000", S3),
    ("HANDSIGNS_BUCKET", "Not A Bucket", "must be a bucket's name, .* \\(received 'Not A Bucket'"),
    ("HANDSIGNS_INBOX", "s3://UPPER/x", "HANDSIGNS_INBOX: must be a folder or s3://bucket/prefix"),
    ("HANDSIGNS_GIT_PUSH", "a..b", "HANDSIGNS_GIT_PUSH: must be the plain name of a branch"),
    ("HANDSIGNS_PROMOTION", "never", "HANDSIGNS_PROMOTION.*received 'never'"),
    ("HANDSIGNS_SERVE_RATE", "0/minute", "HANDSIGNS_SERVE_RATE: must be a rate such as"),
    ("HANDSIGNS_SERVE_TOKEN", SECRET[:15], "HANDSIGNS_SERVE_TOKEN: must be 16 characters or more"),
    ("PREFECT_SERVER_API_AUTH_STRING", "user:", "AUTH_STRING: must be user:password"),
    (DATABASE, f"postgresql://user:{SECRET}@one:5432,two:5432/name", DATABASE),
    ("AWS_SECRET_ACCESS_KEY", SECRET, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set"),
    ("HANDSIGNS_NOTIFY_URLS", f"json://127.0.0.1/hook, slack://{SECRET}", "each for a service"),
    ("HANDSIGNS_HOST", "0.0.0.0", "PREFECT_SERVER_API_AUTH_STRING must be set"),
    # Names that are no setting.
    ("HANDSIGNS_DATABASE_URL", SECRET, "Did you mean DATABASE_URL?"),
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any setting."""
    for name in filter(lambda one: one.startswith((*SERVICES, DATABASE)), list(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED)
def test_an_unusable_setting_is_refused_in_one_line_without_secrets(
    environment: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    environment.setenv(name, value)
    with pytest.raises(SettingsError, match=reason) as caught:
        load_settings()
    assert "\n" not in str(caught.value)
    assert SECRET[:15] not in str(caught.value)


def test_usual_variables_are_read_and_empty_ones_ignored(environment: pytest.MonkeyPatch) -> None:
    for name, value in {
        S3: "https://s3.example.org/",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "HANDSIGNS_BUCKET": "",
        "HANDSIGNS_PUBLIC_KEYS": "a.pem:b.pem",
        DATABASE: f"postgresql://user:{SECRET}@/name",
    }.items():
        environment.setenv(name, value)
    settings = load_settings()
    assert (settings.s3_endpoint_url, settings.s3_region) == ("https://s3.example.org", "eu-west-1")
    assert (settings.bucket, settings.mlflow_tracking_uri) == ("artifacts", None)
    assert [path.name for path in settings.public_keys] == ["a.pem", "b.pem"]
    assert SECRET not in repr(settings)
    environment.setenv("HANDSIGNS_S3_REGION", "eu-north-1")
    assert load_settings().s3_region == "eu-north-1"


@pytest.mark.parametrize("password", ["pass", "p%40ss/w:rd", "a?b#c", "ünïcödé [x]"])
def test_a_password_in_an_address_is_never_shown(password: str) -> None:
    assert redact_url(f"mysql+pymysql://user:{password}@host:1/db") == "mysql+pymysql://host:1/db"


ROWS, COLUMNS = 40, 110
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LIBRARIES = re.compile(r"absl|I0000|oneDNN|UserWarning|DeprecationWarning|Prefect collects")
NOISE = re.compile(r"WARNING|Collecting files|%\||\| INFO|Warning:")
"""DVC's own, which only `dvc` itself may print."""


def left_behind(text: str) -> list[str]:
    """The lines that stay where bars are drawn over themselves."""
    lines, row = [""], 0
    for part in re.split(r"(\n|\r|\x1b\[\d*A|\x1b\[2K)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row -= int(part[2:-1] or 1)
        elif shown := ESCAPES.sub("", part).rstrip("\r"):
            lines[row] = shown
    return [line.rstrip() for line in lines]


def in_terminal(repo: Repo, *words: str, **environment: str) -> list[str]:
    """Run a program in a terminal of 110 columns; the lines that it leaves there."""
    process, terminal = pty.fork()
    if process == 0:
        # Here, and not in the parent, which may be too late for the program.
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.chdir(repo.project.root)
        size = {"COLUMNS": str(COLUMNS)}  # pytest's workers have 80
        variables = repo.environment(**environment) | {"TERM": "xterm-256color", **size}
        os.execve(BIN / words[0], words, variables)
    raw = b""
    with suppress(OSError):  # the other side is closed
        while chunk := os.read(terminal, 2**16):
            raw += chunk
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    shown = ESCAPES.sub("", raw.decode())
    assert code == 0, shown
    assert not LIBRARIES.search(shown), shown
    lines = left_behind(raw.decode())
    if words[0] == "handsigns":
        assert not NOISE.search(shown), shown
        assert max(map(len, lines)) <= COLUMNS
    return lines


@pytest.mark.slow
def test_a_terminal_shows_results_and_bars_and_nothing_of_libraries(
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
    tmp_path: Path,
) -> None:
    repo = trained.checkout(tmp_path / "checkout")
    services = {**named(s3), **mlflow_server.named, **prefect_api.named}
    services["HANDSIGNS_MODEL_NAME"] = "terminal"  # its first version is number 1

    def handsigns(*words: str) -> list[str]:
        return in_terminal(repo, "handsigns", *words, **services)

    assert len(handsigns("import", str(trained.photos))) <= 15
    first = handsigns("retrain")
    assert len(first) <= 40, "\n".join(first)
    assert "Retrain: promoted" in first
    assert any(re.search(r"^ test +accuracy 0\.\d{4}", line) for line in first)
    again = handsigns("retrain")
    assert len(again) <= 15
    assert "Retrain: unchanged" in again
    status = handsigns("status")
    scores = r"accuracy [01]\.\d{4}, loss \d+\.\d{4}, photos \d+, created 20"
    assert any(re.match(rf" champion +version 1, {scores}", line) for line in status), status
    assert not re.search("[0-9a-f]{32}", "".join(status))
    row = r" +1 +[01]\.\d{4} +\d+\.\d{4} +\d+ +20[-0-9: ]+ +cha"
    assert any(re.match(row, line) for line in handsigns("versions"))
    assert len(handsigns("predict", str(trained.photos / "1/0000.png"))) <= 8
    repeated = in_terminal(repo, "dvc", "repro", "--force", "--single-item", "train@base")
    assert len(repeated) <= 40
    assert "Running stage 'train@base':" in repeated
    # In a file each photo has one line, whatever its length.
    deep = trained.photos / "/".join(["1/.."] * 20) / "1/0000.png"
    said = repo.run("handsigns", "predict", deep, **services).stdout
    assert re.search(rf"^ *{re.escape(str(deep))} +[0-5?].* +[01]\.\d{{4}} *$", said, re.M)

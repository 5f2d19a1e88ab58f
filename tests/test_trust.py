"""A team's own services: only signed releases are used, and no secret is left anywhere."""

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from flows.settings import PREFIX, Settings
from tasks.releases.champion import KEY, set_champion
from tasks.releases.signing import Trust, new_keys
from tasks.services.mlflow import Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import Repo, Trained, make_checkout
from tests.fixtures.photos import LABELS, write_photos
from tests.fixtures.publishing import publish_contents, register
from tests.fixtures.servers import MlflowServer, PrefectApi, new_bucket, session_folder
from tests.fixtures.service import named

SENTINEL = "-".join(("Xq7", "never", "seen"))  # not in one piece: this file is searched too
NOWHERE = "127.0.0.1:9"
"""Nobody listens there."""
BAD_REMOTE = f"http://someone:{SENTINEL}-remote@{NOWHERE}/dvc"


@dataclass
class Team:
    """A checkout whose settings name a team's services, with a value for every secret."""

    repo: Repo
    settings: dict[str, str]
    storage: Storage
    seen: set[bytes] = field(default_factory=set)  # output, and the arguments of processes

    def run(self, *words: str | Path, code: int = 0, **changes: str) -> Any:
        """Run `handsigns` as a person would, and read the process list over and over."""
        command, named = ("handsigns", *words, "--json"), {**self.settings, **changes}
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(self.repo.run, *command, code=code, fresh=True, **named)
            while not started.done():
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with suppress(OSError):
                        self.seen.add(path.read_bytes())
                time.sleep(0.2)
        done = started.result()
        self.seen |= {done.stdout.encode(), done.stderr.encode()}
        return json.loads(done.stdout)

    def leaks(self) -> list[object]:
        """What holds a secret, plain, quoted or in base64."""
        login = self.settings["PREFECT_API_AUTH_STRING"]
        plain = [self.settings["AWS_SECRET_ACCESS_KEY"], self.settings["MLFLOW_TRACKING_PASSWORD"]]
        plain += [login.partition(":")[2], SENTINEL]
        logins = [login, *(f"someone:{SENTINEL}-{one}" for one in ("notify", "prefect", "remote"))]
        wanted = [spelt.encode() for text in plain for spelt in (text, quote(text, safe=""))]
        wanted += [base64.b64encode(text.encode()) for text in [*plain, *logins]]
        databases = [*session_folder().rglob("prefect.db*"), *session_folder().rglob("mlflow.db*")]
        assert len(databases) > 1
        paths = [*self.repo.project.root.rglob("*"), *databases]
        places: list[tuple[object, bytes]] = [(text, text) for text in self.seen]
        places += [(path, path.read_bytes()) for path in paths if path.is_file()]
        places += [(key, self.storage.get(key)) for key in self.storage.keys("")]
        return [place for place, content in places if any(text in content for text in wanted)]


def make_team(
    repo: Repo, keys: Path, s3: S3Address, mlflow: MlflowServer, prefect: PrefectApi
) -> Team:
    """A new secret setting without a value here fails."""
    passphrase = f"{SENTINEL}-passphrase"
    private, public = new_keys(keys, passphrase)
    settings = {
        **named(s3),
        **mlflow.named,
        "AWS_SESSION_TOKEN": "",
        "DATABASE_URL": "",
        "HANDSIGNS_DVC_REMOTE_URL": "s3://dvc/team",
        "HANDSIGNS_MODEL_NAME": s3.bucket,
        "HANDSIGNS_NOTIFY_URLS": f"json://someone:{SENTINEL}-notify@{NOWHERE}/hook",
        "HANDSIGNS_PUBLIC_KEYS": str(public),
        "HANDSIGNS_SERVE_TOKEN": f"{SENTINEL}-serve-token",
        "HANDSIGNS_SIGNING_KEY": str(private),
        "HANDSIGNS_SIGNING_PASSPHRASE": passphrase,
        "PREFECT_SERVER_API_AUTH_STRING": f"someone:{SENTINEL}-prefect",
    }
    for name, one in Settings.model_fields.items():
        if "pydantic.types.Secret" in str(one.annotation):
            assert (one.validation_alias or PREFIX + name.upper()) in settings, name
    used = {name: text for name, text in settings.items() if text} | prefect.named
    return Team(repo, used, Storage(s3, Trust((public,), private, passphrase)))


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory,
    s3_server: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
    graphs: tuple[bytes, bytes],
) -> Team:
    """A team with a champion, a signed release of a small model."""
    folder, s3 = tmp_path_factory.mktemp("trust"), new_bucket(s3_server)
    repo = make_checkout(folder / "checkout")
    made = make_team(repo, folder / "keys", s3, mlflow_server, prefect_api)
    contents = {"labels.json": LABELS, "metrics.json": {}, "gate.json": {}, "dataset.json": {}}
    contents |= {"model.pb": graphs[0], "params.yaml": repo.project.params.read_bytes()}
    release = publish_contents(made.storage, folder, contents, git_revision="abc")
    version = register(Registry(mlflow_server.url, s3.bucket, login=mlflow_server.login), release)
    set_champion(made.storage, version, None, "the first", {})
    return made


def test_every_verb_refuses_what_is_not_signed(team: Team, tmp_path: Path) -> None:
    photo = write_photos(tmp_path / "photos", 1) / "4/0000.png"
    # Without Prefect, a promotion is the same and sooner.
    alone = {name: text for name, text in team.settings.items() if not name.startswith("PREFECT")}

    def run(*words: str | Path, code: int = 0) -> Any:
        return team.repo.handsigns(*words, code=code, **alone)

    (place,) = (key for key in team.storage.keys("releases/") if "manifest" in key)
    good = team.storage.get(place)
    team.storage.put(place, json.dumps(json.loads(good) | {"signature": None}).encode())
    promote = ("promote", "1", "--reason", "by hand")
    for words in (("predict", photo), ("verify", "champion"), promote):
        said = run(*words, code=1)
        assert (said.count("\n"), "signature is missing" in said) == (1, True), said
    team.storage.put(place, b"{}")
    said = run("keys", "sign", code=1)
    assert said["releases"] == []
    assert "cannot be understood" in str(said["not_signed"])
    team.storage.put(place, good)
    assert len(run("keys", "sign")["releases"]) == 1
    assert "against 1 public key" in run("verify", "champion")["signature"]
    # Nothing is trained that could not be signed, or shown without a login.
    for lost in ("HANDSIGNS_SIGNING_KEY", "PREFECT_API_AUTH_STRING"):
        without = {name: text for name, text in team.settings.items() if name != lost}
        failed = team.repo.handsigns("retrain", "--force", code=1, **without)
        assert (failed["status"], lost in failed["reason"]) == ("failed", True)


def test_a_run_that_fails_leaves_no_secret_anywhere(team: Team, tmp_path: Path) -> None:
    team.repo.handsigns("import", write_photos(tmp_path / "photos", 10))
    database = f"postgresql://someone:{SENTINEL}-database@{NOWHERE}/handsigns"
    failed = team.run("retrain", code=1, HANDSIGNS_DVC_REMOTE_URL=BAD_REMOTE, DATABASE_URL=database)
    assert failed["status"] == "failed"
    assert "data/ could not be pushed" in failed["reason"]
    assert any(b"retrain" in one for one in team.seen)
    assert team.leaks() == []
    # The search finds a secret where there is one.
    team.seen.add(b"Basic " + base64.b64encode(SENTINEL.encode()))
    assert len(team.leaks()) == 1
    assert SENTINEL not in repr(Settings(HANDSIGNS_SIGNING_PASSPHRASE=SecretStr(SENTINEL)))


@pytest.mark.slow
def test_a_signed_retrain_leaves_no_secret_and_is_rebuilt_identically(
    tmp_path: Path,
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
) -> None:
    repo = trained.checkout(tmp_path / "checkout")
    team = make_team(repo, tmp_path / "keys", s3, mlflow_server, prefect_api)
    imported = repo.handsigns("import", trained.photos, **team.settings)
    report = team.run("retrain")
    release = report["release"]
    assert report["status"] == "promoted", report["reason"]
    assert imported["pushed"] >= 120
    # Configured services take everything, and none starts here.
    for name in ("mlflow.db", "prefect/prefect.db"):
        assert not (repo.project.local / name).exists()
    assert [one.name for one in (repo.project.local / "seaweedfs").iterdir()] == ["last_run.json"]
    names = {key.split("/")[-1] for key in team.storage.keys(f"releases/{release['id']}/")}
    assert {"manifest.json", "model.keras", "labels.json", "metrics.json", "sbom.cdx.json"} <= names
    assert "signature" in json.loads(team.storage.get(KEY))
    assert team.leaks() == []
    found = repo.handsigns("reproduce", "champion", **team.settings)
    assert found["identical"], found
    assert found["release"] == release["id"]
    assert found["metrics"]["loss"] == [report["test"]["loss"]] * 2

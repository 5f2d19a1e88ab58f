"""One run with a team's own services: signatures, secrets, a colleague's clone, a rebuild."""

import base64
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from flows.settings import PREFIX, Settings
from tasks.releases.champion import KEY
from tasks.releases.signing import new_keys
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import Workshop
from tests.fixtures.dask_cluster import DaskCluster
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.servers import MlflowServer
from tests.fixtures.session import session_folder
from tests.fixtures.trained import Trained

SENTINEL = "-".join(("Xq7", "never", "seen"))  # not in one piece: this file is searched too
NOWHERE = "127.0.0.1:9"
"""Nobody listens there."""


def secret_settings(s3: S3Address) -> dict[str, str]:
    """A value for every setting that is a secret; a new one without a value here fails."""
    wanted = {
        (field.validation_alias or PREFIX + name.upper())
        for name, field in Settings.model_fields.items()
        if "pydantic.types.Secret" in str(field.annotation)
    }
    known = {
        "AWS_ACCESS_KEY_ID": str(s3.access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(s3.secret_access_key),
        "AWS_SESSION_TOKEN": "",
        "HANDSIGNS_SIGNING_PASSPHRASE": f"{SENTINEL}-passphrase",
        "HANDSIGNS_NOTIFY_URLS": f"json://someone:{SENTINEL}-notify@{NOWHERE}/hook",
        "HANDSIGNS_SERVE_TOKEN": f"{SENTINEL}-serve-token",
        "PREFECT_SERVER_API_AUTH_STRING": f"someone:{SENTINEL}-prefect",
        "DATABASE_URL": f"postgresql://someone:{SENTINEL}-database@{NOWHERE}/handsigns",
    }
    assert wanted <= known.keys(), "give a value here to a new secret setting"
    return {name: text for name, text in known.items() if text and name in wanted}


def spellings(secrets: dict[str, str]) -> list[bytes]:
    """What must not be found: the secrets, plain, quoted and in base64."""
    login = secrets["PREFECT_API_AUTH_STRING"]
    plain = [secrets["AWS_SECRET_ACCESS_KEY"], login.partition(":")[2], SENTINEL]
    plain.append(secrets["MLFLOW_TRACKING_PASSWORD"])
    logins = [login, *(f"someone:{SENTINEL}-{name}" for name in ("notify", "prefect", "remote"))]
    return [
        *(text.encode() for text in plain),
        *(quote(text, safe="").encode() for text in plain),
        *(base64.b64encode(text.encode()) for text in [*plain, *logins]),
    ]


@dataclass
class Witness:
    """What was printed, and the arguments of every process while commands ran."""

    printed: list[str] = field(default_factory=list)
    arguments: set[bytes] = field(default_factory=set)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read the process list over and over while the block lasts."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.2):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        self.arguments.add(path.read_bytes())
                    except OSError:
                        continue

        watch = threading.Thread(target=look)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()


@dataclass
class Run:
    """A checkout whose releases are signed, and all that its runs left."""

    workshop: Workshop
    photos: Path
    settings: dict[str, str]
    storage: Storage
    imported: Any
    failed: Any
    report: Any
    witness: Witness


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    trained: Trained,
    s3_server: S3Address,
    mlflow_server: MlflowServer,
    prefect_alone: PrefectApi,
) -> Run:
    """A run that fails in the middle, and one that ends with a champion."""
    folder = tmp_path_factory.mktemp("trust")
    secrets = secret_settings(s3_server)
    private, public = new_keys(folder / "keys", secrets["HANDSIGNS_SIGNING_PASSPHRASE"])
    settings = {
        **secrets,
        "HANDSIGNS_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "HANDSIGNS_BUCKET": s3_server.bucket,
        "HANDSIGNS_DVC_REMOTE_URL": "s3://dvc/team",
        "HANDSIGNS_SIGNING_KEY": str(private),
        "HANDSIGNS_PUBLIC_KEYS": str(public),
        "HANDSIGNS_MODEL_NAME": "team",
        **mlflow_server.named,
        **prefect_alone.named,
    }
    # The database does not answer, which only the run that fails may find.
    database = {"DATABASE_URL": settings.pop("DATABASE_URL")}
    bad_remote = {"HANDSIGNS_DVC_REMOTE_URL": f"http://someone:{SENTINEL}-remote@{NOWHERE}/dvc"}
    workshop, witness = trained.checkout(folder / "checkout"), Witness()
    imported = workshop.handsigns("import", trained.photos, **settings)
    with witness.watching():
        for changes, code in ((bad_remote | database, 1), ({}, 0)):
            named = {**settings, **changes}
            done = workshop.run("handsigns", "retrain", "--json", code=code, fresh=True, **named)
            witness.printed += [done.stdout, done.stderr]
    failed, report = (json.loads(text) for text in witness.printed[::2])
    assert report["status"] == "promoted", report["reason"]
    storage = Storage(s3_server)
    return Run(workshop, trained.photos, settings, storage, imported, failed, report, witness)


def found_in(content: bytes, wanted: list[bytes]) -> bool:
    return any(text in content for text in wanted)


def test_configured_services_take_everything_and_none_starts_here(
    run: Run, prefect_alone: PrefectApi
) -> None:
    local, release = run.workshop.project.local, run.report["release"]
    assert run.imported["pushed"] >= 120
    assert release["uri"] == f"s3://{run.storage.address.bucket}/releases/{release['id']}/"
    for name in ("seaweedfs", "mlflow.db", "prefect/prefect.db"):
        assert not (local / name).exists()
    keys = run.storage.list(f"releases/{release['id']}/")
    names = {entry.key.split("/")[-1] for entry in keys}
    assert {"manifest.json", "model.keras", "labels.json", "metrics.json", "sbom.cdx.json"} <= names
    assert prefect_alone.runs("retrain")[0]["state_name"] == "Promoted"
    # Without the login, the variable to set is named.
    nameless = {k: v for k, v in run.settings.items() if k != "PREFECT_API_AUTH_STRING"}
    refused = run.workshop.handsigns("retrain", "--force", code=1, **nameless)
    assert "PREFECT_API_AUTH_STRING" in refused["reason"]


def test_no_secret_is_left_anywhere(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    wanted = spellings(run.settings)
    assert run.failed["status"] == "failed"
    assert "data/ could not be pushed" in run.failed["reason"]
    assert not found_in(json.dumps(run.witness.printed).encode(), wanted)
    assert any(b"retrain" in one for one in run.witness.arguments)
    assert not any(found_in(one, wanted) for one in run.witness.arguments)
    # The checkout with run.json and logs; the databases of Prefect and MLflow.
    files = [path for path in run.workshop.project.root.rglob("*") if path.is_file()]
    prefect = list(tmp_path_factory.getbasetemp().rglob("prefect.db*"))
    mlflow = list(session_folder().rglob("mlflow.db*"))
    assert prefect
    assert mlflow
    databases = prefect + mlflow
    assert [path for path in (*files, *databases) if found_in(path.read_bytes(), wanted)] == []
    entries = list(run.storage.list(""))
    assert any(entry.key == KEY for entry in entries)
    assert [one.key for one in entries if found_in(run.storage.get(one.key), wanted)] == []


def test_the_search_for_secrets_finds_one_that_is_there(run: Run) -> None:
    wanted = spellings(run.settings)
    assert found_in(f"Authorization: Basic {base64.b64encode(wanted[0]).decode()}".encode(), wanted)
    assert found_in(b"url=json://someone:" + SENTINEL.encode(), wanted)
    witness = Witness()
    with witness.watching(), subprocess.Popen(["/bin/sh", "-c", f"sleep 1; : {SENTINEL}"]):
        time.sleep(0.6)
    assert any(found_in(one, wanted) for one in witness.arguments)
    assert SENTINEL not in repr(Settings(HANDSIGNS_SIGNING_PASSPHRASE=SecretStr(SENTINEL)))


def test_the_release_is_signed_and_verify_says_by_whom(run: Run) -> None:
    told = run.workshop.handsigns("verify", "champion", **run.settings)
    assert "are checked against 1 public key" in told["signature"]
    assert told["facts"]["environment"]["libraries"]["keras"]
    assert "signature" in json.loads(run.storage.get(f"releases/{told['id']}/manifest.json"))
    assert "signature" in json.loads(run.storage.get(KEY))
    again = run.workshop.handsigns("keys", "sign", **run.settings)
    assert again["releases"] == [told["id"]]
    told = run.workshop.handsigns("verify", "champion", **run.settings)
    assert "are checked" in told["signature"]


@contextmanager
def stored(run: Run, content: bytes) -> Iterator[str]:
    """Store something else in place of the champion's manifest; its release's id."""
    release = str(run.report["release"]["id"])
    place = f"releases/{release}/manifest.json"
    good = run.storage.get(place)
    run.storage.put(place, content)
    shutil.rmtree(run.workshop.project.releases, ignore_errors=True)
    try:
        yield release
    finally:
        run.storage.put(place, good)


def test_every_verb_refuses_what_is_not_signed(run: Run) -> None:
    manifest = json.loads(run.storage.get(f"releases/{run.report['release']['id']}/manifest.json"))
    del manifest["signature"]
    with stored(run, json.dumps(manifest).encode()):
        for words in (
            ("predict", run.photos / "4/0000.png"),
            ("evaluate", run.photos),
            ("verify", "champion"),
            ("promote", "1", "--reason", "by hand"),
        ):
            told = run.workshop.handsigns(*words, code=1, **run.settings)
            assert told.count("\n") == 1, told
            assert "signature is missing" in told
    with stored(run, b"{}") as release:
        told = run.workshop.handsigns("keys", "sign", code=1, **run.settings)
        assert told["releases"] == []
        assert "cannot be understood" in told["not_signed"][release]
    run.workshop.handsigns("predict", run.photos / "4/0000.png", **run.settings)


def test_without_the_signing_key_nothing_is_trained_in_vain(run: Run) -> None:
    without = {k: v for k, v in run.settings.items() if "SIGNING" not in k}
    began = time.monotonic()
    told = run.workshop.handsigns("retrain", "--force", code=1, **without)
    assert told["status"] == "failed"
    assert "no HANDSIGNS_SIGNING_KEY" in told["reason"]
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_release_is_rebuilt_from_its_record_and_is_identical(run: Run) -> None:
    root, temporary = run.workshop.project.root, Path(tempfile.gettempdir())
    before = sorted(temporary.glob("handsigns-reproduce-*"))
    told = run.workshop.handsigns("reproduce", "champion", **run.settings)
    assert told["identical"], told
    assert told["release"] == run.report["release"]["id"]
    released, rebuilt = told["metrics"]["loss"]
    assert released == rebuilt == run.report["test"]["loss"]
    listed = subprocess.run(["git", "-C", root, "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1
    assert sorted(temporary.glob("handsigns-reproduce-*")) == before


@pytest.mark.slow
def test_a_colleagues_clone_pulls_the_photos_and_computes_the_same_on_a_cluster(
    run: Run,
    trained: Trained,
    tmp_path: Path,
    prefect_alone: PrefectApi,
    dask_cluster: DaskCluster,
) -> None:
    other = trained.checkout(tmp_path / "other")
    shutil.copy(run.workshop.project.data_file, other.project.root)
    dask_cluster.start_worker()
    cluster = {"HANDSIGNS_DASK_ADDRESS": dask_cluster.address}
    same = other.handsigns("retrain", **run.settings, **cluster)
    assert same["data"]["version"] == run.imported["version"]
    assert same["release"]["id"] == run.report["release"]["id"]
    assert (same["status"], same["model"]["version"]) == ("unchanged", 1)
    assert same["features"]["computed"] == run.report["features"]["computed"] > 0
    logged = prefect_alone.logged(prefect_alone.runs("retrain")[0]["id"])
    assert any(dask_cluster.address in line for line in logged)

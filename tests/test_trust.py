"""One run, and what may be believed and known of it: signatures, secrets, a rebuild."""

import base64
import json
import os
import subprocess
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
from tasks.releases.pointer import KEY
from tasks.releases.signing import new_keys
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import Workshop
from tests.fixtures.prefect_api import PrefectApi
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
        if "SecretStr" in str(field.annotation)
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
    s3: S3Address
    keys: tuple[Path, Path]
    witness: Witness
    failed: Any
    report: Any

    @property
    def storage(self) -> Storage:
        return Storage(self.s3)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    trained: Trained,
    s3_server: S3Address,
    prefect_api: PrefectApi,
) -> Run:
    """A run that fails in the middle, and one that ends with a champion."""
    folder = tmp_path_factory.mktemp("trust")
    secrets = secret_settings(s3_server)
    keys = new_keys(folder / "keys", secrets["HANDSIGNS_SIGNING_PASSPHRASE"])
    settings = {
        **secrets,
        "HANDSIGNS_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "HANDSIGNS_BUCKET": s3_server.bucket,
        "HANDSIGNS_SIGNING_KEY": str(keys[0]),
        "HANDSIGNS_PUBLIC_KEYS": str(keys[1]),
        **prefect_api.named,
    }
    workshop = trained.checkout(folder / "checkout")
    workshop.handsigns("import", trained.photos)
    witness = Witness()
    bad_remote = f"http://someone:{SENTINEL}-remote@{NOWHERE}/dvc"
    with witness.watching():
        # The database does not answer either, which only the run that fails may find.
        database = settings.pop("DATABASE_URL")
        for remote, code in ((bad_remote, 1), ("", 0)):
            more = {"HANDSIGNS_DVC_REMOTE_URL": remote, "DATABASE_URL": database if remote else ""}
            more |= settings
            done = workshop.run("handsigns", "retrain", "--json", code=code, fresh=True, **more)
            witness.printed += [done.stdout, done.stderr]
    failed, report = (json.loads(text) for text in witness.printed[::2])
    assert report["status"] == "promoted", report["reason"]
    return Run(workshop, trained.photos, settings, s3_server, keys, witness, failed, report)


def found_in(content: bytes, wanted: list[bytes]) -> bool:
    return any(text in content for text in wanted)


def test_no_secret_is_left_anywhere(run: Run) -> None:
    wanted = spellings(run.settings)
    assert run.failed["status"] == "failed"
    assert "data/ could not be pushed" in run.failed["reason"]
    assert not found_in(json.dumps(run.witness.printed).encode(), wanted)
    assert any(b"retrain" in one for one in run.witness.arguments)
    assert not any(found_in(one, wanted) for one in run.witness.arguments)
    # The checkout with MLflow's database and files, run.json, logs; Prefect's database.
    prefect = list(session_folder().rglob("prefect.db*"))
    assert prefect
    files = [path for path in run.workshop.project.root.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    leaks = [path for path in [*files, *prefect] if found_in(path.read_bytes(), wanted)]
    assert leaks == []
    entries = list(run.storage.list(""))
    assert any(entry.key == KEY for entry in entries)
    leaks_there = [e.key for e in entries if found_in(run.storage.get(e.key), wanted)]
    assert leaks_there == []


def test_the_search_for_secrets_finds_one_that_is_there(run: Run, tmp_path: Path) -> None:
    wanted = spellings(run.settings)
    assert found_in(f"Authorization: Basic {base64.b64encode(wanted[0]).decode()}".encode(), wanted)
    assert found_in(b"url=json://someone:" + SENTINEL.encode(), wanted)
    witness = Witness()
    with witness.watching(), subprocess.Popen(["/bin/sh", "-c", f"sleep 1; : {SENTINEL}"]):
        time.sleep(0.6)
    assert any(found_in(one, wanted) for one in witness.arguments)


def test_secrets_print_as_asterisks() -> None:
    made = Settings(HANDSIGNS_SIGNING_PASSPHRASE=SecretStr(SENTINEL))
    assert SENTINEL not in repr(made)


def test_the_release_is_signed_and_verify_says_by_whom(run: Run) -> None:
    told = run.workshop.handsigns("verify", "champion", **run.settings)
    assert "are checked against 1 public key" in told["signature"]
    assert told["facts"]["environment"]["libraries"]["keras"]
    manifest = json.loads(run.storage.get(f"releases/{told['id']}/manifest.json"))
    assert "sbom.cdx.json" in manifest["files"]
    assert "signature" in manifest
    assert "signature" in json.loads(run.storage.get(KEY))
    again = run.workshop.handsigns("keys", "sign", **run.settings)
    assert again["releases"] == [told["id"]]
    assert (
        "are checked" in run.workshop.handsigns("verify", "champion", **run.settings)["signature"]
    )


def test_a_release_that_cannot_be_signed_is_told_and_the_others_are(run: Run) -> None:
    release = run.report["release"]["id"]
    place = f"releases/{release}/manifest.json"
    good = run.storage.get(place)
    run.storage.put(place, b"{}")
    try:
        told = run.workshop.handsigns("keys", "sign", code=1, **run.settings)
    finally:
        run.storage.put(place, good)
    assert told["releases"] == []
    assert "cannot be understood" in told["not_signed"][release]


def test_every_verb_refuses_what_is_not_signed(run: Run, tmp_path: Path) -> None:
    release = run.report["release"]["id"]
    place = f"releases/{release}/manifest.json"
    good = run.storage.get(place)
    bad = {name: value for name, value in json.loads(good).items() if name != "signature"}
    run.storage.put(place, json.dumps(bad).encode())
    cached = run.workshop.project.releases / release
    cached_manifest = cached / "manifest.json"
    try:
        if cached.is_dir():
            cached_manifest.chmod(0o644)
            cached_manifest.write_text(json.dumps(bad))
        for words in (
            ("predict", run.photos / "4/0000.png"),
            ("evaluate", run.photos),
            ("verify", "champion"),
            ("promote", "1", "--reason", "by hand"),
        ):
            told = run.workshop.handsigns(*words, code=1, **run.settings)
            assert told.count("\n") == 1, told
            assert "signature is missing" in told
    finally:
        run.storage.put(place, good)
    run.workshop.handsigns("predict", run.photos / "4/0000.png", **run.settings)


def test_without_the_signing_key_nothing_is_trained_in_vain(run: Run) -> None:
    without = {k: v for k, v in run.settings.items() if "SIGNING" not in k}
    began = time.monotonic()
    told = run.workshop.handsigns("retrain", "--force", code=1, **without)
    assert told["status"] == "failed"
    assert "no HANDSIGNS_SIGNING_KEY" in told["reason"]
    assert time.monotonic() - began < 60


def test_a_release_is_rebuilt_from_its_record_and_is_identical(run: Run) -> None:
    root = run.workshop.project.root
    before = sorted(
        path.name for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("handsigns-reproduce-*")
    )
    told = run.workshop.handsigns("reproduce", "champion", **run.settings)
    assert told["identical"], told
    assert told["release"] == run.report["release"]["id"]
    released, rebuilt = told["metrics"]["loss"]
    assert released == rebuilt == run.report["test"]["loss"]
    listed = subprocess.run(["git", "-C", root, "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1
    after = sorted(
        path.name for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("handsigns-reproduce-*")
    )
    assert after == before

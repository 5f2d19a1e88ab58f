"""Stages and photos under DVC: two runners agree, and nothing damaged is trained on."""

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tasks.data.directory import fetch_data
from tasks.errors import BusyError, DataError, HandsignsError, ServiceError, StageError
from tasks.project import Project
from tasks.services.dvc import Pipeline, Remote
from tasks.services.s3 import S3Address, Storage
from tests.fixtures import faults
from tests.fixtures.checkouts import BIN, Repo, with_stages
from tests.fixtures.faults import one_line, proxy_to


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the product's stages, photos and one version of them."""
    project = with_stages(tmp_path_factory.mktemp("data") / "checkout")
    with contextlib.chdir(project.root):
        Pipeline(project).version_data("photos")
    return project.root


@pytest.fixture
def checkout(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    shutil.copytree(prepared, tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    return Project(tmp_path / "checkout")


def dvc(project: Project, *words: str, code: int = 0) -> str:
    """What `dvc` prints, run as a person would."""
    done = Repo(project).run("dvc", *words, code=code)
    return done.stderr if code else done.stdout


def add_photo(project: Project, name: str = "new") -> Path:
    folder = project.data / "train/0"
    return Path(shutil.copy(folder / "0000.png", folder / f"{name}.png"))


def photos(project: Project) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in project.data.rglob("*.png")}


def test_two_runners_never_work_on_one_stage(checkout: Project) -> None:
    pipeline, refused = Pipeline(checkout, lock_timeout=1.0), list[str]()
    hold = ["sh", "-c", "exec 9>>.dvc/tmp/lock; flock 9; echo held; exec sleep 600"]
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="run again"):
            pipeline.run("audit")
        holder.send_signal(signal.SIGKILL)
    # The locks of the dead are no obstacle.
    dead = {"pid": holder.pid, "cmd": "dvc repro"}
    entry = {"write": {str(checkout.root / "artifacts/audit.json"): dead}}
    (checkout.root / ".dvc/tmp/rwlock").write_text(json.dumps(entry))

    def progress(what: str, done: int, total: int) -> None:
        if not refused:
            refused.append(dvc(checkout, "repro", "audit", code=255))

    assert pipeline.run("audit", progress=progress) == "ran"
    assert "lock" in refused[0]
    # And the other way round: a flow waits, and then finds its work done.
    add_photo(checkout)
    command, environment = [BIN / "dvc", "repro", "audit"], Repo(checkout).environment()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        while "Running stage" not in other.stdout.readline():
            assert other.poll() is None
        assert Pipeline(checkout, lock_timeout=120).run("audit") == "unchanged"
        other.stdout.read()
    assert other.returncode == 0


def test_changes_while_a_stage_runs_are_an_error_as_is_its_own(checkout: Project) -> None:
    def progress(what: str, done: int, total: int) -> None:
        add_photo(checkout)  # the stage is reading the others at this moment

    with pytest.raises(StageError, match=r"data.* changed while stage audit ran"):
        Pipeline(checkout).run("audit", progress=progress)
    pipeline = Pipeline(checkout)
    assert "audit" in pipeline.changed()
    with (checkout.root / "tasks/audit.py").open("a") as source:
        source.write("# edited\n")
    with pytest.raises(StageError, match="edited since this run began"):
        pipeline.run("audit")
    shutil.rmtree(checkout.data / "train/3")
    with pytest.raises(DataError, match="train/3"):
        Pipeline(checkout).run("audit")


def test_a_damaged_file_of_dvc_is_one_line_with_advice(checkout: Project) -> None:
    Pipeline(checkout).run("audit")
    written = checkout.lock.read_bytes()
    digest = written.split(b"md5: ")[-1][:32]
    lock, lost = "Take dvc.lock back from git", "data.dvc is not what DVC writes"
    for name, content, words in (
        ("data.dvc", b"", lost),
        ("data.dvc", b"outs: 7\n", lost),
        ("dvc.yaml", b"", "dvc.yaml names no stage"),
        ("dvc.lock", b"stages: [", lock),
        ("dvc.lock", b"schema: '2.0'\nstages: 7\n", lock),
        ("dvc.lock", b"\xff\xfe", lock),
        ("dvc.lock", written.replace(digest, b"0" * 32), lock),
    ):
        path = checkout.root / name
        kept = path.read_bytes() if path.exists() else b"{}"
        path.write_bytes(content)
        with one_line(HandsignsError, words):
            Pipeline(checkout).changed()
            Pipeline(checkout).run("audit", force=True)
        path.write_bytes(kept)
    for content in (b"", b"[1]", b"\xff"):  # as a killed command may leave it
        (checkout.root / ".dvc/tmp/rwlock").write_bytes(content)
        assert Pipeline(checkout).run("audit", force=True) == "ran"
    # What a person removed there is made again.
    checkout.lock.unlink()
    assert Pipeline(checkout).run("audit") == "restored"
    assert checkout.lock.read_bytes() == written


def test_of_data_and_its_record_the_one_that_changed_wins(checkout: Project) -> None:
    older = checkout.data_file.read_bytes()
    assert Pipeline(checkout).data_state() == "clean"
    theirs = add_photo(checkout, "theirs")
    assert Pipeline(checkout).data_state() == "edited"
    newer = Pipeline(checkout).version_data("photos")
    record = checkout.data_file.read_bytes()
    checkout.data_file.write_bytes(older)  # as `git pull` does
    fetch_data(checkout, Pipeline(checkout))
    assert not theirs.exists()
    checkout.data_file.write_bytes(record)
    # Photos that nobody changed must not win over a data.dvc that somebody did.
    assert Pipeline(checkout).data_state() == "outdated"
    fetch_data(checkout, Pipeline(checkout))
    assert theirs.exists()
    assert Pipeline(checkout).data_version() == newer
    # Going back to an earlier state by hand is an edit, though the cache knows it.
    theirs.unlink()
    assert Pipeline(checkout).data_state() == "edited"
    # Both changed: refused, with both ways out.
    ours = add_photo(checkout, "ours")
    checkout.data_file.write_bytes(older)
    with one_line(DataError, r"dvc add data.*dvc pull --force data\.dvc"):
        fetch_data(checkout, Pipeline(checkout))
    assert (ours.exists(), checkout.data_file.read_bytes()) == (True, older)
    dvc(checkout, "add", "-q", "data")
    assert Pipeline(checkout).data_state() == "clean"
    # Where the photos came from is noted beside what a team notes there.
    content = yaml.safe_load(checkout.data_file.read_text())
    checkout.data_file.write_text(yaml.safe_dump({**content, "meta": {"camera": "hall"}}))
    assert Pipeline(checkout).version_data("sample") == content["outs"][0]["md5"]
    kept = yaml.safe_load(checkout.data_file.read_text())["meta"]
    assert kept == {"camera": "hall", "source": "sample"}


def test_only_a_remote_of_the_repository_or_of_our_setting_counts(
    checkout: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def configure(file: Path, name: str) -> None:
        file.parent.mkdir(exist_ok=True)
        section = f"['remote \"{name}\"']\n    url = {tmp_path}/{name}\n"
        file.write_text(f"[core]\n    remote = {name}\n{section}")

    configure(tmp_path / "home/config", "theirs")
    assert Pipeline(checkout).remote_url() is None
    configure(checkout.root / ".dvc/config", "ours")
    secret = "['remote \"ours\"']\n    verify = true\n"  # such as keys: what is not for git
    (checkout.root / ".dvc/config.local").write_text(secret)
    assert Pipeline(checkout).push_data() > 0
    assert f"data/ is pushed to {tmp_path}/ours" in caplog.text
    assert not (tmp_path / "theirs").exists()
    for url, words in (
        ("s3://user:sentinel@bucket/photos", r"pushed to s3://bucket/photos \(.*credentials"),
        ("foo://x", "HANDSIGNS_DVC_REMOTE_URL"),
    ):
        with one_line((ServiceError, DataError), words):
            Pipeline(checkout, Remote(url)).push_data()


def test_push_repairs_the_remote_and_failures_do_no_harm(checkout: Project, s3: S3Address) -> None:
    def at(url: str = s3.endpoint_url, key: str = str(s3.secret_access_key)) -> Pipeline:
        options = {"region": s3.region, "access_key_id": str(s3.access_key_id)}
        options |= {"endpointurl": url, "secret_access_key": key}
        return Pipeline(checkout, Remote(f"s3://{s3.bucket}/photos", lambda: options))

    before, storage = photos(checkout), Storage(s3)
    assert at().push_data() == len(before) + 1
    keys = [key for key in storage.keys("photos/") if not key.endswith(".dir")]
    storage.put(keys[0], b"damaged")
    storage.remove(keys[2])
    kept = Path(*keys[2].split("/")[1:])
    (checkout.root / ".dvc/cache" / kept).unlink()  # it is taken from data/ again
    pipeline = at()
    assert (pipeline.push_data(), pipeline.push_data()) == (2, 0)
    for key in keys:
        digest = hashlib.md5(storage.get(key)).hexdigest()
        assert key.endswith(f"{digest[:2]}/{digest[2:]}")

    shutil.rmtree(checkout.data)
    shutil.rmtree(checkout.root / ".dvc/cache")
    assert not Pipeline(checkout).checkout_data()
    content, refusing = storage.get(keys[0]), faults.answering(500, "InternalError")
    with proxy_to(s3.endpoint_url) as proxy:

        def refused(pipeline: Pipeline, fault: faults.Fault = faults.passed) -> None:
            began = time.monotonic()
            with one_line(ServiceError, "could not be pulled"), proxy.failing(fault):
                fetch_data(checkout, pipeline)
            assert time.monotonic() - began < 60
            assert not photos(checkout)

        refused(at("http://127.0.0.1:9"))
        refused(at(key="sentinel"))
        refused(at(proxy.url), refusing)
        storage.put(keys[0], b"damaged")
        refused(at())
        storage.remove(keys[0])
        refused(at())
    storage.put(keys[0], content)
    fetch_data(checkout, at())
    assert photos(checkout) == before
    assert Pipeline(checkout).data_state() == "clean"

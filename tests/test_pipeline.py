"""Both runners of `dvc.yaml` agree: the flow's process and `dvc repro`; and `data.dvc`."""

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from tasks.data.directory import fetch_data
from tasks.errors import BusyError, DataError, HandsignsError, StageError
from tasks.project import Project
from tasks.services.dvc import Pipeline, Remote
from tests.fixtures.checkouts import BIN, with_stages
from tests.fixtures.locks import held

EARLY = ("audit", "synthetic", "preprocess")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A checkout of its own, with the product's stages and generated photos."""
    project = with_stages(tmp_path / "checkout")
    monkeypatch.chdir(project.root)
    Pipeline(project).version_data("photos")
    return project


def dvc(project: Project, *words: str) -> str:
    """What `dvc` prints, run as a person would."""
    done = subprocess.run(
        [BIN / "dvc", *words],
        cwd=project.root,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def run_early(project: Project) -> list[str]:
    pipeline = Pipeline(project)
    return [pipeline.run(name) for name in EARLY]


def set_image_size(project: Project, size: int) -> None:
    content = yaml.safe_load(project.params.read_text())
    content["preprocess"]["image_size"] = size
    project.params.write_text(yaml.safe_dump(content, sort_keys=False))


def add_photo(project: Project, name: str) -> None:
    shutil.copy(project.data / "train/0/0000.png", project.data / f"train/0/{name}.png")


def test_stages_come_in_the_graphs_order(checkout: Project) -> None:
    order = Pipeline(checkout).stages()
    chain = ["audit", "preprocess", "features", "train@base", "train@fine_tune", "train@full"]
    chain += ["assemble", "evaluate", "gate"]
    assert [name for name in order if name in chain] == chain
    assert order.index("backbone") < order.index("features")


def test_after_one_runner_the_other_has_nothing_to_do(checkout: Project) -> None:
    dvc(checkout, "repro", *EARLY)
    assert run_early(checkout) == ["unchanged"] * 3
    assert not {"audit", "preprocess"} & set(Pipeline(checkout).changed())
    first = (checkout.dataset / "images.npy").read_bytes()

    # A changed parameter runs its stage and no earlier one.
    set_image_size(checkout, 32)
    assert run_early(checkout) == ["unchanged", "unchanged", "ran"]
    assert json.loads((checkout.dataset / "index.json").read_text())["image_size"] == 32
    lock = checkout.lock.read_bytes()
    said = dvc(checkout, "repro", *EARLY)
    assert "Stage 'audit' didn't change" in said
    assert "Stage 'preprocess' didn't change" in said
    assert checkout.lock.read_bytes() == lock

    # A result that was there before is restored.
    set_image_size(checkout, 64)
    assert Pipeline(checkout).run("preprocess") == "restored"
    assert (checkout.dataset / "images.npy").read_bytes() == first


def test_what_changes_while_a_stage_runs_is_an_error(checkout: Project) -> None:
    added = threading.Event()

    def progress(what: str, done: int, total: int) -> None:
        if not added.is_set():
            added.set()
            add_photo(checkout, "new")  # the stage is reading the others at this moment

    with pytest.raises(StageError, match=r"data.* changed while stage audit ran"):
        Pipeline(checkout).run("audit", progress=progress)
    assert "audit" in Pipeline(checkout).changed()
    pipeline = Pipeline(checkout)
    with (checkout.root / "tasks/audit.py").open("a") as source:
        source.write("# edited\n")
    with pytest.raises(StageError, match="edited since this run began"):
        pipeline.run("audit")


def test_a_stages_own_error_and_a_lock_that_is_taken_are_reported(checkout: Project) -> None:
    pipeline = Pipeline(checkout, lock_timeout=1.0)
    with held(checkout), pytest.raises(BusyError, match="run again"):
        pipeline.run("audit")
    assert pipeline.run("audit") == "ran"
    shutil.rmtree(checkout.data / "train/3")
    with pytest.raises(DataError, match="train/3"):
        pipeline.run("audit")


def test_data_travels_through_a_remote(checkout: Project, tmp_path: Path) -> None:
    remote = Remote(str(tmp_path / "remote"), {"verify": "true"})
    pipeline = Pipeline(checkout, remote)
    version = pipeline.data_version()
    assert pipeline.push_data() > 0
    before = sorted(path.name for path in checkout.data.rglob("*.png"))
    shutil.rmtree(checkout.data)
    shutil.rmtree(checkout.root / ".dvc/cache")
    assert not Pipeline(checkout).checkout_data()
    Pipeline(checkout, remote).pull_data()
    assert sorted(path.name for path in checkout.data.rglob("*.png")) == before
    assert Pipeline(checkout).data_version() == version
    assert Pipeline(checkout).data_state() != "edited"


def test_the_version_remembers_where_the_photos_came_from(checkout: Project) -> None:
    pipeline = Pipeline(checkout)
    assert pipeline.data_source() == "photos"
    record = yaml.safe_load(checkout.data_file.read_text())
    checkout.data_file.write_text(yaml.safe_dump({**record, "meta": {"camera": "hall"}}))
    assert pipeline.data_source() == "photos"
    assert pipeline.version_data("sample") == record["outs"][0]["md5"]
    assert pipeline.data_source() == "sample"
    # What a team notes there stays.
    kept = yaml.safe_load(checkout.data_file.read_text())["meta"]
    assert kept == {"camera": "hall", "source": "sample"}


def test_of_data_and_its_record_the_one_that_changed_wins(checkout: Project) -> None:
    older = checkout.data_file.read_bytes()
    pipeline = Pipeline(checkout)
    assert pipeline.data_state() == "clean"
    add_photo(checkout, "theirs")
    assert pipeline.data_state() == "edited"
    newer = pipeline.version_data("photos")
    record = checkout.data_file.read_bytes()
    checkout.data_file.write_bytes(older)  # as `git pull` does
    fetch_data(checkout, Pipeline(checkout))
    assert not (checkout.data / "train/0/theirs.png").exists()
    checkout.data_file.write_bytes(record)
    # Photos that nobody changed must not win over a data.dvc that somebody did.
    assert Pipeline(checkout).data_state() == "outdated"
    fetch_data(checkout, Pipeline(checkout))
    assert (checkout.data / "train/0/theirs.png").exists()
    assert Pipeline(checkout).data_version() == newer
    # Going back to an earlier state by hand is an edit, though the cache knows it.
    (checkout.data / "train/0/theirs.png").unlink()
    assert Pipeline(checkout).data_state() == "edited"

    # Both changed: refused, with both ways out.
    add_photo(checkout, "ours")
    checkout.data_file.write_bytes(older)
    for call in (pipeline.data_state, lambda: fetch_data(checkout, pipeline)):
        with pytest.raises(DataError, match=r"dvc add data.*dvc pull --force data\.dvc") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (checkout.data / "train/0/ours.png").exists()
    assert checkout.data_file.read_bytes() == older
    dvc(checkout, "add", "-q", "data")
    assert Pipeline(checkout).data_state() == "clean"


def test_only_a_remote_of_the_repository_or_of_our_setting_counts(
    checkout: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    anybody = f"[core]\n    remote = anybody\n['remote \"anybody\"']\n    url = {tmp_path}/theirs\n"
    (tmp_path / "home/config").write_text(anybody)
    pipeline = Pipeline(checkout)
    assert not pipeline.remote_url()
    assert pipeline.remote_url() is None
    ours = anybody.replace("anybody", "team").replace("theirs", "ours")
    (checkout.root / ".dvc/config").write_text(ours)
    secret = "['remote \"team\"']\n    verify = true\n"  # such as keys: what is not for git
    (checkout.root / ".dvc/config.local").write_text(secret)
    assert Pipeline(checkout).remote_url() == f"{tmp_path}/ours"
    assert Pipeline(checkout).push_data() > 0
    assert f"data/ is pushed to {tmp_path}/ours" in caplog.text
    set_by_us = Pipeline(checkout, Remote("s3://user:secret@bucket/photos", {}))
    assert set_by_us.remote_url() == "s3://bucket/photos"
    assert not (tmp_path / "theirs").exists()


def test_a_damaged_file_is_one_line_with_advice(checkout: Project) -> None:
    for name, content, words in (
        ("data.dvc", b"", "data.dvc is not what DVC writes"),
        ("data.dvc", b"outs: 7\n", "data.dvc is not what DVC writes"),
        ("dvc.yaml", b"", "dvc.yaml names no stage"),
        ("dvc.lock", b"stages: [", "Take dvc.lock back from git"),
        ("dvc.lock", b"\xff\xfe", "Take dvc.lock back from git"),
    ):
        path = checkout.root / name
        kept = path.read_bytes() if path.exists() else b""
        path.write_bytes(content)
        with pytest.raises(HandsignsError, match=words) as caught:
            Pipeline(checkout).changed()
        assert "\n" not in str(caught.value)
        path.write_bytes(kept)
    checkout.lock.unlink()
    (checkout.root / ".dvc/tmp").mkdir(exist_ok=True)
    for damaged in (b"", b'{"write": {"/a/b": {"pi', b"[1]", b"\xff\xfe"):
        (checkout.root / ".dvc/tmp/rwlock").write_bytes(damaged)
        with pytest.raises(StageError, match=r"\.dvc/tmp/rwlock, is damaged. Remove it") as caught:
            Pipeline(checkout).run("audit", force=True)
        assert "\n" not in str(caught.value)

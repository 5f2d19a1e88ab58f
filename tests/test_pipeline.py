"""Both runners of `dvc.yaml` agree: the flow's process and `dvc repro`."""

import json
import os
import shutil
import subprocess
import sys
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


def repro(project: Project, *targets: str) -> str:
    """What `dvc repro` prints, run as a person would."""
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        [folder / "dvc", "repro", *targets],
        cwd=project.root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def change(project: Project, section: str, **values: object) -> None:
    """Set values in a section of the checkout's `params.yaml`."""
    content = yaml.safe_load(project.params.read_text())
    content[section].update(values)
    project.params.write_text(yaml.safe_dump(content, sort_keys=False))


def test_stages_come_in_the_graphs_order(checkout: Project) -> None:
    order = Pipeline(checkout).stages()
    chain = ["audit", "preprocess", "features", "train@base", "train@fine_tune", "train@full"]
    chain += ["assemble", "evaluate", "gate"]
    assert [name for name in order if name in chain] == chain
    assert order.index("backbone") < order.index("features")


def test_repro_finds_nothing_to_do_after_a_run_in_process(checkout: Project) -> None:
    pipeline = Pipeline(checkout)
    assert [pipeline.run(name) for name in EARLY] == ["ran"] * 3
    lock = (checkout.root / "dvc.lock").read_bytes()
    said = repro(checkout, *EARLY)
    assert "Stage 'audit' didn't change" in said
    assert "Stage 'preprocess' didn't change" in said
    assert (checkout.root / "dvc.lock").read_bytes() == lock


def test_a_run_in_process_finds_nothing_to_do_after_repro(checkout: Project) -> None:
    repro(checkout, *EARLY)
    pipeline = Pipeline(checkout)
    assert [pipeline.run(name) for name in EARLY] == ["unchanged"] * 3
    assert not {"audit", "preprocess"} & set(pipeline.changed())


def test_a_changed_parameter_runs_its_stage_and_no_earlier_one(checkout: Project) -> None:
    for name in EARLY:
        Pipeline(checkout).run(name)
    change(checkout, "preprocess", image_size=32)
    pipeline = Pipeline(checkout)
    assert [pipeline.run(name) for name in EARLY] == ["unchanged", "unchanged", "ran"]
    assert json.loads((checkout.dataset / "index.json").read_text())["image_size"] == 32


def test_a_result_seen_before_is_restored(checkout: Project) -> None:
    for name in EARLY:
        Pipeline(checkout).run(name)
    first = (checkout.dataset / "images.npy").read_bytes()
    change(checkout, "preprocess", image_size=32)
    assert Pipeline(checkout).run("preprocess") == "ran"
    change(checkout, "preprocess", image_size=64)
    assert Pipeline(checkout).run("preprocess") == "restored"
    assert (checkout.dataset / "images.npy").read_bytes() == first


def test_a_photo_added_while_a_stage_runs_is_an_error(checkout: Project) -> None:
    added = threading.Event()

    def progress(what: str, done: int, total: int) -> None:
        if not added.is_set():
            added.set()
            # Under a new name: the stage is reading the others at this moment.
            shutil.copy(checkout.data / "train/0/0000.png", checkout.data / "train/0/new.png")

    with pytest.raises(StageError, match=r"data.* changed while stage audit ran"):
        Pipeline(checkout).run("audit", progress=progress)
    assert "audit" in Pipeline(checkout).changed()


def test_source_edited_since_the_run_began_is_an_error(checkout: Project) -> None:
    pipeline = Pipeline(checkout)
    with (checkout.root / "tasks/audit.py").open("a") as source:
        source.write("# edited\n")
    with pytest.raises(StageError, match="edited since this run began"):
        pipeline.run("audit")


def test_a_stages_own_error_comes_through_as_it_is(checkout: Project) -> None:
    shutil.rmtree(checkout.data / "train/3")
    with pytest.raises(DataError, match="train/3"):
        Pipeline(checkout).run("audit")


def test_somebody_elses_lock_is_waited_for_and_then_told(checkout: Project) -> None:
    pipeline = Pipeline(checkout, lock_timeout=1.0)
    with held(checkout), pytest.raises(BusyError, match="run again"):
        pipeline.run("audit")
    assert pipeline.run("audit") == "ran"


def test_data_travels_through_a_remote_and_damage_is_found(
    checkout: Project, tmp_path: Path
) -> None:
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
    assert not Pipeline(checkout).data_changed()


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


def add_photo(project: Project, name: str) -> None:
    shutil.copy(project.data / "train/0/0000.png", project.data / f"train/0/{name}.png")


def pulled(project: Project, record: bytes) -> None:
    """Write another version of data.dvc, as `git pull` does."""
    project.data_file.write_bytes(record)


def test_a_newer_data_file_is_laid_out_and_an_edited_folder_is_versioned(
    checkout: Project,
) -> None:
    older = checkout.data_file.read_bytes()
    pipeline = Pipeline(checkout)
    assert pipeline.data_state() == "clean"
    add_photo(checkout, "theirs")
    assert pipeline.data_state() == "edited"
    newer = pipeline.version_data("photos")
    record = checkout.data_file.read_bytes()
    pulled(checkout, older)
    fetch_data(checkout, Pipeline(checkout))
    assert not (checkout.data / "train/0/theirs.png").exists()
    pulled(checkout, record)
    # Photos that nobody changed must not win over a data.dvc that somebody did.
    assert Pipeline(checkout).data_state() == "outdated"
    fetch_data(checkout, Pipeline(checkout))
    assert (checkout.data / "train/0/theirs.png").exists()
    assert Pipeline(checkout).data_version() == newer
    # Going back to an earlier state by hand is an edit, though the cache knows it.
    (checkout.data / "train/0/theirs.png").unlink()
    assert Pipeline(checkout).data_state() == "edited"


def test_photos_and_data_file_that_both_changed_are_refused_with_both_ways_out(
    checkout: Project,
) -> None:
    older = checkout.data_file.read_bytes()
    pipeline = Pipeline(checkout)
    add_photo(checkout, "theirs")
    pipeline.version_data("photos")
    record = checkout.data_file.read_bytes()
    pulled(checkout, older)
    fetch_data(checkout, pipeline)
    add_photo(checkout, "ours")
    pulled(checkout, record)
    for call in (pipeline.data_state, lambda: fetch_data(checkout, pipeline)):
        with pytest.raises(DataError, match=r"dvc add data.*dvc pull --force data\.dvc") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (checkout.data / "train/0/ours.png").exists()
    assert checkout.data_file.read_bytes() == record
    subprocess.run([BIN / "dvc", "add", "-q", "data"], cwd=checkout.root, check=True)
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
    assert not pipeline.has_remote()
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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.dvc", b"", "data.dvc is not what DVC writes"),
        ("data.dvc", b"outs: 7\n", "data.dvc is not what DVC writes"),
        ("dvc.yaml", b"", "dvc.yaml names no stage"),
        ("dvc.lock", b"stages: [", "Take dvc.lock back from git"),
        ("dvc.lock", b"\xff\xfe", "Take dvc.lock back from git"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    checkout: Project, name: str, content: bytes, words: str
) -> None:
    (checkout.root / name).write_bytes(content)
    with pytest.raises(HandsignsError, match=words) as caught:
        Pipeline(checkout).changed()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damaged", [b"", b'{"write": {"/a/b": {"pi', b"[1]", b"\xff\xfe"])
def test_a_damaged_list_of_locks_is_no_obstacle(
    checkout: Project, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (checkout.root / ".dvc/tmp").mkdir(exist_ok=True)
    (checkout.root / ".dvc/tmp/rwlock").write_bytes(damaged)
    assert Pipeline(checkout).run("audit") == "ran"
    assert "list of locks" in caplog.text

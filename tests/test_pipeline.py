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

from tasks.errors import BusyError, DataError, StageError
from tasks.project import Project
from tasks.services.dvc import Pipeline, Remote
from tests.fixtures.checkouts import with_stages
from tests.fixtures.locks import held

EARLY = ("audit", "preprocess")


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
    assert [pipeline.run(name) for name in EARLY] == ["ran", "ran"]
    lock = (checkout.root / "dvc.lock").read_bytes()
    said = repro(checkout, *EARLY)
    assert "Stage 'audit' didn't change" in said
    assert "Stage 'preprocess' didn't change" in said
    assert (checkout.root / "dvc.lock").read_bytes() == lock


def test_a_run_in_process_finds_nothing_to_do_after_repro(checkout: Project) -> None:
    repro(checkout, *EARLY)
    pipeline = Pipeline(checkout)
    assert [pipeline.run(name) for name in EARLY] == ["unchanged", "unchanged"]
    assert not {"audit", "preprocess"} & set(pipeline.changed())


def test_a_changed_parameter_runs_its_stage_and_no_earlier_one(checkout: Project) -> None:
    for name in EARLY:
        Pipeline(checkout).run(name)
    change(checkout, "preprocess", detail=32)
    pipeline = Pipeline(checkout)
    assert [pipeline.run(name) for name in EARLY] == ["unchanged", "ran"]
    assert json.loads((checkout.dataset / "index.json").read_text())["detail"] == 32


def test_a_result_seen_before_is_restored(checkout: Project) -> None:
    for name in EARLY:
        Pipeline(checkout).run(name)
    first = (checkout.dataset / "images.npy").read_bytes()
    change(checkout, "preprocess", detail=32)
    assert Pipeline(checkout).run("preprocess") == "ran"
    change(checkout, "preprocess", detail=64)
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
    version = pipeline.version_data("sample")
    assert Pipeline(checkout).data_source() == "sample"
    assert Pipeline(checkout).version_data("photos") == version


def test_what_a_team_notes_in_the_data_file_stays(checkout: Project) -> None:
    pipeline = Pipeline(checkout)
    record = yaml.safe_load(checkout.data_file.read_text())
    checkout.data_file.write_text(yaml.safe_dump({**record, "meta": {"camera": "hall"}}))
    assert pipeline.data_source() == "photos"
    pipeline.version_data("sample")
    kept = yaml.safe_load(checkout.data_file.read_text())["meta"]
    assert kept == {"camera": "hall", "source": "sample"}
    checkout.data_file.write_text(yaml.safe_dump({**record, "meta": None}))
    assert pipeline.data_source() == "photos"


def test_a_spoiled_data_file_is_told_in_one_line(checkout: Project) -> None:
    pipeline = Pipeline(checkout)
    (checkout.root / "data.dvc").write_text("outs: 7\n")
    with pytest.raises(DataError, match="not what DVC writes"):
        pipeline.data_version()

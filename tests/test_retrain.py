"""The whole workflow as a person runs it: real DVC, Prefect, MLflow and S3 on loopback."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.local.stack import embedded
from flows.report import RunReport
from flows.settings import Settings
from tasks.params import load_params
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import Workshop, make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.receiver import receiving
from tests.fixtures.service import Clients, serving
from tests.fixtures.trained import PER_CLASS, Trained


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A checkout with imported photos and a champion of them."""
    folder = tmp_path_factory.mktemp("retrain")
    made = make_checkout(folder / "checkout")
    report = made.handsigns("import", write_photos(folder / "photos", PER_CLASS))
    assert report["taken"]["train"] == dict.fromkeys("012345", PER_CLASS)
    first = made.handsigns("retrain", fresh=True, HANDSIGNS_DVC_REMOTE_URL="s3://dvc/photos")
    assert first["status"] == "promoted", first["reason"]
    (folder / "first.json").write_text(json.dumps(first))
    return made


@pytest.fixture
def first(workshop: Workshop) -> RunReport:
    """What the first retrain of the checkout reported."""
    path = workshop.project.root.parent / "first.json"
    return RunReport.model_validate_json(path.read_text())


@pytest.fixture(scope="module")
def clients(workshop: Workshop) -> Iterator[Clients]:
    """A service of the same checkout, as a person starts it, that is asked all the while."""
    beside = serving(workshop.project.root, HANDSIGNS_SERVE_FOLLOW_SECONDS="")
    with beside as service, Clients(service).asking() as asked:
        asked.seconds_until(1)
        yield asked


def test_the_first_run_is_promoted_and_tells_all(workshop: Workshop, first: RunReport) -> None:
    assert first.data.train + first.data.val + first.data.test == 120
    assert [phase.name for phase in first.phases] == ["base", "fine_tune", "full"]
    assert all(phase.seconds > 0 and phase.epochs == 3 for phase in first.phases)
    assert first.features.computed == first.data.train * 2 + first.data.val + first.data.synthetic
    assert first.gate.passed
    assert first.model.version == 1
    assert first.model.alias == "champion"
    assert first.release.uri == f"s3://artifacts/releases/{first.release.id}/"
    stages = {"audit", "preprocess", "backbone", "features", "train@base", "evaluate", "gate"}
    assert stages | {"fetch", "version", "publish", "register", "promote"} < set(first.seconds)
    for name in ("audit", "curves", "confusion", "roc_pr", "mistakes"):
        picture = (workshop.project.plots / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_local_servers_keep_the_photos_the_tasks_and_what_was_found(workshop: Workshop) -> None:
    with embedded(Settings(), workshop.project) as services:
        pushed = Storage(replace(services.s3(), bucket="dvc")).list("photos/files/md5/")
        assert len(list(pushed)) == 6 * PER_CLASS + 1
    with sqlite3.connect(workshop.project.local / "prefect/prefect.db") as database:
        tasks = {name for (name,) in database.execute("select name from task_run")}
        shown = {key for (key,) in database.execute("select key from artifact")}
        runs = [name for (name,) in database.execute("select name from flow_run")]
    assert {"fetch", "version", "audit", "train@full", "gate", "publish", "promote"} <= tasks
    assert shown == {"summary", "audit", "gate", "comparison", "champion-history"}
    assert all(name.startswith("v1 promoted: accuracy ") for name in runs)


def test_mlflow_keeps_one_run_with_its_curves_files_and_model(
    workshop: Workshop, first: RunReport
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workshop.project.local / 'mlflow.db'}")
    champion = client.get_model_version_by_alias("hand-signs", "champion")
    assert int(champion.version) == 1
    assert champion.tags["content_id"] == first.release.id
    experiment = client.get_experiment_by_name("hand-signs")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["phases.full.epochs"] == "3"
    curve = client.get_metric_history(run.info.run_id, "full/val_loss")
    assert [point.step for point in curve] == [1, 2, 3]
    assert run.data.metrics["test/accuracy"] == first.test.accuracy
    assert run.data.tags["data_version"] == first.data.version
    with embedded(Settings(), workshop.project) as services:
        prefix = f"mlflow/hand-signs/{run.info.run_id}/artifacts/"
        names = [entry.key.removeprefix(prefix) for entry in Storage(services.s3()).list(prefix)]
    files = {name for name in names if name.startswith("files/")}
    assert files == {"files/dvc.lock", "files/params.yaml", "files/data.dvc"}
    assert any(name.startswith("pictures/") for name in names)


def test_nothing_changed_is_told_before_any_server_starts(
    workshop: Workshop, first: RunReport
) -> None:
    prefect = workshop.project.local / "logs/prefect.log"
    before = prefect.stat().st_mtime_ns
    again = workshop.handsigns("retrain", fresh=True)
    assert again["status"] == "unchanged"
    assert prefect.stat().st_mtime_ns == before
    assert again["release"]["id"] == first.release.id
    assert workshop.report()["status"] == "unchanged"
    assert not list((workshop.project.local / "logs").glob("*.pid"))


def test_repro_finds_nothing_to_do_and_gives_the_same_bits_from_a_clean_cache(
    workshop: Workshop, trained: Trained
) -> None:
    lock = workshop.project.lock.read_bytes()
    assert "Data and pipelines are up to date" in workshop.run("dvc", "repro").stdout
    assert workshop.project.lock.read_bytes() == lock
    ours, theirs = workshop.project, trained.workshop.project
    for name in ("metrics.json", "model.keras", "model.pb", "gate.json"):
        assert (ours.artifacts / name).read_bytes() == (theirs.artifacts / name).read_bytes()
    # Every stage from the same inputs to the same results, pictures too.
    locks = [yaml.safe_load((one.root / "dvc.lock").read_text()) for one in (ours, theirs)]
    assert locks[0] == locks[1]


def test_the_champion_predicts_evaluates_and_verifies(
    workshop: Workshop, first: RunReport, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "others", per_class=3, seed=7)
    scores = workshop.handsigns("evaluate", photos)
    assert scores["n"] == 18
    assert scores["unreadable"] == []
    picture = photos / "2/0000.png"
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    found = workshop.handsigns("predict", picture, tmp_path / "broken.jpg", code=1)
    seen, broken = found["predictions"]
    assert sum(seen["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert "not an image" in broken["error"]
    verified = workshop.handsigns("verify", "champion")
    assert verified["id"] == first.release.id
    assert verified["facts"]["data_version"] == first.data.version


def runs_of(workshop: Workshop) -> dict[str, Any]:
    """The runs in MLflow by their ids."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workshop.project.local / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hand-signs")
    return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}


def stored_in(workshop: Workshop) -> dict[str, str]:
    """The etags of all that the bucket of releases holds, by key."""
    with embedded(Settings(), workshop.project) as services:
        return {one.key: one.etag for one in Storage(services.s3()).list("")}


def test_a_refused_model_leaves_champion_registry_and_storage_alone(
    workshop: Workshop, prefect_api: PrefectApi
) -> None:
    before, runs, stored = workshop.handsigns("status"), runs_of(workshop), stored_in(workshop)
    workshop.change("gate", min_test_photos=10_000)
    try:
        with receiving("secret") as receiver:
            address = {"HANDSIGNS_NOTIFY_URLS": receiver.address, **prefect_api.named}
            refused = workshop.handsigns("retrain", code=1, **address)
        (told,) = receiver.messages
        assert told["title"].endswith(" rejected")
        assert told["message"].startswith(refused["reason"])
        assert "/runs/flow-run/" in told["message"]
        assert refused["status"] == "rejected"
        assert "test photos" in refused["reason"]
        assert refused["model"]["version"] is None
        assert not refused["gate"]["passed"]
    finally:
        workshop.change("gate", min_test_photos=6)
    after = workshop.handsigns("status")
    for part in ("champion", "challenger", "history"):
        assert after[part] == before[part]
    # All that is new is a run in MLflow, which stands for no release and is no version.
    (run,) = (run for name, run in runs_of(workshop).items() if name not in runs)
    assert run.info.run_name.startswith("rejected: test photos")
    assert run.data.tags["gate"].startswith("rejected: test photos")
    assert "content_id" not in run.data.tags
    assert [one["version"] for one in workshop.handsigns("versions")["versions"]] == [1]
    files = f"mlflow/hand-signs/{run.info.run_id}/"
    after = stored_in(workshop)
    assert {key: etag for key, etag in after.items() if not key.startswith(files)} == stored


def test_one_phases_rate_reruns_that_phase_and_what_follows(
    workshop: Workshop, first: RunReport, clients: Clients, prefect_api: PrefectApi
) -> None:
    rate = load_params(workshop.project.params).phases["full"].learning_rate
    workshop.change("phases.full", learning_rate=1.4 * rate)
    second = RunReport.model_validate(workshop.handsigns("retrain", **prefect_api.named))
    assert second.status in ("promoted", "registered")
    assert second.features.computed == 0
    assert second.model.version == 2
    assert second.release.id != first.release.id
    assert second.seconds["features"] < first.seconds["features"] / 2
    clients.seconds_until(workshop.handsigns("status")["champion"]["version"])


def test_promote_and_rollback_tell_the_history_and_reach_a_running_service_within_30_s(
    workshop: Workshop, clients: Clients
) -> None:
    present = workshop.handsigns("status")["champion"]["version"]
    other = 2 if present == 1 else 1
    move = workshop.handsigns("promote", str(other), "--force", "--reason", "a test of mine")
    assert (move["previous"], move["version"]) == (present, other)
    clients.seconds_until(other)
    assert workshop.handsigns("promote", str(other))["at"] == move["at"]  # already so
    back = workshop.handsigns("rollback")
    assert (back["previous"], back["version"]) == (other, present)
    clients.seconds_until(present)
    history = workshop.handsigns("status")["history"]
    assert [one["reason"] for one in history[-2:]] == ["a test of mine", "rolled back by hand"]
    # Nobody met a gap: not while retrains ran, nor while the champion was moved.
    assert {status for status, _ in clients.answers} == {200}
    assert clients.service.health()["state"] == "ready"
    assert "Traceback" not in clients.service.log.read_text()


def test_an_alias_that_did_not_follow_is_repaired_by_the_next_retrain_though_nothing_changed(
    workshop: Workshop,
) -> None:
    from mlflow import MlflowClient

    database = workshop.project.local / "mlflow.db"
    present = workshop.handsigns("status")["champion"]["version"]
    with sqlite3.connect(database) as registry:
        registry.execute(
            "create trigger full before update on registered_model_aliases "
            "begin select raise(abort, 'database or disk is full'); end"
        )
    why = ("--force", "--reason", "MLflow is full")
    moved = workshop.handsigns("promote", str(3 - present), *why)
    with sqlite3.connect(database) as registry:
        registry.execute("drop trigger full")
    mark = workshop.project.local / "alias_pending"
    for expected, pending in ((present, True), (moved["version"], False)):
        client = MlflowClient(f"sqlite:///{database}")
        alias = client.get_model_version_by_alias("hand-signs", "champion").version
        assert (int(alias), mark.exists()) == (expected, pending)
        assert workshop.handsigns("retrain")["status"] == "unchanged"


@pytest.mark.slow
def test_a_full_disk_fails_the_run_in_one_line_and_spoils_nothing(
    workshop: Workshop, first: RunReport, prefect_api: PrefectApi
) -> None:
    before = workshop.handsigns("status")
    lock = (workshop.project.root / "dvc.lock").read_bytes()
    workshop.run_limited(10_000_000, "retrain", "--force")  # the backbone's weights are larger
    report = workshop.report()
    assert report["status"] == "failed"
    assert "File too large" in report["reason"]
    assert "\n" not in report["reason"]
    after = workshop.handsigns("status")
    for part in ("data", "champion", "challenger", "history"):
        assert after[part] == before[part]
    assert workshop.handsigns("verify", "champion")["id"] == before["champion"]["release"]
    # With room again it comes to what was there before.
    again = workshop.handsigns("retrain", **prefect_api.named)
    assert again["release"]["id"] in [move["release"] for move in before["history"]]
    assert (workshop.project.root / "dvc.lock").read_bytes() == lock
    # With the first parameters too: DVC's cache and the registry know it all.
    rate = load_params(CHECKOUT.params).phases["full"].learning_rate
    workshop.change("phases.full", learning_rate=rate)
    back = RunReport.model_validate(workshop.handsigns("retrain", **prefect_api.named))
    assert back.release.id == first.release.id
    assert back.model.version == 1

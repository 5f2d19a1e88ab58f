"""The workflow as a person runs it: real DVC, Prefect, MLflow and S3 on loopback."""

import json
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.local.stack import Services
from flows.report import RunReport
from flows.settings import Settings
from tasks.services.dvc import check_trained_on
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import PER_CLASS, Repo, Trained, git
from tests.fixtures.faults import receiving
from tests.fixtures.forkserver import Started
from tests.fixtures.photos import CHECKOUT, write_photos
from tests.fixtures.servers import PrefectApi
from tests.fixtures.service import grey, serving, soon

SECRET = "sentinel-do-not-show"
REMOTE = {"HANDSIGNS_DVC_REMOTE_URL": "s3://dvc/photos"}


@pytest.fixture(scope="module")
def repo(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """A checkout whose first retrain made a champion, on servers that started for it."""
    made = trained.checkout(tmp_path_factory.mktemp("retrain") / "checkout")
    made.handsigns("import", trained.photos)
    foreign = "http://127.0.0.1:9"  # another project's store: a run that used it would fail
    made.handsigns("retrain", fresh=True, **REMOTE, MLFLOW_S3_ENDPOINT_URL=foreign)
    return made


@pytest.fixture(scope="module")
def first(repo: Repo) -> RunReport:
    """What the first retrain of the checkout reported; the first test asks for it at once."""
    return RunReport.model_validate(repo.report())


def query(repo: Repo, sql: str) -> set[str]:
    with sqlite3.connect(repo.project.local / "prefect/prefect.db") as database:
        return {value for (value,) in database.execute(sql)}


def registry(repo: Repo) -> tuple[MlflowClient, dict[str, Any]]:
    """MLflow's client, and the runs by their ids."""
    client = MlflowClient(f"sqlite:///{repo.project.local / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hand-signs")
    runs = client.search_runs([experiment.experiment_id])
    return client, {run.info.run_id: run for run in runs}


def stored_in(repo: Repo, bucket: str = "artifacts") -> dict[str, str]:
    """The etags of all that a bucket holds, by key."""
    with closing(Services(Settings(), repo.project)) as services:
        storage = Storage(replace(services.s3(), bucket=bucket))
        return {one.key: one.etag for one in storage.list("")}


def test_the_first_run_is_promoted_and_recorded_everywhere(repo: Repo, first: RunReport) -> None:
    assert (first.status, first.model.version, first.model.alias) == ("promoted", 1, "champion")
    data = first.data
    assert data.train + data.val + data.test == 6 * PER_CLASS
    assert [one["name"] for one in first.phases] == ["base", "fine_tune", "full"]
    assert first.features["computed"] == data.train * 2 + data.val + data.synthetic
    assert first.gate.passed
    assert first.release["uri"] == f"s3://artifacts/releases/{first.release['id']}/"
    steps = {"fetch", "version", "audit", "features", "train@base", "publish", "promote"}
    assert steps < set(first.seconds)
    plots = {path.stem for path in repo.project.plots.glob("*.png")}
    assert {"audit", "curves", "confusion", "roc_pr", "mistakes"} <= plots
    # The DVC remote has the photos, and Prefect tasks, artifacts and a name that says it all.
    assert len(stored_in(repo, "dvc")) == 6 * PER_CLASS + 1
    assert steps < query(repo, "select name from task_run")
    shown = query(repo, "select key from artifact")
    assert shown == {"summary", "audit", "gate", "comparison", "champion-history", "quality"}
    (name,) = query(repo, "select name from flow_run")
    assert name.startswith("v1 promoted: accuracy ")
    # MLflow has one run with curves, files and pictures, and the version.
    client, runs = registry(repo)
    champion = client.get_model_version_by_alias("hand-signs", "champion")
    assert (int(champion.version), champion.tags["content_id"]) == (1, first.release["id"])
    ((run_id, run),) = runs.items()
    assert run.data.params["phases.full.epochs"] == "3"
    assert len(client.get_metric_history(run_id, "full/val_loss")) == 3
    assert run.data.metrics["test/accuracy"] == first.test.accuracy
    assert run.data.tags["data_version"] == data.version
    names = {key.partition(f"{run_id}/artifacts/")[2] for key in stored_in(repo)}
    assert {"files/dvc.lock", "files/params.yaml", "files/data.dvc"} <= names
    assert {"pictures/curves.png", "pictures/quality.png"} <= names


def test_a_run_with_nothing_to_do_starts_no_server(repo: Repo, first: RunReport) -> None:
    log = repo.project.local / "logs/prefect.log"
    before, lock = log.stat().st_mtime_ns, repo.project.lock.read_bytes()
    again = repo.handsigns("retrain", **REMOTE)
    assert (again["status"], again["release"]["id"]) == ("unchanged", first.release["id"])
    assert repo.report()["status"] == "unchanged"
    assert log.stat().st_mtime_ns == before
    assert "Data and pipelines are up to date" in repo.run("dvc", "repro").stdout
    assert repo.project.lock.read_bytes() == lock


def test_the_champion_predicts_and_verifies(repo: Repo, first: RunReport, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "others", per_class=3, seed=7)
    (photos / "2/broken.jpg").write_bytes(b"no picture")
    scores = repo.handsigns("evaluate", photos)
    assert (scores["n"], len(scores["unreadable"])) == (18, 1)
    found = repo.handsigns("predict", photos / "2", photos / "missing.png", code=1)["predictions"]
    *seen, broken, missing = found
    assert [sum(one["probabilities"].values()) for one in seen] == pytest.approx([1] * 3, abs=1e-4)
    assert "not an image" in broken["error"]
    assert "No such file" in missing["error"]
    assert repo.handsigns("verify", "champion")["id"] == first.release["id"]


def test_a_rejected_model_is_recorded_but_no_version(repo: Repo, prefect_api: PrefectApi) -> None:
    before, (_, runs), stored = repo.handsigns("status"), registry(repo), stored_in(repo)
    repo.change("gate", min_test_photos=10_000)
    with receiving(SECRET) as receiver:
        address = {"HANDSIGNS_NOTIFY_URLS": receiver.address, **prefect_api.named}
        rejected = repo.handsigns("retrain", code=1, **address)
    repo.change("gate", min_test_photos=6)
    (sent,) = receiver.messages
    assert sent["title"].endswith(" rejected")
    assert sent["message"].startswith(rejected["reason"])
    assert "/runs/flow-run/" in sent["message"]
    assert (rejected["status"], rejected["model"]["version"]) == ("rejected", None)
    after = repo.handsigns("status")
    for part in ("champion", "challenger", "history"):
        assert after[part] == before[part]
    (run,) = (run for name, run in registry(repo)[1].items() if name not in runs)
    assert run.info.run_name.startswith("rejected: test photos")
    assert run.data.tags["mlflow.note.content"].startswith("Rejected: test photos")
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == rejected["data"]["version"]
    assert f'"train": {rejected["data"]["train"]}' in used.dataset.profile
    assert "content_id" not in run.data.tags
    assert [one["version"] for one in repo.handsigns("versions")["versions"]] == [1]
    files, now = f"mlflow/hand-signs/{run.info.run_id}/", stored_in(repo)
    assert {key: etag for key, etag in now.items() if not key.startswith(files)} == stored


def test_a_service_follows_every_move_without_a_gap(repo: Repo, prefect_api: PrefectApi) -> None:
    with serving(repo.project.root) as service:

        def answers_with(version: int) -> bool:
            answer = service.predict(grey(1))
            assert answer.status_code == 200
            return bool(answer.json()["model"]["version"] == version)

        soon(lambda: answers_with(1))
        # A release differs by its parameters too, so there is a version without training.
        repo.change("gate", max_loss=4.9)
        second = repo.handsigns("retrain", **prefect_api.named)
        assert (second["status"], second["features"]["computed"]) == ("promoted", 0)
        soon(lambda: answers_with(2))
        move = repo.handsigns("promote", "1", "--force", "--reason", "a test of mine")
        assert (move["previous"], move["version"]) == (2, 1)
        soon(lambda: answers_with(1))
        back = repo.handsigns("rollback")
        assert (back["previous"], back["version"]) == (1, 2)
        soon(lambda: answers_with(2))
        assert "Traceback" not in service.log.read_text()


def test_an_alias_that_did_not_follow_is_repaired_though_nothing_changed(repo: Repo) -> None:
    repo.change("gate", max_loss=4.9)
    repo.handsigns("retrain")  # makes a second version, unless the test before did
    present = repo.handsigns("status")["champion"]["version"]
    with sqlite3.connect(repo.project.local / "mlflow.db") as tables:
        tables.execute(
            "create trigger full before update on registered_model_aliases "
            "begin select raise(abort, 'database or disk is full'); end"
        )
        tables.commit()
        why = ("--force", "--reason", "MLflow is full")
        moved = repo.handsigns("promote", str(3 - present), *why)
        tables.execute("drop trigger full")
    assert repo.handsigns("retrain")["status"] == "unchanged"
    alias = registry(repo)[0].get_model_version_by_alias("hand-signs", "champion")
    assert int(alias.version) == moved["version"] != present


@pytest.mark.slow
def test_a_full_disk_fails_an_import_and_a_run_in_one_line_and_changes_nothing(
    repo: Repo, prefect_api: PrefectApi, tmp_path: Path
) -> None:
    def photos() -> dict[Path, bytes]:
        paths = [repo.project.data_file, *repo.project.data.rglob("*.*")]
        return {path: path.read_bytes() for path in paths}

    there, more = photos(), write_photos(tmp_path / "more", per_class=2, size=400, seed=1)
    for size, words in ((100_000, ()), (1_000, ("--replace",))):  # of photos; of DVC's notes
        refused = repo.run_limited(size, "import", more, *words).stderr
        assert (refused.count("\n"), photos()) == (1, there), refused
    before, lock = repo.handsigns("status"), repo.project.lock.read_bytes()
    repo.run_limited(10_000_000, "retrain", "--force")  # the backbone's weights are larger
    report = repo.report()
    assert report["status"] == "failed"
    assert "File too large" in report["reason"]
    assert "\n" not in report["reason"]
    after = repo.handsigns("status")
    for part in ("data", "champion", "challenger", "history"):
        assert after[part] == before[part]
    # With room again it comes to what was there before.
    again = repo.handsigns("retrain", **prefect_api.named)
    known = {move["release"] for move in before["history"]}
    assert again["release"]["id"] in known | {(before["challenger"] or {}).get("release")}
    assert repo.project.lock.read_bytes() == lock


@pytest.mark.slow
def test_the_inbox_is_trained_on_once_and_pushed_to_git(trained: Trained, tmp_path: Path) -> None:
    made = trained.checkout(tmp_path / "checkout")
    root, inbox = made.project.root, tmp_path / "inbox"
    shutil.copy(CHECKOUT.root / "data.dvc", root)  # names the rendered sample
    git(tmp_path, "init", "-q", "--bare", "origin")
    git(root, "remote", "add", "origin", str(tmp_path / "origin"))
    shutil.copytree(trained.photos, inbox)
    (inbox / "3/torn.jpg").write_bytes(b"no picture")
    named = {
        "HANDSIGNS_INBOX": str(inbox),
        "HANDSIGNS_GIT_PUSH": "handsigns/data",
        "HANDSIGNS_DVC_REMOTE_URL": str(tmp_path / "remote"),
    }
    report = made.handsigns("retrain", **named)
    assert report["status"] == "promoted", report["reason"]
    assert report["data"]["quarantined"] == 1
    remote = tmp_path / "remote/files/md5"
    assert len([path for path in remote.rglob("*") if path.is_file()]) == 121
    for name in ("data.dvc", "dvc.lock"):
        pushed = git(tmp_path / "origin", "show", f"handsigns/data:{name}")
        assert pushed == (root / name).read_text().strip()
    assert len(list(inbox.rglob("*.*"))) == 121
    again = made.handsigns("retrain", **named)
    assert (again["status"], again["data"]["quarantined"]) == ("unchanged", 1)


@pytest.mark.slow
def test_an_import_waits_for_a_retrain_and_a_lost_terminal_cancels_one(
    trained: Trained, prefect_api: PrefectApi, tmp_path: Path
) -> None:
    made = trained.checkout(tmp_path / "checkout")
    made.handsigns("import", trained.photos)
    before = made.project.data_file.read_bytes()

    @contextmanager
    def retraining(name: str) -> Iterator[tuple[Started, Path]]:
        """A retrain that is past its first stage, and the folder of its output."""
        output = tmp_path / name
        output.mkdir()
        process = made.start(output, "retrain", "--json", **prefect_api.named)
        soon(lambda: "Stage audit" in (output / "2").read_text(), 120)
        yield process, output

    with retraining("cancelled") as (process, output):
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 130
        assert "Traceback" not in (output / "2").read_text()
    assert made.report()["status"] == "cancelled"
    assert made.handsigns("status")["last_run"]["status"] == "cancelled"
    runs = {(run["state_type"], run["name"]) for run in prefect_api.runs("retrain")}
    assert ("CANCELLED", "cancelled") in runs

    with retraining("finished") as (process, output):
        imported = made.handsigns("import", write_photos(tmp_path / "more", per_class=2, seed=9))
        assert process.wait(300) == 0, (output / "2").read_text()
    version = json.loads((output / "1").read_text())["data"]["version"]
    assert imported["version"] != version
    assert made.handsigns("verify", "champion")["facts"]["data_version"] == version
    made.project.data_file.write_bytes(before)
    check_trained_on(made.project, version)

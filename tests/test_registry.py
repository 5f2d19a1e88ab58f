"""Runs and versions in MLflow, on a database and on a server."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.errors import ServiceError
from tasks.services.mlflow import CHALLENGER, CHAMPION, RecordedRun, Registry, RunRecord
from tests.fixtures import faults
from tests.fixtures.faults import proxy_to
from tests.fixtures.publishing import pooling_model
from tests.fixtures.servers import MlflowServer

ID = "0123456789abcdef" * 2
HISTORY = {
    "phase": "base",
    "epochs": [
        {"epoch": 1, "loss": 1.5, "val_loss": 1.25},
        {"epoch": 2, "loss": 1.0, "val_loss": float("nan")},
    ],
}


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    picture, file = tmp_path / "curves.png", tmp_path / "dvc.lock"
    picture.write_bytes(b"picture")
    file.write_bytes(b"lock")
    return RunRecord(
        ID,
        params={"seed": 20, "phases": {"base": {"epochs": 2}}},
        histories=[HISTORY],
        metrics={"accuracy": 0.95, "per_class": [1], "recall": {"0": 1}, "x": "y", "ok": True},
        pictures=[picture],
        files=[file],
        tags={"git": "abc", "data": "def"},
    )


def _record(registry: Registry, record: RunRecord, folder: Path) -> RecordedRun:
    file, model = folder / "model.keras", pooling_model()
    if not file.exists():
        model.save(file)
    return registry.record_run(record, file, lambda: model, np.zeros((1, 8, 8, 3), np.uint8))


def _check_record(uri: str, name: str, run: RecordedRun, file: Path) -> None:
    """Read everything back with MLflow's own client."""
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"seed": "20", "phases.base.epochs": "2"}
    assert stored.data.tags.items() >= {"git": "abc", "content_id": ID}.items()
    assert stored.data.metrics.keys() == {"accuracy", "recall/0", "base/loss", "base/val_loss"}
    losses = [(one.step, one.value) for one in client.get_metric_history(run.run_id, "base/loss")]
    assert sorted(losses) == [(1, 1.5), (2, 1.0)]
    for path in ("pictures/curves.png", "files/dvc.lock"):
        assert [one.path for one in client.list_artifacts(run.run_id, path.split("/")[0])] == [path]
    source = client.get_model_version_by_alias(name, CHAMPION).source
    folder = Path(mlflow.artifacts.download_artifacts(source, tracking_uri=uri))
    assert (folder / "data/model.keras").read_bytes() == file.read_bytes()
    signature = mlflow.models.Model.load(str(folder)).signature
    shapes = [one.inputs[0].shape for one in (signature.inputs, signature.outputs)]
    assert shapes == [(-1, 8, 8, 3), (-1, 6)]
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} >= {"keras", "numpy"}
    assert all("==" in line for line in requirements)


@pytest.mark.parametrize("store", ["database", "server"])
def test_one_release_is_one_run_and_one_version(
    store: str,
    request: pytest.FixtureRequest,
    record: RunRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    name = f"hand-signs-{uuid.uuid4().hex[:8]}"
    if store == "server":
        server: MlflowServer = request.getfixturevalue("mlflow_server")
        for variable, value in server.named.items():
            monkeypatch.setenv(variable, value)
        registry = Registry(server.url, name)
    else:
        uri = request.getfixturevalue("tracking_uri")
        registry = Registry(uri, name, tmp_path / "mlartifacts")
    assert registry.versions() == []
    assert registry.find(ID) is registry.find(CHAMPION) is None
    run = _record(registry, record, tmp_path)
    assert _record(registry, record, tmp_path) == run
    version = registry.register(run, ID, {"release": "s3://artifacts/releases/x/"})
    assert (version.number, version.content_id, version.run_id) == (1, ID, run.run_id)
    assert registry.register(run, ID, {}).number == 1
    assert registry.register(run, "f" * 32, {}).number == 2
    for alias in (CHALLENGER, CHAMPION):
        registry.set_alias(alias, 1)
    registry.set_tags(1, {"compared_with": "nobody"})
    found = registry.find(CHAMPION)
    assert found is not None
    assert found.aliases == (CHALLENGER, CHAMPION)
    assert found.tags.items() >= {"compared_with": "nobody", "content_id": ID}.items()
    assert found == registry.find(1) == registry.find(ID)
    registry.set_alias(CHALLENGER, 2)
    assert [one.aliases for one in registry.versions()] == [(CHAMPION,), (CHALLENGER,)]
    _check_record(registry.tracking_uri, name, run, tmp_path / "model.keras")
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION as PICKLE

    assert PICKLE.get() is False
    # MLflow's default store, a database in the current folder, is never touched.
    assert list(Path.cwd().iterdir()) == []
    assert capsys.readouterr().out == ""


def test_rejected_and_interrupted_runs_are_recorded_as_what_they_are(
    tracking_uri: str, record: RunRecord, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    registry, client = Registry(tracking_uri, "hands", tmp_path / "ml"), MlflowClient(tracking_uri)
    facts = {"data_version": "0123456789.dir", "photos": {"train": 900, "test": 180}}
    facts |= {"description": "Rejected: recall of 4", "started": 1_700_000_000.0}
    rejected = replace(record, content_id=None, **facts)
    run_id = registry.record_rejected(rejected)
    registry.name_run(run_id, "rejected: recall of 4 0.71 < 0.75")
    run = client.get_run(run_id)
    assert run.info.run_name == "rejected: recall of 4 0.71 < 0.75"
    assert run.data.tags["mlflow.note.content"].startswith("Rejected: recall of 4")
    assert (run.info.start_time, run.info.status) == (1_700_000_000_000, "FINISHED")
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == "0123456789.dir"
    assert '"train": 900' in used.dataset.profile
    assert registry.versions() == []

    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.record_run(record, tmp_path / "model.keras", interrupt, np.zeros((1, 8, 8, 3)))
    experiment = run.info.experiment_id
    # What a process leaves that was killed, and could not say that it ended.
    client.create_run(experiment, tags={"content_id": ID})
    finished = {_record(registry, record, tmp_path).run_id, run_id}
    found = client.search_runs([experiment])
    assert {one.info.run_id for one in found if one.info.status == "FINISHED"} == finished
    states = sorted(one.info.status for one in found if one.info.run_id not in finished)
    assert states == ["FAILED", "KILLED"]


def test_a_fault_of_a_server_or_database_is_one_line_that_names_it(
    tmp_path: Path, tracking_uri: str
) -> None:
    (tmp_path / "file").write_bytes(b"no database")
    with proxy_to("http://127.0.0.1:9") as proxy:
        proxy.fault = faults.answering(500, "INTERNAL_ERROR")
        for uri, words in (
            (proxy.url, "INTERNAL_ERROR.* Check MLFLOW_TRACKING_URI or DATABASE_URL"),
            (f"sqlite:///{tmp_path}/file/below", "file/below"),
            (f"sqlite:///{tmp_path}/file", "Repair that file; or move it away"),
            (tracking_uri, "hand-signs"),  # it knows no version 7
        ):
            with pytest.raises(ServiceError, match=words) as caught:
                Registry(uri, "hand-signs").set_alias(CHAMPION, 7)
            assert "\n" not in str(caught.value)
        assert len(proxy.requests) == 3

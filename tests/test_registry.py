"""Runs and versions in MLflow; what a retrain records on a server is tested with the retrain."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient, artifacts
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION as PICKLE
from mlflow.models import Model

from tasks.errors import ServiceError
from tasks.services.mlflow import CHALLENGER, CHAMPION, RecordedRun, Registry, RunRecord
from tests.fixtures.faults import answering, one_line, proxy_to
from tests.fixtures.publishing import pooling_model

ID = "0123456789abcdef" * 2
LOSSES = [{"epoch": 1, "val_loss": 1.25}, {"epoch": 2, "val_loss": float("nan")}]
RECORD = RunRecord(
    ID,
    params={"seed": 20, "phases": {"base": {"epochs": 2}}},
    histories=[{"phase": "base", "epochs": LOSSES}],
    metrics={"accuracy": 0.95, "per_class": [1], "recall": {"0": 1}, "x": "y", "ok": True},
    tags={"git": "abc", "data": "def"},
)


@pytest.fixture
def registry(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Registry, MlflowClient]:
    """A registry in an empty working folder, and MLflow's own client of it."""
    pooling_model().save(tmp_path / "model.keras")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return Registry(tracking_uri, "hand-signs", tmp_path / "ml"), MlflowClient(tracking_uri)


def _record(registry: Registry, load: Any = pooling_model) -> RecordedRun:
    example = np.zeros((1, 8, 8, 3), np.uint8)
    return registry.record_run(RECORD, Path("../model.keras"), load, example)


def test_one_release_is_one_run_and_one_version(
    registry: tuple[Registry, MlflowClient], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, client = registry
    assert ours.versions() == []
    assert ours.find(ID) is ours.find(CHAMPION) is None
    run = _record(ours)
    assert _record(ours) == run
    version = ours.register(run, ID, {"release": "s3://artifacts/releases/x/"})
    assert (version.number, version.content_id, version.run_id) == (1, ID, run.run_id)
    assert [ours.register(run, content, {}).number for content in (ID, "f" * 32)] == [1, 2]
    for alias in (CHALLENGER, CHAMPION):
        ours.set_alias(alias, 1)
    ours.set_tags(1, {"compared_with": "nobody"})
    found = ours.find(CHAMPION)
    assert found
    assert found == ours.find(1) == ours.find(ID)
    assert found.aliases == (CHALLENGER, CHAMPION)
    assert found.tags.items() >= {"compared_with": "nobody", "content_id": ID}.items()
    ours.set_alias(CHALLENGER, 2)
    assert [one.aliases for one in ours.versions()] == [(CHAMPION,), (CHALLENGER,)]
    # What is recorded, and the model, as MLflow's own client reads them.
    recorded = client.get_run(run.run_id).data.metrics.keys()
    assert recorded == {"accuracy", "recall/0", "base/val_loss"}
    source = client.get_model_version_by_alias("hand-signs", CHAMPION).source
    folder = Path(artifacts.download_artifacts(source, tracking_uri=ours.tracking_uri))
    assert (folder / "data/model.keras").read_bytes() == Path("../model.keras").read_bytes()
    signature = Model.load(str(folder)).signature
    shapes = [one.inputs[0].shape for one in (signature.inputs, signature.outputs)]
    assert shapes == [(-1, 8, 8, 3), (-1, 6)]
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} >= {"keras", "numpy"}
    assert all("==" in line for line in requirements)
    assert PICKLE.get() is False
    # MLflow's default store, a database in the current folder, is never touched.
    assert list(Path.cwd().iterdir()) == []
    assert capsys.readouterr().out == ""


def test_interrupted_runs_are_recorded_as_such(registry: tuple[Registry, MlflowClient]) -> None:
    ours, client = registry

    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _record(ours, interrupt)
    # What a process leaves that was killed, and could not say that it ended.
    killed = client.create_run("1", tags={"content_id": ID}).info.run_id
    found = _record(ours).run_id
    states = {one.info.run_id: one.info.status for one in client.search_runs(["1"])}
    assert (states.pop(killed), states.pop(found)) == ("KILLED", "FINISHED")
    assert [*states.values()] == ["FAILED"]


def test_a_fault_of_a_server_or_database_is_one_line(tmp_path: Path, tracking_uri: str) -> None:
    (tmp_path / "file").write_bytes(b"no database")
    with proxy_to("http://nowhere") as proxy, proxy.failing(answering(500, "INTERNAL_ERROR")):
        for uri, words in (
            (proxy.url, "INTERNAL_ERROR.* Check MLFLOW_TRACKING_URI or DATABASE_URL"),
            (f"sqlite:///{tmp_path}/file/below", "file/below"),
            (f"sqlite:///{tmp_path}/file", "Repair that file; or move it away"),
            (tracking_uri, "hand-signs"),  # it knows no version 7
        ):
            with one_line(ServiceError, words):
                Registry(uri, "hand-signs").set_alias(CHAMPION, 7)
        assert len(proxy.requests) == 3

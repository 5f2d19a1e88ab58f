"""The MLflow registry and run records."""

import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from tasks.errors import ReleaseError, ServiceError
from tasks.services.s3 import S3Address, redact_url

PREFIX = "mlflow"
CHALLENGER = "challenger"
CHAMPION = "champion"
CONTENT_ID = "content_id"  # tag of runs and versions: the release that they stand for
LIBRARIES = ("keras", "mlflow", "numpy", "tensorflow", "tensorflow-cpu")
FIXED = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Whoever reads our standard output expects JSON there.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
DEFAULTS = {
    # Three attempts of 8 s; MLflow's own defaults ask a server that is down for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
}


@dataclass(frozen=True)
class RunRecord:
    """Everything about one retrain besides the model; a rejected one has no `content_id`."""

    content_id: str | None
    params: Mapping[str, Any]
    name: str | None = None
    description: str = ""
    data_version: str = ""
    photos: Mapping[str, int] = field(default_factory=dict)  # by split
    started: float | None = None  # when training began, as a Unix time
    histories: Sequence[Mapping[str, Any]] = ()  # contents of the phases' `history.json`
    metrics: Mapping[str, Any] = field(default_factory=dict)  # nested; only numbers are recorded
    pictures: Sequence[Path] = ()
    files: Sequence[Path] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedRun:
    run_id: str
    model_id: str


@dataclass(frozen=True)
class Version:
    """One registered version of the model; `content_id` is its release."""

    number: int
    content_id: str | None
    run_id: str | None
    aliases: tuple[str, ...]
    tags: Mapping[str, str] = field(repr=False)

    @property
    def release(self) -> str:
        """Id of its release; `ReleaseError` for a version of another program."""
        if self.content_id is None:
            raise ReleaseError(
                f"Version {self.number} names no release. It was not registered by this workflow; "
                "retrain, and use the version that it makes."
            )
        return self.content_id


@dataclass(eq=False)
class Registry:
    """One registered model, and the experiment of the same name.

    Every method raises `ServiceError` in one line within 30 s when MLflow does not answer.
    """

    tracking_uri: str
    model_name: str
    artifacts: Path | S3Address | None = None  # for files of runs; None lets the server decide
    login: str | None = field(default=None, repr=False)  # user:password, or the environment's

    def record_run(
        self, record: RunRecord, model_file: Path, load: Callable[[], Any], example: Any
    ) -> RecordedRun:
        """Record a retrain and its model as one finished run, or find the one recorded before."""
        with self._connection() as client:
            experiment = self._experiment(client)
            if found := _earlier_run(client, experiment, str(record.content_id)):
                return found
            with _new_run(client, experiment, record) as run_id:
                model_id = _log_model(client, experiment, run_id, model_file, load(), example)
        return RecordedRun(run_id, model_id)

    def record_rejected(self, record: RunRecord) -> str:
        """Record a retrain whose model the gate rejected; the run's id."""
        with (
            self._connection() as client,
            _new_run(client, self._experiment(client), record) as run_id,
        ):
            return run_id

    def name_run(self, run_id: str, name: str, pictures: Sequence[Path] = ()) -> str | None:
        """Name a run by its outcome, and log pictures of it; its address if a server has it."""
        with self._connection() as client:
            client.update_run(run_id, name=name[:250])
            for path in pictures:
                client.log_artifact(run_id, str(path), "pictures")
            uri, experiment = redact_url(self.tracking_uri), self._experiment(client)
        return f"{uri}/#/experiments/{experiment}/runs/{run_id}" if "http" in uri[:4] else None

    def register(
        self,
        run: RecordedRun | None,
        content_id: str,
        tags: Mapping[str, str],
        description: str | None = None,
    ) -> Version:
        """Make a version, or find it; without a run `tags` must name the `release_uri`."""
        if found := self.find(content_id):
            return found
        with self._connection() as client:
            if not client.search_registered_models(f"name = '{self.model_name}'"):
                client.create_registered_model(self.model_name)
            source, ids = tags.get("release_uri", ""), {}
            if run:
                # Not "models:/<id>": with a database that is looked up in the default store.
                source = client.get_logged_model(run.model_id).artifact_location
                ids = {"run_id": run.run_id, "model_id": run.model_id}
            tags = {**tags, CONTENT_ID: content_id}
            made = client.create_model_version(
                self.model_name, source, tags=tags, description=description, **ids
            )
        return _version(made, {})

    def versions(self) -> list[Version]:
        """Return all versions, oldest first."""
        named = f"name = '{self.model_name}'"
        with self._connection() as client:
            models = client.search_registered_models(named)
            found = client.search_model_versions(named) if models else ()  # 10,000 at most
        versions = (_version(one, models[0].aliases) for one in found)
        return sorted(versions, key=lambda one: one.number)

    def find(self, name: int | str) -> Version | None:
        """Return the version with this number, content id or alias, or None."""
        named = (v for v in self.versions() if name in (v.number, v.content_id, *v.aliases))
        return next(named, None)

    def set_alias(self, alias: str, number: int) -> None:
        with self._connection() as client:
            client.set_registered_model_alias(self.model_name, alias, str(number))

    def set_tags(self, number: int, tags: Mapping[str, str]) -> None:
        with self._connection() as client:
            for name, text in tags.items():
                client.set_model_version_tag(self.model_name, str(number), name, text)

    def remove(self, version: Version) -> None:
        """Delete a version's run with all files, then the version, so that it can be repeated."""
        from mlflow.entities import ViewType
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with self._connection() as client:
            ours, run = [self._experiment(client)], version.run_id
            models = client.search_logged_models(ours, f"source_run_id = '{run}'")
            runs = client.search_runs(ours, f"attributes.run_id = '{run}'", ViewType.ALL)
            places = [one.artifact_location for one in models]
            for uri in places + [one.info.artifact_uri for one in runs]:
                get_artifact_repository(uri).delete_artifacts()
            for model in models:
                client.delete_logged_model(model.model_id)
            if any(one.info.lifecycle_stage == "active" for one in runs):
                client.delete_run(run)
            client.delete_model_version(self.model_name, str(version.number))

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        load_mlflow()
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with credentials_of(self.artifacts, self.login):
                yield MlflowClient(self.tracking_uri, self.tracking_uri)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = getattr(error, "error_code", None) or type(error).__name__
            cause: BaseException = error
            if "://" in str(error):  # a connection's; the innermost one says what happened
                while inner := cause.__cause__ or cause.__context__:
                    cause = inner
            first = next(iter(str(cause).splitlines()), "")
            quoted = "" if "://" in first else f": {shorten(first, 200, placeholder=' …')}"
            url, advice = redact_url(self.tracking_uri), "Check MLFLOW_TRACKING_URI or DATABASE_URL"
            if "out-of-date database schema" in first:
                advice = f"Back the database up and run `mlflow db upgrade {url}`"
            elif url.startswith("sqlite:"):
                advice = "Repair that file; or move it away, run `handsigns rebuild-registry`"
            raise ServiceError(
                f"MLflow failed at {url} ({reason}{quoted}). {advice}, then run again."
            ) from None

    def _experiment(self, client: Any) -> str:
        if known := client.get_experiment_by_name(self.model_name):
            return str(known.experiment_id)
        place = self.artifacts.resolve().as_uri() if isinstance(self.artifacts, Path) else None
        if isinstance(self.artifacts, S3Address):
            place = f"s3://{self.artifacts.bucket}/{PREFIX}/{self.model_name}"
        return str(client.create_experiment(self.model_name, artifact_location=place))


def load_mlflow() -> None:
    """Import MLflow, having set what it reads from the environment."""
    os.environ.update(FIXED)
    for name, text in DEFAULTS.items():
        os.environ.setdefault(name, text)
    importlib.import_module("mlflow")  # sets the levels that are changed next
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def credentials_of(artifacts: Path | S3Address | None, login: str | None = None) -> Iterator[None]:
    """Put credentials where MLflow looks for them; DVC, in the same process, may have others."""
    ours = artifacts.environment() if isinstance(artifacts, S3Address) else {}
    if login:
        user, password = login.split(":", 1)
        ours |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    before = {name: os.environ.pop(name, None) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, text in before.items():
            del os.environ[name]
            if text is not None:
                os.environ[name] = text


def _earlier_run(client: Any, experiment: str, content_id: str) -> RecordedRun | None:
    """Find the finished run of a release, and end those of killed processes."""
    found = None
    for run in client.search_runs([experiment], f"tags.{CONTENT_ID} = '{content_id}'"):
        run_id = run.info.run_id
        if run.info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")
        elif run.info.status == "FINISHED" and (outputs := client.get_run(run_id).outputs):
            found = RecordedRun(run_id, outputs.model_outputs[0].model_id)
    return found


@contextmanager
def _new_run(client: Any, experiment: str, record: RunRecord) -> Iterator[str]:
    """Make a run of a record; it failed if the block raises."""
    tags = {**record.tags, "mlflow.note.content": record.description}
    if record.content_id:
        tags[CONTENT_ID] = record.content_id
    started = round((record.started or time.time()) * 1000)
    run = client.create_run(experiment, started, tags, record.name)
    run_id, state = str(run.info.run_id), "FAILED"
    try:
        _log(client, run_id, record)
        yield run_id
        state = "FINISHED"
    finally:
        client.set_terminated(run_id, state)


def _log(client: Any, run_id: str, record: RunRecord) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    if record.data_version:
        photos = Dataset(
            name="photos",
            digest=record.data_version[:36],
            source_type="dvc",
            source=json.dumps({"md5": record.data_version, "path": "data"}),
            profile=json.dumps(dict(record.photos)),
        )
        used = DatasetInput(photos, [InputTag("mlflow.data.context", "training and test")])
        client.log_inputs(run_id, [used])
    now = int(time.time() * 1000)
    params = [Param(name, str(value)[:6000]) for name, value in _flat(record.params, ".")]
    points = [(name, value, 0) for name, value in _flat(record.metrics, "/")]
    points += [
        (f"{history['phase']}/{name}", epoch[name], epoch["epoch"])
        for history in record.histories
        for epoch in history["epochs"]
        for name in epoch.keys() - {"epoch"}
    ]
    metrics = [
        Metric(name, float(value), now, step)
        for name, value, step in points
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    client.log_batch(run_id, metrics, params, synchronous=True)
    for folder, paths in (("pictures", record.pictures), ("files", record.files)):
        for path in paths:
            client.log_artifact(run_id, str(path), folder)


def _flat(nested: Mapping[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    """Values by the joined keys that lead to them."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}{separator}{more}", one) for more, one in _flat(value, separator))
        else:
            yield key, value


def _log_model(
    client: Any, experiment: str, run_id: str, model_file: Path, model: Any, example: Any
) -> str:
    """Log the release's own file; `log_model` would save, and load, the model once more."""
    import mlflow.tensorflow
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import infer_signature

    example = example.astype(model.inputs[0].dtype)
    output = np.zeros((1, *model.output_shape[1:]), model.outputs[0].dtype)
    made = client.create_logged_model(experiment, "model", run_id)
    # With the versions that run here, MLflow need not load the model to find them.
    known = {one.name: one.version for one in importlib.metadata.distributions()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        mlflow.tensorflow.save_model(
            model,
            str(folder),
            signature=infer_signature(example, output),
            input_example=example,
            pip_requirements=[f"{name}=={known[name]}" for name in LIBRARIES if name in known],
        )
        shutil.copyfile(model_file, folder / "data" / "model.keras")
        client.log_model_artifacts(made.model_id, str(folder))
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
    return str(made.model_id)


def _version(made: Any, aliases: Mapping[str, str]) -> Version:
    number, tags = int(made.version), dict(made.tags)
    own = tuple(sorted(alias for alias, named in aliases.items() if int(named) == number))
    return Version(number, tags.get(CONTENT_ID), made.run_id, own, tags)

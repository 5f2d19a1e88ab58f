"""Publish what the stages made: a release in storage, a run and a version in MLflow."""

import logging
import tempfile
from pathlib import Path

from flows import ui
from flows.report import ModelReport, ReleaseReport, histories
from flows.run import Run
from tasks.data.dataset import open_dataset
from tasks.errors import HandsignsError
from tasks.io import read_json, write_json
from tasks.model.augment import enlarge
from tasks.params import load_params
from tasks.releases.card import model_card
from tasks.releases.provenance import release_facts, write_bill
from tasks.releases.release import DATASET_INDEX, Release, publish
from tasks.services.git import read_revision
from tasks.services.mlflow import CHALLENGER, RunRecord, Version

SPLITS = {"train", "val", "test", "synthetic"}

_log = logging.getLogger(__name__)


def publish_release(run: Run) -> Release:
    """Upload the release of what the stages made, or find it there."""
    workspace, report = run.workspace, run.report
    project, params = workspace.project, load_params(workspace.project.params)
    source = workspace.pipeline.data_source()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "labels.json", open_dataset(project.dataset).classes)
        card = model_card(
            metrics=read_json(project.metrics),
            gate=read_json(project.gate),
            counts=report.data.model_dump(include=SPLITS),
            params=params.model_dump(),
            histories=histories(project, params),
            data_version=report.data.version,
            data_note="The photos are the rendered sample set: drawn hands, not photographs."
            if source == "sample"
            else "The photos were imported.",
        )
        (folder / "model_card.md").write_text(card, encoding="utf-8")
        root = project.root
        write_bill(root / "requirements.lock", root / "pyproject.toml", folder / "sbom.cdx.json")
        made = [project.model, project.graph, project.metrics, project.gate, *folder.iterdir()]
        made += [project.params, project.lock, project.data_file, project.reference]
        made.append(project.predictions)
        files = {DATASET_INDEX: project.dataset_index, **{path.name: path for path in made}}
        facts = release_facts(root, report.data.version, workspace.champion())
        release = publish(workspace.storage, files, facts)
    report.release = ReleaseReport(id=release.id, uri=release.uri)
    return release


def register_release(run: Run, release: Release) -> Version:
    """Record the run in MLflow and register the model of its release as challenger."""
    from tasks.model.files import load_model

    registry, project = run.workspace.registry, run.workspace.project
    record, dataset = _record(run, release), open_dataset(project.dataset)
    example = enlarge(dataset.images[dataset.rows("test")[:1]]).astype("float32")
    recorded = registry.record_run(
        record, project.model, lambda: load_model(project.model), example
    )
    tags = {"release_uri": release.uri}
    version = registry.register(recorded, release.id, tags, record.description)
    registry.set_alias(CHALLENGER, version.number)
    name = registry.model_name
    run.report.model = ModelReport(name=name, version=version.number, alias=CHALLENGER)
    run.record = recorded.run_id
    return version


def record_rejected(run: Run) -> None:
    """Record in MLflow what the gate rejected; log, don't raise, if that fails."""
    try:
        run.record = run.workspace.registry.record_rejected(_record(run, None))
    except HandsignsError as error:
        _log.warning("The rejected run is not in MLflow: %s", error)


def _record(run: Run, release: Release | None) -> RunRecord:
    report, project = run.report, run.workspace.project
    params, failed = load_params(project.params), report.gate.describe_failures()
    scores = f"Accuracy {report.test.accuracy}, loss {report.test.loss}, {report.data.describe()}."
    tags = {
        "data_version": report.data.version,
        "git_revision": read_revision(project.root).commit,
        "gate": f"rejected: {failed}" if failed else "passed",
        "release_uri": release.uri if release else None,
        "prefect_run": ui.run_address(),
    }
    return RunRecord(
        content_id=release.id if release else None,
        params=params.model_dump(),
        name=f"retrain on data {report.data.version[:8]}",
        description=scores if release else f"Rejected: {failed}. {scores}",
        data_version=report.data.version,
        photos=report.data.model_dump(include=SPLITS),
        started=run.started,
        histories=histories(project, params),
        metrics={"test": read_json(project.metrics)},
        pictures=sorted(project.plots.glob("*.png")),
        files=[project.lock, project.params, project.data_file],
        tags={name: text for name, text in tags.items() if text},
    )


def name_record(run: Run) -> str | None:
    """Name the run in MLflow by its outcome, and return its address; log, don't raise."""
    try:
        if run.record:
            project, report = run.workspace.project, run.report
            drawn = [project.changed] if report.comparison else []
            drawn += [project.quality] if report.status == "promoted" else []
            drawn = [picture for picture in drawn if picture.is_file()]
            return run.workspace.registry.name_run(run.record, report.headline(), drawn)
    except HandsignsError as error:
        _log.warning("The run in MLflow is not named by its outcome: %s", error)
    return None

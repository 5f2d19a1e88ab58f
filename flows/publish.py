"""Publish what the stages made: a release, a record in MLflow, a commit on a branch."""

import logging
import tempfile
from pathlib import Path

import yaml

from flows.report import ModelReport, ReleaseReport, histories
from flows.run import Run
from tasks.data.dataset import open_dataset
from tasks.errors import StageError
from tasks.io import read_json, write_json
from tasks.model.augment import enlarge
from tasks.params import LABELS, load_params
from tasks.project import Project
from tasks.releases.card import model_card, write_bill
from tasks.releases.provenance import release_facts
from tasks.releases.release import DATASET_INDEX, Release, publish
from tasks.services.data_file import read_record
from tasks.services.git import push_to_branch, read_revision
from tasks.services.mlflow import CHALLENGER, RunRecord, Version

SOURCES = {
    "sample": "The photos are the rendered sample set: drawn hands, not photographs.",
    "photos": "The photos were imported.",
}

_log = logging.getLogger(__name__)


def check_versions(project: Project, version: str) -> None:
    """Check that the stages used the version of the photos that the release will name."""
    record = read_record(project)
    try:
        stages = yaml.safe_load(project.lock.read_text(encoding="utf-8"))["stages"].values()
        used = {dep["md5"] for one in stages for dep in one["deps"] if dep["path"] == "data"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StageError("dvc.lock is damaged. Take it back from git and run again.") from error
    if record is None or record.version != version or used != {version}:
        raise StageError(
            f"The photos changed during this run, which began with version {version} of data/. "
            "Nothing was published; run again."
        )


def commit_versions(run: Run, branch: str) -> None:
    """Commit `data.dvc` and `dvc.lock` to a branch of `origin`, unless it has them already."""
    project, report = run.workspace.project, run.report
    verdict = "passed" if report.gate.passed else "rejected"
    commit = push_to_branch(
        project.root,
        branch,
        [project.data_file, project.lock],
        f"Retrain on data {report.data.version[:8]}\n\n"
        f"Test accuracy {report.test.accuracy or 0.0:.1%}; the gate {verdict} the model.",
    )
    _log.info("Branch %s: %s.", branch, f"commit {commit} is pushed" if commit else "up to date")


def publish_release(run: Run) -> Release:
    """Upload the release of what the stages made, or find it there."""
    workspace, report = run.workspace, run.report
    project, params = workspace.project, load_params(workspace.project.params)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "labels.json", list(LABELS))
        card = model_card(
            metrics=read_json(project.metrics),
            gate=read_json(project.gate),
            counts=report.data.model_dump(include={"train", "val", "test", "synthetic"}),
            params=params.model_dump(),
            histories=histories(project, params),
            data_version=report.data.version,
            data_note=SOURCES[workspace.pipeline.data_source() or "photos"],
        )
        (folder / "model_card.md").write_text(card, encoding="utf-8")
        root = project.root
        write_bill(root / "requirements.lock", root / "pyproject.toml", folder / "sbom.cdx.json")
        files = {
            "model.keras": project.model,
            "model.pb": project.graph,
            "metrics.json": project.metrics,
            "gate.json": project.gate,
            DATASET_INDEX: project.dataset_index,
            "params.yaml": project.params,
            "dvc.lock": project.lock,
            "data.dvc": project.data_file,
            **{path.name: path for path in folder.iterdir()},
        }
        facts = release_facts(root, report.data.version, workspace.champion())
        release = publish(workspace.storage, files, facts)
    report.release = ReleaseReport(id=release.id, uri=release.uri)
    return release


def register_release(run: Run, release: Release) -> Version:
    """Record the run in MLflow and register the model of its release as challenger."""
    from tasks.model.export import load_model

    report, registry = run.report, run.workspace.registry
    project, params = run.workspace.project, load_params(run.workspace.project.params)
    record = RunRecord(
        content_id=release.id,
        params=params.model_dump(),
        histories=histories(project, params),
        metrics={"test": read_json(project.metrics)},
        pictures=sorted(project.plots.glob("*.png")),
        files=[project.lock, project.params, project.data_file],
        tags={
            "data_version": report.data.version,
            "git_revision": read_revision(project.root).commit,
            "release_uri": release.uri,
        },
    )
    dataset = open_dataset(project.dataset)
    example = enlarge(dataset.images[dataset.rows("test")[:1]]).astype("float32")
    recorded = registry.record_run(
        record, project.model, lambda: load_model(project.model), example
    )
    version = registry.register(recorded, release.id, {"release_uri": release.uri})
    registry.set_alias(CHALLENGER, version.number)
    report.model = ModelReport(name=registry.model_name, version=version.number, alias=CHALLENGER)
    return version

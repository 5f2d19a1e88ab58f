"""The report of a run: `artifacts/run.json` and what it is made of."""

import datetime
import hashlib
import json
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.local.stack import configured_s3, find_running
from flows.workspace import Workspace
from tasks.data.dataset import open_dataset
from tasks.data.directory import set_aside
from tasks.errors import StageError
from tasks.io import read_json, write_json
from tasks.model.augment import enlarge
from tasks.params import LABELS, Params
from tasks.project import Project
from tasks.releases.card import model_card, write_bill
from tasks.releases.pointer import read_champion
from tasks.releases.release import DATASET_INDEX, Release, publish
from tasks.services.git import Branch, environment
from tasks.services.mlflow import CHAMPION, RecordedRun, RunRecord
from tasks.services.s3 import Storage, redact_url

if TYPE_CHECKING:
    from flows.workspace import Workspace

Status = Literal["promoted", "registered", "rejected", "unchanged", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataChanges(_Part):
    """Photos that came and went since the champion was trained.

    Args:
        since: version of the champion; None where there is none yet.
        added: photos that it did not know.
        removed: photos that it knew and that are gone.
        relabelled: photos that have another label now.
        per_class: `before`, `added`, `removed` and `now` by label.
    """

    since: int | None = None
    added: int = 0
    removed: int = 0
    relabelled: int = 0
    per_class: dict[str, dict[str, int]] = Field(default_factory=dict)


class DataReport(_Part):
    version: str = ""
    train: int = 0
    val: int = 0
    test: int = 0
    quarantined: int = 0
    duplicates: int = 0
    leaks: int = 0
    changes: DataChanges | None = None


class PhaseReport(_Part):
    name: str
    images: int
    epochs: int
    seconds: float
    val_accuracy: float
    val_loss: float


class TestReport(_Part):
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    loss: float | None = None
    auc: float | None = None
    ece: float | None = None
    per_class: list[dict[str, Any]] = Field(default_factory=list)
    robustness: dict[str, Any] = Field(default_factory=dict)


class GateReport(_Part):
    passed: bool = False
    checks: list[dict[str, Any]] = Field(default_factory=list)


class ModelReport(_Part):
    name: str
    version: int | None = None
    alias: str | None = None


class ReleaseReport(_Part):
    id: str | None = None
    uri: str | None = None


class FeaturesReport(_Part):
    views: int = 0
    computed: int = 0
    reused: int = 0
    images_per_second: float = 0.0


class RunReport(_Part):
    """The whole of `run.json`; a part that was not reached keeps its empty value."""

    status: Status
    reason: str
    data: DataReport = Field(default_factory=DataReport)
    phases: list[PhaseReport] = Field(default_factory=list)
    test: TestReport = Field(default_factory=TestReport)
    gate: GateReport = Field(default_factory=GateReport)
    comparison: dict[str, Any] | None = None
    model: ModelReport
    release: ReleaseReport = Field(default_factory=ReleaseReport)
    features: FeaturesReport = Field(default_factory=FeaturesReport)
    seconds: dict[str, float] = Field(default_factory=dict)

    def write(self, project: Project) -> None:
        """Write `run.json` whole."""
        write_json(project.run, self.model_dump(mode="json"))


def data_report(project: Project, version: str) -> DataReport:
    """Count photos by split, what was set aside, twins and leaks."""
    index = _artifact(project.dataset_index)
    splits = [photo["split"] for photo in index["photos"]]
    return DataReport(
        version=version,
        train=splits.count("train"),
        val=splits.count("val"),
        test=splits.count("test"),
        quarantined=quarantined(project),
        duplicates=_artifact(project.audit)["duplicates"],
        leaks=index["leaks"],
    )


def quarantined(project: Project) -> int:
    """Number of files that are set aside."""
    return sum(map(len, set_aside(project).values()))


def data_changes(project: Project, former: Any, since: int | None) -> DataChanges:
    """Compare the photos with those that the champion knew.

    Args:
        project: holds the photos of today, by the hash of their content.
        former: `dataset.json` of the champion's release; None where there is none.
        since: version of the champion.

    Returns:
        Counts for each sign, and of photos with another label.
    """
    before = {photo["name"]: photo["label"] for photo in (former or {"photos": []})["photos"]}
    now = {photo["name"]: photo["label"] for photo in _artifact(project.dataset_index)["photos"]}
    rows = {
        label: {
            "before": list(before.values()).count(label),
            "added": sum(now[name] == label for name in now.keys() - before.keys()),
            "removed": sum(before[name] == label for name in before.keys() - now.keys()),
            "now": list(now.values()).count(label),
        }
        for label in LABELS
    }
    return DataChanges(
        since=since,
        added=len(now.keys() - before.keys()),
        removed=len(before.keys() - now.keys()),
        relabelled=sum(before[name] != now[name] for name in before.keys() & now.keys()),
        per_class=rows,
    )


def histories(project: Project, params: Params) -> list[dict[str, Any]]:
    """Learning curves of the phases, in order."""
    return [_artifact(project.history(name)) for name in params.phases]


def phase_reports(
    project: Project, params: Params, seconds: Mapping[str, float]
) -> list[PhaseReport]:
    """One entry a phase; seconds are those of this run, 0 where it was not run."""
    return [
        PhaseReport(
            name=history["phase"],
            images=history["images"],
            epochs=len(history["epochs"]),
            seconds=seconds.get(f"train@{history['phase']}", 0.0),
            val_accuracy=history["val_accuracy"],
            val_loss=history["val_loss"],
        )
        for history in histories(project, params)
    ]


def features_report(project: Project, params: Params, ran: bool) -> FeaturesReport:
    """What this run computed; nothing where the stage was up to date."""
    found = read_json(project.features_report) if ran else None
    return FeaturesReport(**(found or {"views": params.features.augmented_copies}))


def test_report(project: Project) -> TestReport:
    """Scores on the test split."""
    metrics = _artifact(project.metrics)
    return TestReport(**{name: metrics[name] for name in TestReport.model_fields})


def gate_report(project: Project) -> GateReport:
    """The gate's verdict."""
    return GateReport(**_artifact(project.gate))


def release_files(project: Project, folder: Path) -> dict[str, Path]:
    """Files of a release by the name they get there.

    Args:
        project: the checkout.
        folder: holds what is written for the release alone: labels, model card and
            bill of materials.
    """
    return {
        "model.keras": project.model,
        "model.pb": project.graph,
        "labels.json": folder / "labels.json",
        "model_card.md": folder / "model_card.md",
        "metrics.json": project.metrics,
        "gate.json": project.gate,
        DATASET_INDEX: project.dataset_index,
        "params.yaml": project.params,
        "dvc.lock": project.lock,
        "data.dvc": project.data_file,
        "sbom.cdx.json": folder / "sbom.cdx.json",
    }


def _artifact(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(
            f"A stage's output cannot be read ({error}). Received: '{path}'. "
            "Remove it and run again."
        ) from error


def unchanged_since(workspace: "Workspace") -> RunReport | None:
    """Return an `unchanged` report if the last release still is what a run would make.

    Args:
        workspace: the checkout; its services as they are set now. A release that was made
            for others, or that its storage has lost, does not count.

    Returns:
        The report, or None when there is something to do.

    Raises:
        ServiceError: the storage that is set does not answer.
        ReleaseError: the champion there is not signed as it must be.
    """
    project = workspace.project
    last = read_json(_record(project))
    if not isinstance(last, dict) or last.get("made_of") != _made_of(workspace):
        return None
    sent = last.get("sent_to") or {}
    if any(place and sent.get(name) != place for name, place in _places(workspace).items()):
        return None
    if not project.data.is_dir() or workspace.pipeline.changed():
        return None
    try:
        report = RunReport.model_validate(last.get("report"))
    except ValidationError:  # written by another version of this program
        return None
    if report.model.alias == CHAMPION and _is_lost(workspace):
        return None
    return report.model_copy(
        update={
            "status": "unchanged",
            "reason": f"Data, parameters and code are those of version {report.model.version}.",
            "data": report.data.model_copy(update={"quarantined": quarantined(project)}),
            "seconds": {},
        }
    )


def remember(workspace: "Workspace", report: RunReport) -> None:
    """Keep what a run that released something was made of."""
    store = _local_store(workspace.project)
    if workspace.settings.s3_endpoint_url is None and not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        store.write_text(uuid.uuid4().hex, encoding="utf-8")
    content = {
        "made_of": _made_of(workspace),
        "sent_to": _places(workspace),
        "report": report.model_dump(mode="json"),
    }
    write_json(_record(workspace.project), content)


def _made_of(workspace: "Workspace") -> dict[str, Any]:
    project, settings = workspace.project, workspace.settings
    store = _local_store(project)
    local = store.read_text(encoding="utf-8") if store.is_file() else None
    keys = [*settings.public_keys, *filter(None, [settings.signing_key])]
    return {
        "lock": _digest(project.lock),
        "storage": settings.s3_endpoint_url or f"local {local}",
        "bucket": settings.bucket,
        "registry": _registry(workspace),
        "model": settings.model_name,
        "keys": [_digest(key) for key in keys],
    }


def _places(workspace: "Workspace") -> dict[str, str | None]:
    """Where versions are sent too; a place that is not named any more asks for nothing."""
    settings = workspace.settings
    return {"dvc_remote": redact_url(settings.dvc_remote_url or ""), "branch": settings.git_push}


def _registry(workspace: "Workspace") -> str:
    """Whose registry it is, without the password that a database's address may hold."""
    settings = workspace.settings
    if settings.mlflow_tracking_uri:
        return redact_url(settings.mlflow_tracking_uri)
    running = find_running(workspace.project.local.resolve())
    if running and running.mlflow:
        # Runs of the worker, which knows no database, go there too.
        return running.database or ""
    if settings.database_url is None:
        return ""
    from flows.local.servers import shown_database

    return shown_database(settings.database_url.get_secret_value())


def _is_lost(workspace: "Workspace") -> bool:
    """Whether a storage that others keep has no champion any more."""
    settings = workspace.settings
    if settings.s3_endpoint_url is None:
        return False
    return read_champion(Storage(configured_s3(settings), workspace.trust)) is None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _local_store(project: Project) -> Path:
    """Lies among the local storage's own files, and so goes with them."""
    return project.local / "seaweedfs" / "handsigns.id"


def _record(project: Project) -> Path:
    return project.local / "last_release.json"


def recorded_version(path: Path) -> str:
    """First digits of the version in `data.dvc`, read without loading DVC."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [line.partition("md5:")[2].strip() for line in lines if "md5:" in line]
    return found[0][:8] if found else "none"


def version_files(project: Project) -> list[Path]:
    """The files that name the version of the photos and of everything made of them."""
    return [project.data_file, project.lock]


def commit_versions(project: Project, branch: str, report: RunReport) -> str:
    """Commit them on a branch of `origin`, if they are not there already.

    Args:
        project: the checkout; its own branch, index and files stay as they are.
        branch: name of the branch.
        report: of the run so far, for the message.

    Returns:
        What was done, in words for the log.

    Raises:
        ServiceError: git or the remote refuses.
    """
    accuracy = report.test.accuracy or 0.0
    verdict = "passed" if report.gate.passed else "refused"
    commit = Branch(project.root, branch).commit(
        version_files(project),
        f"Retrain on data {report.data.version[:8]}\n\n"
        f"Test accuracy {accuracy:.1%}; the gate {verdict} the model.",
    )
    return f"commit {commit} is pushed" if commit else "it holds these versions already"


NOTES = {
    "sample": "The photos are the rendered sample set: drawn hands, not photographs.",
    "photos": "The photos were imported.",
}


@dataclass(frozen=True)
class Provenance:
    """What a model came from, beyond the files of its release.

    Args:
        data_version: DVC's hash of the photos.
        git_revision: commit of the checkout, with `-dirty` if files differed;
            'unknown' outside of git.
    """

    data_version: str
    git_revision: str

    def to_json(self) -> dict[str, str]:
        return {"data_version": self.data_version, "git_revision": self.git_revision}


def publish_release(workspace: Workspace, params: Params, report: RunReport) -> Release:
    """Upload the release of what the stages made, or find it there."""
    project = workspace.project
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "labels.json", list(LABELS))
        card = model_card(
            metrics=read_json(project.metrics),
            gate=read_json(project.gate),
            counts={name: getattr(report.data, name) for name in ("train", "val", "test")},
            params=params.model_dump(),
            histories=histories(project, params),
            data_version=report.data.version,
            data_note=NOTES[workspace.pipeline.data_source() or "photos"],
        )
        (folder / "model_card.md").write_text(card, encoding="utf-8")
        write_bill(
            project.root / "requirements.lock",
            project.root / "pyproject.toml",
            folder / "sbom.cdx.json",
        )
        facts = {
            **provenance(project, report).to_json(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "changed": changed_files(project.root),
            "environment": environment(),
        }
        return publish(workspace.storage, release_files(project, folder), facts)


def record_run(
    workspace: Workspace, params: Params, report: RunReport, release: Release
) -> RecordedRun:
    """Leave this run in MLflow, with the model that the release holds."""
    from tasks.model.network import load_model

    project = workspace.project
    record = RunRecord(
        content_id=release.id,
        params=params.model_dump(),
        histories=histories(project, params),
        metrics={"test": read_json(project.metrics)},
        pictures=sorted(project.plots.glob("*.png")),
        files=[project.lock, project.params, project.data_file],
        tags={**provenance(project, report).to_json(), "release_uri": release.uri},
    )
    return workspace.registry.record_run(
        record, project.model, lambda: load_model(project.model), _example(project)
    )


def provenance(project: Project, report: RunReport) -> Provenance:
    """Name the data and the code of this run."""
    return Provenance(report.data.version, git_revision(project.root))


def git_revision(root: Path) -> str:
    """Commit of the checkout, `-dirty` behind it when tracked files differ."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    command += ["--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        # An image has no git; its build wrote down what it was made of.
        stated = root / "REVISION"
        return stated.read_text(encoding="utf-8").strip() if stated.is_file() else "unknown"
    return done.stdout.strip()


def changed_files(root: Path) -> list[str]:
    """Tracked files that differ from the commit; none outside of git."""
    command = ["git", "-C", str(root), "diff", "--name-only", "-z", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(filter(None, done.stdout.split("\0")))


def _example(project: Project) -> Any:
    """One test photo as the model takes it; float32, (1, 224, 224, 3)."""
    dataset = open_dataset(project.dataset)
    return enlarge(dataset.images[dataset.rows("test")[:1]]).astype("float32")

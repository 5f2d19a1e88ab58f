"""What leaves this machine: the release, and the record of the run."""

import datetime
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.reports import findings
from flows.reports.report import RunReport
from flows.workspace import Workspace
from tasks.labels import LABELS
from tasks.layout import Layout
from tasks.params import Params
from tasks.pictures.augment import enlarge
from tasks.pictures.dataset import open_dataset
from tasks.releases.bill import write_bill
from tasks.releases.card import model_card
from tasks.releases.environment import environment
from tasks.releases.release import Release, publish
from tasks.services.registry import RecordedRun
from tasks.services.run_record import RunRecord
from tasks.whole import read_json, write_json

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
    layout = workspace.layout
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "labels.json", list(LABELS))
        card = model_card(
            metrics=read_json(layout.metrics),
            gate=read_json(layout.gate),
            counts={name: getattr(report.data, name) for name in ("train", "val", "test")},
            params=params.model_dump(),
            histories=findings.histories(layout, params),
            data_version=report.data.version,
            data_note=NOTES[workspace.pipeline.data_source() or "photos"],
        )
        (folder / "model_card.md").write_text(card, encoding="utf-8")
        write_bill(
            layout.root / "requirements.lock",
            layout.root / "pyproject.toml",
            folder / "sbom.cdx.json",
        )
        facts = {
            **provenance(layout, report).to_json(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "changed": changed_files(layout.root),
            "environment": environment(),
        }
        return publish(workspace.storage, findings.release_files(layout, folder), facts)


def record_run(
    workspace: Workspace, params: Params, report: RunReport, release: Release
) -> RecordedRun:
    """Leave this run in MLflow, with the model that the release holds."""
    from tasks.network.model import load_model

    layout = workspace.layout
    record = RunRecord(
        content_id=release.id,
        params=params.model_dump(),
        histories=findings.histories(layout, params),
        metrics={"test": read_json(layout.metrics)},
        pictures=sorted(layout.plots.glob("*.png")),
        files=[layout.lock, layout.params, layout.data_file],
        tags={**provenance(layout, report).to_json(), "release_uri": release.uri},
    )
    return workspace.registry.record_run(
        record, layout.model, lambda: load_model(layout.model), _example(layout)
    )


def provenance(layout: Layout, report: RunReport) -> Provenance:
    """Name the data and the code of this run."""
    return Provenance(report.data.version, git_revision(layout.root))


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


def _example(layout: Layout) -> Any:
    """One test photo as the model takes it; float32, (1, 224, 224, 3)."""
    dataset = open_dataset(layout.dataset)
    return enlarge(dataset.images[dataset.rows("test")[:1]]).astype("float32")

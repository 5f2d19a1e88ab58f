"""What the artifacts on disk say, in the words of `run.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.reports.report import (
    DataChanges,
    DataReport,
    FeaturesReport,
    GateReport,
    PhaseReport,
    TestReport,
)
from tasks.errors import StageError
from tasks.incoming.quarantine import set_aside
from tasks.labels import LABELS
from tasks.layout import Layout
from tasks.params import Params
from tasks.releases.manifest import DATASET_INDEX
from tasks.whole import read_json


def data_report(layout: Layout, version: str) -> DataReport:
    """Count photos by split, what was set aside, twins and leaks."""
    index = _artifact(layout.dataset_index)
    splits = [photo["split"] for photo in index["photos"]]
    return DataReport(
        version=version,
        train=splits.count("train"),
        val=splits.count("val"),
        test=splits.count("test"),
        quarantined=quarantined(layout),
        duplicates=_artifact(layout.audit)["duplicates"],
        leaks=index["leaks"],
    )


def quarantined(layout: Layout) -> int:
    """Number of files that are set aside."""
    return sum(map(len, set_aside(layout).values()))


def data_changes(layout: Layout, former: Any, since: int | None) -> DataChanges:
    """Compare the photos with those that the champion knew.

    Args:
        layout: holds the photos of today, by the hash of their content.
        former: `dataset.json` of the champion's release; None where there is none.
        since: version of the champion.

    Returns:
        Counts for each sign, and of photos with another label.
    """
    before = {photo["name"]: photo["label"] for photo in (former or {"photos": []})["photos"]}
    now = {photo["name"]: photo["label"] for photo in _artifact(layout.dataset_index)["photos"]}
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


def histories(layout: Layout, params: Params) -> list[dict[str, Any]]:
    """Learning curves of the phases, in order."""
    return [_artifact(layout.history(name)) for name in params.phases]


def phase_reports(
    layout: Layout, params: Params, seconds: Mapping[str, float]
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
        for history in histories(layout, params)
    ]


def features_report(layout: Layout, params: Params, ran: bool) -> FeaturesReport:
    """What this run computed; nothing where the stage was up to date."""
    found = read_json(layout.features_report) if ran else None
    return FeaturesReport(**(found or {"views": params.features.views}))


def test_report(layout: Layout) -> TestReport:
    """Scores on the test split."""
    metrics = _artifact(layout.metrics)
    return TestReport(**{name: metrics[name] for name in TestReport.model_fields})


def gate_report(layout: Layout) -> GateReport:
    """The gate's verdict."""
    return GateReport(**_artifact(layout.gate))


def release_files(layout: Layout, folder: Path) -> dict[str, Path]:
    """Files of a release by the name they get there.

    Args:
        layout: the checkout.
        folder: holds what is written for the release alone: labels, model card and
            bill of materials.
    """
    return {
        "model.keras": layout.model,
        "model.pb": layout.graph,
        "labels.json": folder / "labels.json",
        "model_card.md": folder / "model_card.md",
        "metrics.json": layout.metrics,
        "gate.json": layout.gate,
        DATASET_INDEX: layout.dataset_index,
        "params.yaml": layout.params,
        "dvc.lock": layout.lock,
        "data.dvc": layout.data_file,
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

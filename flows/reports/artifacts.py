"""What a run shows in the Prefect UI: tables, curves, pictures, links.

Pictures are embedded, so that they are seen wherever the UI is, with no address
of a storage service in between.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.reports.report import GateReport, PhaseReport, TestReport
from tasks.incoming.import_report import ImportReport
from tasks.layout import Layout
from tasks.scoring.checks import shown_interval
from tasks.whole import read_json

SHOWN = 100
"""Rows of a table that grows with the fault; the list on disk has them all."""


def show_inbox(name: str, report: ImportReport) -> None:
    """What came from the inbox, and which files were set aside."""
    counts = {
        "taken": sum(report.taken.values()),
        "there already": sum(report.already_there.values()),
        **{f"set aside: {kind}": number for kind, number in report.kinds().items()},
    }
    rows = ["## Inbox", f"`{name}`", "", "| files | number |", "|---|---|"]
    rows += [f"| {kind} | {number} |" for kind, number in counts.items()]
    create_markdown_artifact(
        "\n".join(rows), key="inbox", description="What came from the inbox before this run."
    )
    if report.quarantined:
        create_table_artifact(
            [aside.to_json() for aside in report.quarantined[:SHOWN]],
            key="quarantine",
            description="Files of the inbox that were set aside, and why.",
        )


def show_versions(paths: Sequence[Path]) -> None:
    """The files that name the photos and results of this run."""
    parts = [f"## {path.name}\n```yaml\n{path.read_text(encoding='utf-8')}```" for path in paths]
    create_markdown_artifact(
        "\n\n".join(parts), key="versions", description="The versions this run is of."
    )


def show_audit(layout: Layout) -> None:
    """Counts per class, twins, exclusions and warnings, with the audit's picture."""
    audit = read_json(layout.audit)
    counts = audit["counts"]
    labels = sorted(next(iter(counts.values())))
    rows = ["| folder | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    rows += [
        f"| {folder} | " + " | ".join(str(by_label[label]) for label in labels) + " |"
        for folder, by_label in counts.items()
    ]
    facts = [
        f"- {audit['photos']} photos, {audit['duplicates']} of them twins of another",
        f"- {len(audit['excluded'])} excluded from training",
        *(f"- **{html.escape(warning)}**" for warning in audit["warnings"]),
    ]
    create_markdown_artifact(
        "## Photos\n" + "\n".join(rows) + "\n\n" + "\n".join(facts),
        key="audit",
        description="What the photos are like, and which are not trained on.",
    )
    _show_picture(layout.plots / "audit.png", "audit-picture", "The photos at a glance.")


def show_phases(layout: Layout, phases: list[PhaseReport]) -> None:
    """One row a phase, and the curves of all of them."""
    create_table_artifact(
        [
            {
                "phase": phase.name,
                "images": phase.images,
                "epochs": phase.epochs,
                "seconds": round(phase.seconds, 1),
                "val accuracy": round(phase.val_accuracy, 4),
                "val loss": round(phase.val_loss, 4),
            }
            for phase in phases
        ],
        key="phases",
        description="The three training phases.",
    )
    _show_picture(layout.plots / "curves.png", "curves", "Loss and accuracy by epoch.")
    _show_picture(layout.plots / "views.png", "views", "What the phases see of some photos.")


def show_evaluation(layout: Layout, test: TestReport) -> None:
    """Scores on the test split, and the pictures that explain them."""
    scores = test.model_dump(exclude={"per_class", "robustness"}, mode="json")
    disturbed = {f"accuracy under {n}": v for n, v in test.robustness.get("accuracy", {}).items()}
    create_table_artifact(
        [{"measure": name, "value": str(value)} for name, value in (scores | disturbed).items()],
        key="evaluation",
        description="Scores on the test split.",
    )
    create_table_artifact(
        test.per_class, key="classes", description="Precision, recall and F1 of each class."
    )
    for name, words in (
        ("confusion", "What was taken for what."),
        ("mistakes", "The photos that were read wrongly."),
    ):
        _show_picture(layout.plots / f"{name}.png", name, words)


def show_gate(gate: GateReport) -> None:
    """Each check with value, limit and verdict."""
    create_table_artifact(
        [
            {
                "check": check["name"],
                "value": check["value"],
                "limit": check["limit"],
                "interval": shown_interval(check.get("interval")),
                "verdict": "passed" if check["passed"] else f"FAILED {check.get('detail', '')}",
            }
            for check in gate.checks
        ],
        key="gate",
        description="The gate passed." if gate.passed else "The gate refused this model.",
    )


def show_release(uri: str, address: str) -> None:
    """Where the release lies."""
    create_link_artifact(
        address, link_text=uri, key="release", description="The published release."
    )


def _show_picture(path: Path, key: str, description: str) -> None:
    if path.is_file():
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        create_image_artifact(f"data:image/png;base64,{content}", key=key, description=description)

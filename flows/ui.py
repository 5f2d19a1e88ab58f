"""Prefect artifacts and progress: what the Prefect UI shows of a run."""

import base64
import html
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from flows.report import DataChanges, GateReport, PhaseReport, TestReport
from tasks.data.importer import ImportReport
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.card import table
from tasks.releases.challenger import PromotionDecision
from tasks.releases.champion import METRICS
from tasks.releases.pointer import Move, read_champion
from tasks.scoring.checks import shown, shown_interval
from tasks.services.s3 import Storage
from tasks.stage import Progress

SECONDS = 2.0
"""Between two updates of one bar."""

_log = logging.getLogger(__name__)


class ShownProgress:
    """A `Progress` that tells the UI now and then, and another listener always.

    Args:
        also: the other listener, such as the terminal.
    """

    def __init__(self, also: Progress) -> None:
        self._also = also
        self._bars: dict[str, tuple[UUID, float]] = {}
        self._silenced = False

    def __call__(self, what: str, done: int, total: int) -> None:
        self._also(what, done, total)
        if self._silenced:
            return
        try:
            self._show(what, done, total)
        except (HTTPError, PrefectException) as error:
            # A bar is not worth a training.
            self._silenced = True
            _log.warning("Progress is not shown any more (%s).", type(error).__name__)

    def _show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        share = 100.0 * done / max(1, total)
        told = f"{what}: {done} of {total}"
        if what not in self._bars:
            if done < total:
                key = f"progress-{re.sub('[^a-z0-9]+', '-', what.lower()).strip('-')}"
                # Its type allows for a coroutine, which only an asynchronous caller gets.
                bar = cast(UUID, create_progress_artifact(share, key, told))
                self._bars[what] = (bar, now)
            return
        bar, last = self._bars[what]
        if done >= total or now - last > SECONDS:
            update_progress_artifact(bar, share, told)
            self._bars[what] = (bar, now)
        if done >= total:
            del self._bars[what]


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


def show_audit(project: Project) -> None:
    """Counts per class, twins, exclusions and warnings, with the audit's picture."""
    audit = read_json(project.audit)
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
    _show_picture(project.plots / "audit.png", "audit-picture", "The photos at a glance.")


def show_phases(project: Project, phases: list[PhaseReport]) -> None:
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
    _show_picture(project.plots / "curves.png", "curves", "Loss and accuracy by epoch.")
    _show_picture(project.plots / "views.png", "views", "What the phases see of some photos.")


def show_evaluation(project: Project, test: TestReport) -> None:
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
        _show_picture(project.plots / f"{name}.png", name, words)


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


MOST_PHOTOS = 50
"""Photos that changed verdict which are listed one by one."""


def show_comparison(decision: PromotionDecision) -> None:
    """The challenger beside the champion, on the same photos."""
    create_markdown_artifact(
        comparison_text(decision), key="comparison", description="Who should be champion."
    )


def show_history_of(storage: Storage) -> None:
    """Show every move of a champion that has moved: nothing here is a failure of that."""
    try:
        if champion := read_champion(storage):
            show_history(champion.pointer.moves)
    except Exception as error:  # of the storage or of Prefect, which raises many kinds
        _log.warning("The champion has moved; its history cannot be shown: %s", error)


def show_history(moves: Sequence[Move]) -> None:
    """Every move of the champion, the last one first."""
    create_table_artifact(
        [
            {
                "when": move.at,
                "from": move.previous or "none",
                "to": move.version,
                "action": f"{move.action}, FORCED" if move.forced else move.action,
                "by": move.by,
                "why": move.reason,
                "forced over": "; ".join(move.overruled),
                **move.metrics,
            }
            for move in reversed(moves)
        ],
        key="champion-history",
        description=f"Version {moves[-1].version} is champion: {moves[-1].reason}",
    )


def show_changes(changes: DataChanges) -> None:
    """Photos that came, went or got another label since the champion was trained."""
    since = f"version {changes.since}" if changes.since else "the beginning: no champion yet"
    heads = ("sign", "before", "came", "went", "now")
    rows = [[label, *counts.values()] for label, counts in changes.per_class.items()]
    create_markdown_artifact(
        f"## What changed in the photos since {since}\n\n{_table(heads, rows)}\n\n"
        f"{changes.relabelled} photos got another label.",
        key="data-changes",
        description=f"{changes.added} photos came, {changes.removed} went.",
    )


def comparison_text(decision: PromotionDecision) -> str:
    """The comparison in Markdown, for the UI and for who approves.

    Args:
        decision: what the comparison came to.
    """
    lines = ["## Challenger and champion", "", html.escape(decision.reason)]
    if decision.comparison is None:
        return "\n".join(lines)
    found = decision.comparison.to_json()
    words = (
        f"McNemar's exact test: {found['won']} photos only the challenger has right, "
        f"{found['lost']} only the champion, p = {found['p_value']:.3g}: **{found['verdict']}**."
    )
    before, after = found["champion"], found["challenger"]
    scores = [(name, before[name], after[name]) for name in METRICS]
    recalls = [
        [row[name] for name in ("label", "support", "champion", "challenger", "change")]
        for row in found["recalls"]
    ]
    changed = found["changed"][:MOST_PHOTOS]
    photos = [
        [row[name] for name in ("name", "label", "champion", "challenger", "now")]
        for row in changed
    ]
    more = len(found["changed"]) - len(changed)
    lines += [
        "",
        words,
        "",
        _table((f"{before['n']} photos", "champion", "challenger"), scores),
        "",
        "### Recall of each sign",
        "",
        _table(("sign", "photos", "champion", "challenger", "change"), recalls),
        "",
        f"### {len(found['changed'])} photos changed verdict",
        "",
        _table(("photo", "sign", "champion read", "challenger reads", "now"), photos),
        f"\nand {more} more." if more else "",
    ]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return table(heads, [[html.escape(shown(cell)) for cell in row] for row in rows])

"""What the Prefect UI shows of a run: its name and artifacts.

Everything here is best effort: an error of Prefect's is logged once and fails no run.
"""

import base64
import html
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.report import DataChanges, RunReport
from flows.workspace import Workspace
from tasks.gate import shown, shown_interval
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.card import table
from tasks.releases.champion import METRICS
from tasks.releases.comparison import PromotionDecision
from tasks.scoring.drift import Drift

MOST_PHOTOS = 50
"""Photos in the comparison that the two models read differently."""

_log = logging.getLogger(__name__)
_failed = False


def _try(call: Callable[..., Any], *args: Any, **content: Any) -> Any:
    """Ask Prefect for something; None if that fails."""
    global _failed
    try:
        return call(*args, **content)
    except Exception as error:  # httpx's, Prefect's, pydantic's: none is worth a training
        if not _failed:
            _failed = True
            _log.warning("The Prefect UI does not show everything (%s).", type(error).__name__)
        return None


def log_to_prefect() -> None:
    """Log in a worker what the command line logs."""
    for name in ("flows", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)


def rename_run(name: str) -> None:
    """Rename the present flow run."""

    def rename(run: str) -> None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run), name=name[:200])

    if run := flow_run.get_id():
        _try(rename, run)


def run_address() -> str | None:
    """Address of the present flow run in the UI."""
    return str(flow_run.ui_url) if flow_run.get_id() else None


def show_summary(project: Project, report: RunReport) -> None:
    """The outcome at a glance: verdict, scores, phases, and the plots of this run."""
    text = f"## {html.escape(report.headline())}\n\n{_table(('', ''), report.facts())}"
    if report.phases:
        names = ("name", "images", "epochs", "seconds", "val_accuracy", "val_loss")
        phases = [[getattr(phase, name) for name in names] for phase in report.phases]
        scores = ("label", "precision", "recall", "f1", "support")
        classes = [[row.get(name) for name in scores] for row in report.test.per_class]
        text += f"\n\n{_table(('phase', *names[1:]), phases)}\n\n{_table(scores, classes)}"
        plots = ("curves", "confusion", "mistakes")
        text += "".join(_picture(project.plots / f"{name}.png") for name in plots)
    _markdown("summary", report.headline(), text)


def show_photos(project: Project, changes: DataChanges) -> None:
    """The photos: counts, exclusions, warnings, and what changed since the champion."""
    audit = read_json(project.audit)
    counts = audit["counts"]
    labels = sorted(next(iter(counts.values())))
    rows = [[folder, *(by_label[label] for label in labels)] for folder, by_label in counts.items()]
    since = f"version {changes.since}" if changes.since else "the beginning: no champion yet"
    changed = [[label, *numbers.values()] for label, numbers in changes.per_class.items()]
    lines = [
        f"## Photos\n\n{_table(('folder', *labels), rows)}\n",
        f"- {audit['photos']} photos, {audit['duplicates']} of them near-duplicates of another",
        f"- {len(audit['excluded'])} excluded from training",
        *(f"- **{html.escape(warning)}**" for warning in audit["warnings"]),
        f"\n## What changed since {since}\n",
        _table(("sign", "before", "added", "removed", "now"), changed),
        f"\n{changes.relabelled} photos got another label.",
        _picture(project.plots / "audit.png"),
    ]
    what = f"The photos: {changes.added} added, {changes.removed} removed."
    _markdown("audit", what, "\n".join(lines))


def show_gate(report: RunReport) -> None:
    """Each check with value, limit and verdict, failures first."""
    rows = [
        (
            check["name"],
            check["value"],
            check["limit"],
            shown_interval(check.get("interval")),
            "passed" if check["passed"] else f"FAILED {check.get('detail') or ''}",
        )
        for check in sorted(report.gate.checks, key=lambda check: bool(check["passed"]))
    ]
    verdict = "The gate passed." if report.gate.passed else "The gate rejected this model."
    heads = ("check", "value", "limit", "interval", "verdict")
    _markdown("gate", verdict, _table(heads, rows))


def show_comparison(decision: PromotionDecision) -> None:
    """Champion and challenger on the same photos."""
    _markdown("comparison", "Champion and challenger.", comparison_text(decision))


def show_drift(found: Sequence[Drift], said: str, picture: Path) -> None:
    """What production sees beside what the champion was validated on."""
    heads = ("compared", "verdict", "value", "limit", "samples")
    rows = [(one.name, one.verdict, one.value, one.limit, one.samples) for one in found]
    _markdown("drift", said, _table(heads, rows) + _picture(picture))


def show_history(workspace: Workspace) -> None:
    """Every move of the champion, the last one first."""
    champion = _try(workspace.champion)
    if champion is None:
        return
    moves = champion.pointer.moves
    rows = [
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
    ]
    what = f"Version {moves[-1].version} is champion: {moves[-1].reason}"
    _try(create_table_artifact, rows, key="champion-history", description=what)


def comparison_text(decision: PromotionDecision) -> str:
    """The comparison in Markdown, for the UI and for the request for approval."""
    lines = ["## Challenger and champion", "", html.escape(decision.reason)]
    if decision.comparison is None:
        return "\n".join(lines)
    found = decision.comparison.to_json()
    before, after = found["champion"], found["challenger"]
    names = ("label", "support", "champion", "challenger", "change")
    recalls = [[row[name] for name in names] for row in found["recalls"]]
    names = ("name", "label", "champion", "challenger", "now")
    photos = [[row[name] for name in names] for row in found["changed"][:MOST_PHOTOS]]
    more = len(found["changed"]) - len(photos)
    lines += [
        "",
        f"McNemar's exact test: {found['won']} photos only the challenger has right, "
        f"{found['lost']} only the champion, p = {found['p_value']:.3g}: "
        f"**{found['verdict']}**.",
        "",
        _table(
            (f"{before['n']} photos", "champion", "challenger"),
            [(name, before[name], after[name]) for name in METRICS],
        ),
        "\n### Recall of each sign\n",
        _table(("sign", "photos", "champion", "challenger", "change"), recalls),
        f"\n### {len(found['changed'])} photos changed verdict\n",
        _table(("photo", "sign", "champion read", "challenger reads", "now"), photos),
        f"\nand {more} more." if more else "",
    ]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return table(heads, [[html.escape(shown(cell)) for cell in row] for row in rows])


def _picture(path: Path) -> str:
    """A plot in Markdown; empty if there is none."""
    if not path.is_file():
        return ""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"\n\n![{path.stem}](data:image/png;base64,{content})"


def _markdown(key: str, description: str, text: str) -> None:
    _try(create_markdown_artifact, text, key=key, description=description)

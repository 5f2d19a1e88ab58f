"""What the Prefect UI shows of a change of champion: comparison, history, new photos."""

import html
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.reports.report import DataChanges
from tasks.markdown import table
from tasks.releases.challenge import Challenge
from tasks.releases.champion import METRICS
from tasks.releases.pointer import Move, read_champion
from tasks.scoring.checks import shown
from tasks.services.storage import Storage

_log = logging.getLogger(__name__)

MOST_PHOTOS = 50
"""Photos that changed verdict which are listed one by one."""


def show_comparison(decision: Challenge) -> None:
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


def comparison_text(decision: Challenge) -> str:
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

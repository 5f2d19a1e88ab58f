"""What people see of a run in Prefect: its name, state and artifacts; and notifications.

Artifacts are best effort: an error of Prefect's is logged once and fails no run.
"""

import base64
import html
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec
from uuid import UUID

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Flow as KnownFlow
from prefect.client.schemas.objects import FlowRun, State
from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.utilities.urls import url_for

from flows.report import RunReport
from flows.settings import Settings, load_settings
from flows.workspace import Workspace
from tasks.errors import HandsignsError, SettingsError
from tasks.gate import shown
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.champion import METRICS
from tasks.releases.comparison import PromotionDecision
from tasks.releases.provenance import table
from tasks.releases.quality import draw_quality, read_quality
from tasks.scoring.drift import Drift
from tasks.services.notify import notify

MOST_PHOTOS = 50  # photos in the comparison that the two models read differently
UNHEARD = "Nothing was heard of this run"  # so begins what the crash automations say

P = ParamSpec("P")

_log = logging.getLogger(__name__)
_failed = False


def _best_effort(show: Callable[P, None]) -> Callable[P, None]:
    @wraps(show)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> None:
        global _failed
        try:
            show(*args, **kwargs)
        except Exception as error:  # httpx's, Prefect's, pydantic's: none is worth a training
            if not _failed:
                _failed = True
                _log.warning("The Prefect UI does not show everything (%s).", type(error).__name__)

    return attempt


def state_of(act: Callable[[Workspace], State[Any]]) -> State[Any]:
    """Act in the checkout of this folder; a refusal is a state with its reason."""
    for name in ("flows", "tasks"):  # log in a worker what the command line logs
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        with Workspace(Project(Path.cwd()), load_settings()) as workspace:
            return act(workspace)
    except HandsignsError as error:
        return Failed(name="Refused", message=str(error))


@_best_effort
def rename_run(name: str) -> None:
    """Rename the present flow run."""
    if run := flow_run.get_id():
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run), name=name[:200])


def run_address() -> str | None:
    """Address of the present flow run in the UI."""
    return str(flow_run.ui_url) if flow_run.get_id() else None


def notify_people(settings: Settings, title: str, reason: str, link: str | None = None) -> bool:
    """Send a message to the addresses in `HANDSIGNS_NOTIFY_URLS`; whether all of them took it."""
    if settings.notify_urls is None:
        return False
    where = link or f"Look at artifacts/run.json on {socket.gethostname()}."
    return notify(settings.notify_urls.get_secret_value(), title, f"{reason}\n{where}")


def notify_bad_end(flow: Flow[..., Any] | KnownFlow, flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook for a run that failed, was rejected, or crashed, whoever finds that out."""
    try:
        settings = load_settings()
    except SettingsError as error:
        _log.warning("No notification was sent: %s", error)
        return
    ended = (state.name or state.type.value).lower()
    reason = state.message or "No reason was given."
    notify_people(settings, f"handsigns: {flow.name} {ended}", reason, url_for(flow_run))


@flow(name="notify-crash", flow_run_name="notify of {run}")
def notify_crash(run: str) -> None:
    """Send the notification for a run that is marked as crashed.

    Args:
        run: The run's resource, `prefect.flow-run.<id>`.
    """
    with get_client(sync_client=True) as client:
        crashed = client.read_flow_run(UUID(run.rpartition(".")[2]))
        silent = client.read_flow(crashed.flow_id)
    # A heartbeat that overtakes a run's last state sets the automations off as well; such a
    # run has said itself how it ended.
    state = crashed.state
    if state and state.is_crashed() and (state.message or "").startswith(UNHEARD):
        notify_bad_end(silent, crashed, state)


def show_summary(project: Project, report: RunReport, record: str | None) -> None:
    """The outcome at a glance. It is the run's own artifact, so that it is above those of tasks.

    Args:
        record: address of the run in MLflow, if it has one.
    """
    headline = report.headline()
    text = [f"## {html.escape(headline)}\n", _table(("", ""), report.facts().items())]
    text += [f"\n[The run in MLflow]({record})"] if record else []
    if report.phases:
        text += [_picture(project.plots / f"{name}.png") for name in ("curves", "confusion")]
        text += [_picture(project.changed)] if report.comparison else []
        names = ("name", "images", "epochs", "seconds", "val_accuracy", "val_loss")
        phases = [[phase[name] for name in names] for phase in report.phases]
        scores = ("label", "precision", "recall", "f1", "support")
        classes = [[row.get(name) for name in scores] for row in report.test.per_class]
        text += ["\n### Training\n", _table(("phase", *names[1:]), phases)]
        text += ["\n### Test\n", _table(scores, classes), _picture(project.plots / "mistakes.png")]
    show_text("summary", headline, "\n".join(text))


def show_stages(project: Project, report: RunReport) -> None:
    """The artifacts `audit` and `gate`, failures first."""
    if changes := report.data.changes:
        since = changes["since"]
        since = f"version {since}" if since else "the beginning: no champion yet"
        changed = [[label, *numbers.values()] for label, numbers in changes["per_class"].items()]
        warnings = (read_json(project.audit) or {}).get("warnings", ())
        text = [f"## Photos since {since}\n"]
        text += [_table(("label", "before", "added", "removed", "now"), changed)]
        text += [f"\n{changes['relabelled']} photos got another label.\n"]
        text += [f"- **{html.escape(warning)}**" for warning in warnings]
        text += [_picture(project.plots / "audit.png")]
        show_text("audit", f"{len(warnings)} warnings.", "\n".join(text))
    if report.gate.checks:
        checks = []
        for check in sorted(report.gate.checks, key=lambda check: bool(check["passed"])):
            interval = " to ".join(map(shown, check.get("interval") or ()))
            verdict = "passed" if check["passed"] else f"FAILED {check.get('detail') or ''}"
            checks.append((check["name"], check["value"], check["limit"], interval, verdict))
        failed = len(report.gate.reasons)
        heads = ("check", "value", "limit", "interval", "verdict")
        show_text("gate", f"{failed} of {len(checks)} checks failed.", _table(heads, checks))


def show_drift(found: Sequence[Drift], said: str, picture: Path) -> None:
    """What production sees beside what the champion was validated on."""
    names = ("verdict", "value", "limit", "samples")
    rows = [(one.name, *(getattr(one, name) for name in names)) for one in found]
    show_text("drift", said, _table(("compared", *names), rows) + _picture(picture))


@_best_effort
def show_history(workspace: Workspace) -> None:
    """Every move of the champion, the last one first, and the quality of the last champions."""
    champion = workspace.champion()
    if champion is None:
        return
    moves = champion.pointer.moves
    champions, photos = read_quality(workspace.storage, moves, workspace.traffic())
    common = {one.version: one.common.get("accuracy") for one in champions}
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
            f"accuracy on {photos} common photos": common.get(move.version),
        }
        for move in reversed(moves)
    ]
    what = f"Version {moves[-1].version} is champion: {moves[-1].reason}"
    create_table_artifact(rows, key="champion-history", description=what)
    draw_quality(champions, photos, workspace.project.quality)
    picture = _picture(workspace.project.quality)
    show_text("quality", "Scores of each champion.", f"## Quality over time\n{picture}")


def comparison_text(decision: PromotionDecision) -> str:
    """The comparison in Markdown, for the UI and for the request for approval."""
    text = f"## Challenger and champion\n\n{html.escape(decision.reason)}"
    if decision.comparison is None:
        return text
    found = decision.comparison.to_json()
    before, after = found["champion"], found["challenger"]
    recalls = [[*row.values()] for row in found["recalls"]]
    photos = [[*row.values()] for row in found["changed"][:MOST_PHOTOS]]
    more = len(found["changed"]) - len(photos)
    scores = [(name, before[name], after[name]) for name in METRICS]
    return "\n".join(
        [
            f"{text}\n\nMcNemar's exact test: {found['won']} photos only the challenger has right, "
            f"{found['lost']} only the champion, p = {found['p_value']:.3g}: "
            f"**{found['verdict']}**.\n",
            _table((f"{before['n']} photos", "champion", "challenger"), scores),
            "\n### Recall of each label\n",
            _table(("label", "photos", "champion", "challenger", "change"), recalls),
            f"\n### {len(found['changed'])} photos changed verdict\n",
            _table(("photo", "label", "champion read", "challenger reads", "now"), photos),
            f"\nand {more} more." if more else "",
        ]
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return table(heads, [[html.escape(shown(cell)) for cell in row] for row in rows])


def _picture(path: Path) -> str:
    """A plot in Markdown; empty if there is none."""
    if not path.is_file():
        return ""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"\n\n![{path.stem}](data:image/png;base64,{content})"


@_best_effort
def show_text(key: str, description: str, text: str) -> None:
    """Make an artifact of Markdown."""
    create_markdown_artifact(text, key=key, description=description)

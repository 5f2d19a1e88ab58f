"""What the last finished retrain left, so that the next one can tell there is nothing to do.

Kept in `.local/`, apart from the services: reading it starts none of them and
imports nothing heavy. A storage that others keep is asked for its champion.
"""

import hashlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flows.loopback.local import configured_s3
from flows.loopback.running import find_running
from flows.reports.findings import quarantined
from flows.reports.report import RunReport
from tasks.layout import Layout
from tasks.releases.pointer import read_champion
from tasks.services.addresses import shown
from tasks.services.registry import CHAMPION
from tasks.services.storage import Storage
from tasks.whole import read_json, write_json

if TYPE_CHECKING:
    from flows.workspace import Workspace


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
    layout = workspace.layout
    last = read_json(_record(layout))
    if not isinstance(last, dict) or last.get("made_of") != _made_of(workspace):
        return None
    sent = last.get("sent_to") or {}
    if any(place and sent.get(name) != place for name, place in _places(workspace).items()):
        return None
    if not layout.data.is_dir() or workspace.pipeline.changed():
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
            "data": report.data.model_copy(update={"quarantined": quarantined(layout)}),
            "seconds": {},
        }
    )


def remember(workspace: "Workspace", report: RunReport) -> None:
    """Keep what a run that released something was made of."""
    store = _local_store(workspace.layout)
    if workspace.settings.s3_endpoint_url is None and not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        store.write_text(uuid.uuid4().hex, encoding="utf-8")
    content = {
        "made_of": _made_of(workspace),
        "sent_to": _places(workspace),
        "report": report.model_dump(mode="json"),
    }
    write_json(_record(workspace.layout), content)


def _made_of(workspace: "Workspace") -> dict[str, Any]:
    layout, settings = workspace.layout, workspace.settings
    store = _local_store(layout)
    local = store.read_text(encoding="utf-8") if store.is_file() else None
    keys = [*settings.public_keys, *filter(None, [settings.signing_key])]
    return {
        "lock": _digest(layout.lock),
        "storage": settings.s3_endpoint_url or f"local {local}",
        "bucket": settings.bucket,
        "registry": _registry(workspace),
        "model": settings.model_name,
        "keys": [_digest(key) for key in keys],
    }


def _places(workspace: "Workspace") -> dict[str, str | None]:
    """Where versions are sent too; a place that is not named any more asks for nothing."""
    settings = workspace.settings
    return {"dvc_remote": shown(settings.dvc_remote_url or ""), "branch": settings.git_push}


def _registry(workspace: "Workspace") -> str:
    """Whose registry it is, without the password that a database's address may hold."""
    settings = workspace.settings
    if settings.mlflow_tracking_uri:
        return shown(settings.mlflow_tracking_uri)
    running = find_running(workspace.layout.local.resolve())
    if running and running.mlflow:
        # Runs of the worker, which knows no database, go there too.
        return running.database or ""
    if settings.database_url is None:
        return ""
    from flows.loopback.database import shown_database

    return shown_database(settings.database_url.get_secret_value())


def _is_lost(workspace: "Workspace") -> bool:
    """Whether a storage that others keep has no champion any more."""
    settings = workspace.settings
    if settings.s3_endpoint_url is None:
        return False
    return read_champion(Storage(configured_s3(settings), workspace.trust)) is None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _local_store(layout: Layout) -> Path:
    """Lies among the local storage's own files, and so goes with them."""
    return layout.local / "seaweedfs" / "handsigns.id"


def _record(layout: Layout) -> Path:
    return layout.local / "last_release.json"

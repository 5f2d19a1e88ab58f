"""What the last finished retrain left, so that the next one can tell there is nothing to do.

Kept in `.local/`, apart from the services: reading it starts none of them and
imports nothing heavy.
"""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from flows.reports.findings import quarantined
from flows.reports.report import RunReport
from flows.settings import Settings
from tasks.layout import Layout
from tasks.services.addresses import shown
from tasks.services.pipeline import Pipeline
from tasks.whole import read_json, write_json


def unchanged_since(layout: Layout, settings: Settings, pipeline: Pipeline) -> RunReport | None:
    """Return an `unchanged` report if the last release still is what a run would make.

    Args:
        layout: the checkout.
        settings: a release made for other services does not count.
        pipeline: asked whether any stage, or `data/`, is out of date.

    Returns:
        The report, or None when there is something to do.
    """
    last = read_json(_record(layout))
    if not isinstance(last, dict) or last.get("made_of") != _made_of(layout, settings):
        return None
    if not layout.data.is_dir() or pipeline.changed():
        return None
    try:
        report = RunReport.model_validate(last["report"])
    except ValidationError:  # written by another version of this program
        return None
    return report.model_copy(
        update={
            "status": "unchanged",
            "reason": f"Data, parameters and code are those of version {report.model.version}.",
            "data": report.data.model_copy(update={"quarantined": quarantined(layout)}),
            "seconds": {},
        }
    )


def remember(layout: Layout, settings: Settings, report: RunReport) -> None:
    """Keep what a run that released something was made of."""
    content = {"made_of": _made_of(layout, settings), "report": report.model_dump(mode="json")}
    write_json(_record(layout), content)


def _made_of(layout: Layout, settings: Settings) -> dict[str, str | None]:
    lock = layout.lock
    return {
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "storage": settings.s3_endpoint_url,
        "bucket": settings.bucket,
        # Without the password that a database's address may hold.
        "registry": shown(settings.mlflow_tracking_uri or ""),
        "model": settings.model_name,
    }


def _record(layout: Layout) -> Path:
    return layout.local / "last_release.json"

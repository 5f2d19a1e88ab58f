"""The inbox that `HANDSIGNS_INBOX` names: a folder, or a place in S3."""

import logging
from dataclasses import replace
from pathlib import Path

from flows.loopback.local import Services
from flows.workspace import Workspace
from tasks.incoming.fetch import fetch_data
from tasks.incoming.import_report import ImportReport
from tasks.incoming.inbox import Inbox, list_bucket, list_folder
from tasks.progress import Progress
from tasks.services.storage import Storage

S3 = "s3://"

_log = logging.getLogger(__name__)


def look(workspace: Workspace, services: Services) -> Inbox | None:
    """See what lies in the inbox; None where there is none.

    Args:
        workspace: the checkout.
        services: give the S3 service, if the inbox is there.

    Raises:
        SourceError: the folder is missing, or holds no class folder.
        ServiceError: S3 does not answer, or has no such bucket.
    """
    where = workspace.settings.inbox
    if where is None:
        return None
    if where.startswith(S3):
        bucket, _, prefix = where.removeprefix(S3).partition("/")
        listing = list_bucket(Storage(replace(services.s3(), bucket=bucket)), prefix)
    else:
        listing = list_folder(Path(where))
    return Inbox(workspace.layout, where, listing, workspace.pipeline.data_version())


def take(workspace: Workspace, inbox: Inbox, progress: Progress) -> ImportReport:
    """Bring what is new into `data/`; photos take the place of the rendered sample.

    Versioning is the caller's part.

    Args:
        workspace: the checkout.
        inbox: has something new.
        progress: told about each file.

    Returns:
        What became of each file.
    """
    layout, pipeline = workspace.layout, workspace.pipeline
    source = pipeline.data_source()
    if source == "photos":
        fetch_data(layout, pipeline, progress)
    # What a person put beside the rendered photos is not ours to remove.
    untouched = not layout.data.is_dir() or not pipeline.data_changed()
    report = inbox.take(source == "sample" and untouched, progress)
    if source == "sample" and report.usable and untouched:
        _log.info("Photos from the inbox take the place of the rendered sample.")
    _log.info(
        "Inbox %s: %d photos taken, %d there already, %d set aside.",
        inbox.name,
        sum(report.taken.values()),
        sum(report.already_there.values()),
        len(report.quarantined),
    )
    return report

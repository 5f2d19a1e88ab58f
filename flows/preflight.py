"""What is checked before a retrain: the lock, the settings, and whether anything changed."""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from flows.local.clients import check_reachable
from flows.local.database import SQLITE
from flows.local.stack import find_running
from flows.report import RunReport, quarantined
from flows.workspace import Workspace
from tasks.errors import ServiceError, SettingsError
from tasks.io import read_json, sha256, write_json
from tasks.params import Params, load_params
from tasks.project import Project
from tasks.services.git import read_revision
from tasks.services.s3 import redact_url

if TYPE_CHECKING:
    from tasks.data.inbox import Inbox

MAGIC = b"SQLite format 3\0"

_log = logging.getLogger(__name__)


@contextmanager
def retrain_lock(project: Project) -> Iterator[bool]:
    """Hold the lock of the checkout's one retrain.

    Yields:
        Whether the lock is held; False at once if another process has it.
    """
    project.local.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(project.retrain_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        _holder(project).write_text(f"process {os.getpid()}\n", encoding="utf-8")
        yield True
    finally:
        lock.release()


def another_runs(project: Project) -> str:
    """Say that another retrain has the lock, and which one."""
    try:
        holder = _holder(project).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        holder = "unknown process"
    return (
        f"Another retrain of this checkout runs: {holder}. Let it end, or cancel it, and run again."
    )


def _holder(project: Project) -> Path:
    return project.retrain_lock.with_suffix(".pid")


def preflight(workspace: Workspace) -> None:
    """Refuse a retrain that cannot end well, before anything is started or changed."""
    params = load_params(workspace.project.params)
    check_one_worker(params)
    workspace.trust.check_signer()
    _check_approval(workspace)
    check_reachable(workspace.settings)
    _has_registry(workspace)
    workspace.pipeline.stages()
    if problem := read_revision(workspace.project.root).problem:
        _log.warning("Releases of this run name no commit and cannot be rebuilt: %s.", problem)


def check_one_worker(params: Params) -> None:
    """Reject a multi-worker TF_CONFIG; a retrain uses one worker."""
    if params.training.mode != "end_to_end":
        return
    from tasks.training.end_to_end import named_workers

    workers = named_workers()
    if len(workers) > 1:
        raise SettingsError(
            f"A retrain trains in one process, and TF_CONFIG names {len(workers)} workers "
            f"({', '.join(workers)}). Run `dvc repro` on each of them, then unset TF_CONFIG and "
            "retrain on one: it finds the stages done."
        )


def _check_approval(workspace: Workspace) -> None:
    """Approval needs services that outlive the run, or nobody could answer."""
    settings = workspace.settings
    if settings.promotion != "approval":
        return
    running = find_running(workspace.services.folder)
    addresses = {
        "PREFECT_API_URL": workspace.services.prefect_named(),
        "HANDSIGNS_S3_ENDPOINT_URL": settings.s3_endpoint_url or (running and running.s3),
    }
    missing = [name for name, address in addresses.items() if address is None]
    if missing:
        raise SettingsError(
            f"HANDSIGNS_PROMOTION=approval cannot be used without {' and '.join(missing)}: "
            "a run that waits for approval needs services that others can reach meanwhile. Set "
            "them, start the service with `handsigns up`, or use HANDSIGNS_PROMOTION=auto."
        )


def open_inbox(workspace: Workspace) -> "Inbox | None":
    """List the inbox; None if none is set."""
    if workspace.settings.inbox is None:
        return None
    from tasks.data.inbox import Inbox, list_bucket, list_folder

    place = workspace.settings.inbox
    if place.startswith("s3://"):
        bucket, _, prefix = place.removeprefix("s3://").partition("/")
        listing = list_bucket(workspace.bucket(bucket), prefix)
    else:
        listing = list_folder(Path(place))
    return Inbox(workspace.project, place, listing, workspace.pipeline.data_version())


def find_unchanged(workspace: Workspace) -> RunReport | None:
    """Return an `unchanged` report if a run would come to the same end as the last one.

    A release that was made for other services, or that its storage has lost, does not
    count. MLflow's alias is repaired here if it does not follow the champion.
    """
    project, pipeline = workspace.project, workspace.pipeline
    version, report = pipeline.data_version(), last_run(project)
    if report is None:
        return None
    before = read_json(_last_run(project)).get("inputs") or {}
    if any(before.get(name) != value for name, value in _inputs(workspace).items()):
        return None
    if report.data.version != version or not project.data.is_dir() or pipeline.changed():
        return None
    if (inbox := open_inbox(workspace)) and inbox.new:
        return None
    if report.status != "rejected" and not _is_registered(workspace):
        return None
    outcome = f"data, parameters and code are those of version {report.model.version}."
    if report.status == "rejected":
        outcome = f"the last run was rejected: {report.reason}"
    return report.model_copy(
        update={
            "status": "unchanged",
            "reason": f"Nothing changed; {outcome}",
            "data": report.data.model_copy(update={"quarantined": quarantined(project)}),
            "seconds": {},
        }
    )


def _is_registered(workspace: Workspace) -> bool:
    """Whether champion and registry still are what the last run left, or were repaired."""
    if not _has_registry(workspace):
        return False
    if workspace.settings.s3_endpoint_url is None and not workspace.alias_pending.exists():
        return True
    return workspace.champion() is not None and workspace.repair_alias()


def _has_registry(workspace: Workspace) -> bool:
    """Whether there is anything in the registry, as far as its local file tells.

    Raises:
        ServiceError: The file is no database.
    """
    if workspace.settings.mlflow_tracking_uri or workspace.settings.database_url:
        return True
    path = workspace.project.local / SQLITE["mlflow"]
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return True
    raise ServiceError(
        f"'{path}' is damaged: it is no SQLite database. Move it away and run `handsigns "
        "rebuild-registry`, which registers the releases in storage anew."
    )


def save_last_run(workspace: Workspace, report: RunReport) -> None:
    """Remember how a run ended, for `find_unchanged`; log, don't raise, if that fails."""
    store = _store_id(workspace.project)
    try:
        if workspace.settings.s3_endpoint_url is None and not store.exists():
            store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            store.write_text(uuid.uuid4().hex, encoding="utf-8")
        content = {"inputs": _inputs(workspace), "report": report.model_dump(mode="json")}
        write_json(_last_run(workspace.project), content)
    except OSError as error:
        _log.warning("The next run will not know that nothing changed (%s).", error)


def last_run(project: Project) -> RunReport | None:
    """The report of the last run that was not merely `unchanged`; None if it is unreadable."""
    last = read_json(_last_run(project))
    try:
        return RunReport.model_validate(last["report"]) if isinstance(last, dict) else None
    except (KeyError, ValidationError):  # written by another version of this program
        return None


def _inputs(workspace: Workspace) -> dict[str, Any]:
    """What a run is made of and where its results go, without any secret."""
    project, settings = workspace.project, workspace.settings
    store = _store_id(project)
    registry = settings.mlflow_tracking_uri
    if registry is None:
        running = find_running(project.local.resolve())
        if running and running.mlflow:  # its worker's runs do not know the database
            registry = running.database
        elif settings.database_url:
            registry = settings.database_url.get_secret_value()
    keys = [*settings.public_keys, *filter(None, [settings.signing_key])]
    targets = {"dvc_remote": redact_url(settings.dvc_remote_url or ""), "branch": settings.git_push}
    return {
        **{name: target for name, target in targets.items() if target},  # one less needs no run
        "lock": _digest(project.lock),
        "storage": settings.s3_endpoint_url or (store.read_bytes().hex() if store.exists() else ""),
        "bucket": settings.bucket,
        "registry": redact_url(registry or ""),
        "model": settings.model_name,
        "keys": [_digest(key) for key in keys],
    }


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None


def _store_id(project: Project) -> Path:
    """Lies among the local storage's files, so that it is removed with them."""
    return project.local / "seaweedfs" / "handsigns.id"


def _last_run(project: Project) -> Path:
    return project.local / "last_run.json"

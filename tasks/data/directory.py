"""The data directory: its lock, atomic changes, and its photos from DVC or the renderer."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from tasks.errors import BusyError, DataError, ServiceError
from tasks.params import list_labels, load_params
from tasks.project import FOLDERS, Project
from tasks.stage import Progress, silent

if TYPE_CHECKING:
    from tasks.services.dvc import Pipeline

WAIT = 600.0  # seconds to wait for the data lock
INCOMING = "incoming"  # folder of new photos during an import

Place = tuple[str, str]  # split and label

_log = logging.getLogger(__name__)


@contextmanager
def data_lock(project: Project, wait: float = WAIT) -> Iterator[None]:
    """Hold the lock of imports and retrains on `data/`; re-entrant in one process."""
    with file_errors(project.local):
        project.local.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(project.data_lock, thread_local=False, is_singleton=True)
        try:
            held = lock.acquire(timeout=min(wait, 0.5))
        except Timeout:
            _log.warning("A retrain or an import uses data/. Waiting up to %g s for it.", wait)
            try:
                held = lock.acquire(timeout=wait)
            except Timeout as error:
                raise BusyError(
                    f"data/ is in use: a retrain or another import has held '{lock.lock_file}' "
                    f"for more than {wait:g} seconds. Try again when it has ended."
                ) from error
    with held:
        yield


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Import failed at '{error.filename or path}' ({error.strerror or error}). Make room "
            "or give permission and import again."
        ) from error


def stored_photos(project: Project) -> dict[str, Place]:
    """Split and label of each file name in `data/`."""
    return {
        path.name: (split, path.parent.name)
        for split in FOLDERS
        for path in (project.data / split).glob("*/*")
    }


@contextmanager
def staging(project: Project) -> Iterator[Path]:
    """Hold the data lock and an empty folder on the file system of `data/`."""
    with data_lock(project), file_errors(project.staging):
        restore_data(project)
        shutil.rmtree(project.staging, ignore_errors=True)
        project.staging.mkdir(parents=True)
        try:
            yield project.staging
        finally:
            restore_data(project)
            shutil.rmtree(project.staging, ignore_errors=True)


def restore_data(project: Project) -> None:
    """Put `data/` back if an import was killed between its two renames."""
    old = project.staging / "old"
    if old.exists() and not project.data.exists():
        with data_lock(project), file_errors(project.data):
            if not project.data.exists():
                old.rename(project.data)


def change_data(
    project: Project, accepted: Mapping[str, Place], replace: bool, progress: Progress
) -> None:
    """Build the next `data/` of hard links and of the new photos in staging, and swap the two."""
    incoming, new = project.staging / INCOMING, project.staging / "new"
    if replace or not project.data.exists():
        new.mkdir()
    else:
        shutil.copytree(project.data, new, symlinks=True, copy_function=_link)
    for name, place in accepted.items():
        target = new.joinpath(*place, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (incoming / name).exists():
            (incoming / name).rename(target)
        elif not os.path.lexists(target):
            _link(str(project.data.joinpath(*place, name)), str(target))
    # Content must reach the disk before names do, for the case of a power failure.
    os.sync()
    progress("swap", 0, 2)
    if project.data.exists():
        project.data.rename(project.staging / "old")
    progress("swap", 1, 2)
    new.rename(project.data)
    progress("swap", 2, 2)


def _link(path: str, target: str) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:  # this file system may have no hard links
        shutil.copy2(path, target, follow_symlinks=False)


def fetch_data(project: Project, pipeline: "Pipeline", progress: Progress = silent) -> str:
    """Check out, pull or render the photos that `data.dvc` names, unless `data/` was edited."""
    restore_data(project)
    if pipeline.data_state() in ("clean", "edited"):
        return "data/ is in place."
    version = pipeline.data_version()
    if version is None:
        raise DataError(
            "There are no photos yet. Run `handsigns import FOLDER` for your own, or "
            "`handsigns sample` to render an example set."
        )
    if pipeline.checkout_data():
        return f"data/ {version} was checked out from the local DVC cache."
    rendered = pipeline.data_source() == "sample"
    if pipeline.remote_url():
        try:
            pipeline.pull_data()
            return f"data/ {version} was pulled from the DVC remote."
        except ServiceError:
            if not rendered:
                raise
    if not rendered:
        raise DataError(
            f"Photos of version {version} are not in the local DVC cache, and no DVC remote is "
            "set. Set HANDSIGNS_DVC_REMOTE_URL to where they were pushed, or import them again."
        )
    return render(project, pipeline, progress)


def render(project: Project, pipeline: "Pipeline", progress: Progress = silent) -> str:
    """Render the sample set into `data/` and version it; returns what was done."""
    from tasks.synthetic import SIGNS, render_sample

    labels = load_params(project.params).labels
    if labels != SIGNS:
        raise DataError(
            f"The sample set shows the signs 0 to 5, and labels in params.yaml are "
            f"{list_labels(labels)}. Import your own photos with `handsigns import`."
        )
    with data_lock(project):
        render_sample(project.data, progress)
        version = pipeline.version_data("sample")
    return f"The sample set was rendered: data/ {version}."

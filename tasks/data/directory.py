"""The data directory: its lock, atomic changes, and its photos from DVC."""

import errno
import logging
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from tasks.errors import BusyError, DataError, ServiceError
from tasks.params import LABELS
from tasks.project import FOLDERS, Project
from tasks.stage import Progress, silent

if TYPE_CHECKING:
    from tasks.services.dvc import Pipeline

WAIT = 600.0
"""Seconds to wait for the data lock."""

Place = tuple[str, str]
"""Split and label."""

_NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
_locked: ContextVar[frozenset[Path]] = ContextVar("locked", default=frozenset())
_log = logging.getLogger(__name__)


@contextmanager
def data_lock(project: Project, wait: float | None = None) -> Iterator[None]:
    """Hold the lock of imports, and of retrains while they need one version of `data/`.

    Re-entrant in one context. The kernel releases it if the process dies.

    Raises:
        BusyError: another process holds it for more than `wait` seconds.
    """
    wait = WAIT if wait is None else wait
    if project.data_lock in _locked.get():
        yield
        return
    with file_errors(project.local):
        project.local.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(project.data_lock)
        try:
            lock.acquire(timeout=min(wait, 0.5))
        except Timeout:
            _log.warning("A retrain or an import uses data/. Waiting up to %g s for it.", wait)
            try:
                lock.acquire(timeout=wait)
            except Timeout as error:
                raise BusyError(
                    f"data/ is in use: a retrain or another import has held '{lock.lock_file}' "
                    f"for more than {wait:g} seconds. Try again when it has ended."
                ) from error
    token = _locked.set(_locked.get() | {project.data_lock})
    try:
        yield
    finally:
        _locked.reset(token)
        lock.release()


def stored_photos(project: Project) -> dict[str, Place]:
    """Split and label of each file name in `data/`."""
    found: dict[str, Place] = {}
    for split in FOLDERS:
        for label in LABELS:
            folder = project.data / split / label
            if folder.is_dir():
                found.update((entry.name, (split, label)) for entry in os.scandir(folder))
    return found


def restore_data(project: Project) -> None:
    """Put `data/` back if an import was killed between its two renames."""
    if _is_torn(project):
        with data_lock(project):
            _put_back(project)


@contextmanager
def staging(project: Project) -> Iterator[Path]:
    """Yield an empty folder on the file system of `data/`; the caller holds the data lock."""
    _put_back(project)
    with file_errors(project.staging):
        shutil.rmtree(project.staging, ignore_errors=True)
        project.staging.mkdir(parents=True, exist_ok=True)
    try:
        yield project.staging
    finally:
        _put_back(project)
        shutil.rmtree(project.staging, ignore_errors=True)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `DataError`."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        raise DataError(
            f"Import failed at '{error.filename or path}' ({error.strerror}, {code}). Make room "
            "or give permission and import again; data/ is unchanged."
        ) from error


def link_photos(project: Project, keep: Container[str] | None, progress: Progress) -> Path:
    """Hard-link `data/`, or only the paths to keep, into a new folder in staging."""
    new = project.staging / "new"
    new.mkdir()
    for parent, folders, files in os.walk(project.data):
        below = os.path.relpath(parent, project.data)
        links = [name for name in folders if Path(parent, name).is_symlink()]
        names = [n for n in [*files, *links] if keep is None or f"{below}/{n}" in keep]
        if names:
            (new / below).mkdir(parents=True, exist_ok=True)
        for done, name in enumerate(names, start=1):
            _link(f"{parent}/{name}", f"{new}/{below}/{name}")
            progress("keep", done, len(names))
    return new


def replace_data(project: Project, new: Path, progress: Progress) -> None:
    """Rename `new` to `data/`; what was there is removed with the staging folder."""
    # Content must reach the disk before names do, for the case of a power failure.
    os.sync()
    progress("swap", 0, 2)
    if project.data.exists():
        project.data.rename(_old(project))
    progress("swap", 1, 2)
    new.rename(project.data)
    progress("swap", 2, 2)


def _is_torn(project: Project) -> bool:
    return _old(project).exists() and not project.data.exists()


def _put_back(project: Project) -> None:
    if _is_torn(project):
        with file_errors(project.data):
            _old(project).rename(project.data)


def _old(project: Project) -> Path:
    return project.staging / "old"


def _link(path: str, target: str) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        shutil.copy2(path, target, follow_symlinks=False)


def fetch_data(project: Project, pipeline: "Pipeline", progress: Progress = silent) -> str:
    """Check out, pull or render the photos that `data.dvc` names, unless `data/` was edited.

    Raises:
        DataError: the version is neither in the cache nor in a remote.
        ServiceError: the remote does not answer.
    """
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
    if pipeline.has_remote():
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
    from tasks.rendering.sample import render_sample

    expected = pipeline.data_version() if pipeline.data_source() == "sample" else None
    with data_lock(project):
        render_sample(project.data, progress)
        version = pipeline.version_data("sample")
    if expected in (None, version):
        return f"The sample set was rendered: data/ {version}."
    return (
        f"The sample set was rendered, but this machine's arithmetic gave other bytes: "
        f"data/ {version} instead of {expected}. It is versioned as such."
    )

"""The data directory: its lock, atomic changes, its photos from DVC, and the quarantine."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from tasks.errors import BusyError, DataError, ServiceError
from tasks.io import atomic_write, write_json
from tasks.params import list_labels, load_params
from tasks.project import FOLDERS, Project
from tasks.stage import Progress, silent

if TYPE_CHECKING:
    from tasks.services.dvc import Pipeline

WAIT = 600.0
"""Seconds to wait for the data lock."""
MAX_COPIES = 2**30
"""Bytes that one import may copy into the quarantine; beyond it files are only listed."""

Place = tuple[str, str]
"""Split and label."""

_log = logging.getLogger(__name__)


@contextmanager
def data_lock(project: Project, wait: float | None = None) -> Iterator[None]:
    """Hold the lock of imports, and of retrains while they need one version of `data/`.

    Re-entrant in one process. The kernel releases it if the process dies.
    """
    wait = WAIT if wait is None else wait
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
    """Turn an error of the file system into a `DataError`."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0)
        reason = f"{error.strerror}, {code}" if code else error
        raise DataError(
            f"Import failed at '{error.filename or path}' ({reason}). Make room or give "
            "permission and import again; data/ is unchanged."
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
    """Yield an empty folder on the file system of `data/`; the caller holds the data lock."""
    restore_data(project)
    with file_errors(project.staging):
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
    project: Project,
    incoming: Path,
    accepted: Mapping[str, Place],
    replace: bool,
    progress: Progress,
) -> None:
    """Build the next `data/` in staging, of hard links to the present one, and swap the two.

    Args:
        incoming: folder of the accepted photos that `data/` does not have.
        replace: leave out all photos that are not accepted.
    """
    new = project.staging / "new"
    with file_errors(project.data):
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
    from tasks.rendering.sample import SIGNS, render_sample

    labels = load_params(project.params).labels
    if labels != SIGNS:
        raise DataError(
            f"The sample set shows the signs 0 to 5, and labels in params.yaml are "
            f"{list_labels(labels)}. Import your own photos with `handsigns import`."
        )
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


@dataclass(frozen=True)
class QuarantinedFile:
    """A file that was not imported: its path in the source, and `kind: detail`.

    `copy` is its path below `artifacts/quarantine/`, if it was copied.
    """

    origin: str
    reason: str
    copy: str | None = None

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]


class Quarantine:
    """Copies of the files that were not imported, by kind, and a list with their reasons."""

    def __init__(self, project: Project) -> None:
        self._folder = project.quarantine
        self._list = project.quarantine / "quarantine.json"
        self._room = MAX_COPIES

    def add(self, origin: str, reason: str, content: bytes) -> QuarantinedFile:
        """Copy one file, if it could be read."""
        file = QuarantinedFile(origin, reason)
        if not content or len(content) > self._room:
            return file
        self._room -= len(content)
        digest = hashlib.sha256(content).hexdigest()[:12]
        copy = f"{_safe_name(file.kind)}/{digest}-{_safe_name(origin.split('/')[-1])}"
        path = self._folder / copy
        with file_errors(path):
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
        return QuarantinedFile(origin, reason, copy)

    def listed(self) -> dict[str, list[QuarantinedFile]]:
        """The files by source; empty if the list cannot be read."""
        try:
            sources = json.loads(self._list.read_text(encoding="utf-8"))["sources"]
            return {
                str(name): [QuarantinedFile(**file) for file in files]
                for name, files in sources.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def update(
        self,
        source: str,
        files: Sequence[QuarantinedFile],
        only: bool,
        unchanged: Container[str] = (),
    ) -> None:
        """Replace the entries of a source, and remove copies that are no longer listed.

        Entries of `unchanged` origins stay. With `only`, other sources are forgotten.
        """
        before = self.listed()
        kept = [file for file in before.get(source, []) if file.origin in unchanged]
        after = {**({} if only else before), source: [*kept, *files]}
        after = {name: listed for name, listed in after.items() if listed}
        if after == before:
            return
        listed = {name: [asdict(file) for file in files] for name, files in after.items()}
        copies = {file.copy for files in after.values() for file in files}
        with file_errors(self._folder):
            write_json(self._list, {"sources": listed})
            for file in (file for files in before.values() for file in files):
                if file.copy and file.copy not in copies:
                    (self._folder / file.copy).unlink(missing_ok=True)


def _safe_name(name: str) -> str:
    """Letters, digits, dot, dash and underscore; never hidden, never a parent folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:].lstrip(".") or "_"

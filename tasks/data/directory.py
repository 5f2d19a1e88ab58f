"""Change `data/` atomically; quarantine what cannot be used."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.errors import BusyError, DataError
from tasks.io import atomic_write, write_json
from tasks.params import LABELS
from tasks.project import FOLDERS, Project
from tasks.stage import Progress

Place = tuple[str, str]
"""Split and label."""

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


def held_photos(project: Project) -> dict[str, Place]:
    """Index what `data/` holds.

    Args:
        project: the checkout.

    Returns:
        Each file name below `data/<split>/<label>/` with its place.
    """
    held: dict[str, Place] = {}
    for split in FOLDERS:
        for label in LABELS:
            folder = project.data / split / label
            if folder.is_dir():
                held.update((entry.name, (split, label)) for entry in os.scandir(folder))
    return held


def recover(project: Project, wait: float = 60.0) -> None:
    """Put `data/` back if an import was killed while it replaced the folder.

    Cheap where nothing is to be done; anybody who reads `data/` may call it.

    Args:
        project: the checkout.
        wait: seconds to wait for an import that is running.

    Raises:
        BusyError: an import runs for longer than that.
        DataError: the folder cannot be put back.
    """
    if _is_torn(project):
        with locked(project, wait):
            mend(project)


def mend(project: Project) -> None:
    """Do what `recover` does; the caller holds the lock."""
    if _is_torn(project):
        with writing(project.data):
            _old(project).rename(project.data)


@contextmanager
def locked(project: Project, wait: float) -> Iterator[None]:
    """Hold the right to change `data/`; a killed holder's right ends with it."""
    with writing(project.local):
        project.local.mkdir(parents=True, exist_ok=True)
        lock = FileLock(project.local / "intake.lock", timeout=wait)
        try:
            lock.acquire()
        except Timeout as error:
            raise BusyError(
                f"Another import is running. Received: no turn within {wait:g} seconds "
                f"('{lock.lock_file}'). Wait until it has ended."
            ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def workshop(project: Project) -> Iterator[Path]:
    """Give an empty folder on `data/`'s file system; it goes whatever happens."""
    with writing(project.intake):
        shutil.rmtree(project.intake, ignore_errors=True)
        project.intake.mkdir(parents=True, exist_ok=True)
    try:
        yield project.intake
    finally:
        mend(project)
        shutil.rmtree(project.intake, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the file system into one line that names path and fault."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        code = errno.errorcode.get(error.errno or 0, "unknown")
        raise DataError(
            f"Import cannot go on ({error.strerror}, {code}). Received: '{where}'. "
            "Make room or give permission and import again; the data held is untouched."
        ) from error


def build(project: Project, keep: set[str] | None, progress: Progress) -> Path:
    """Link what is held into a new folder beside `data/`.

    Args:
        project: the checkout.
        keep: paths below `data/` to keep, and nothing else; None keeps every file.
        progress: told about each file.

    Returns:
        The new folder.
    """
    new = project.intake / "new"
    new.mkdir()
    for folder, names in _folders(project.data, keep).items():
        target = new / folder
        target.mkdir(parents=True, exist_ok=True)
        # Plain strings: this runs for every photo held.
        before, after = str(project.data / folder), str(target)
        for done, name in enumerate(names, start=1):
            _link(f"{before}/{name}", f"{after}/{name}")
            progress("keep", done, len(names))
    return new


def swap(project: Project, new: Path, progress: Progress) -> None:
    """Put `new` in the place of `data/`; what was there goes afterwards."""
    # New files first, or a power failure could leave names without content.
    os.sync()
    progress("swap", 0, 2)
    if project.data.exists():
        project.data.rename(_old(project))
    progress("swap", 1, 2)
    new.rename(project.data)
    progress("swap", 2, 2)


def _is_torn(project: Project) -> bool:
    return _old(project).exists() and not project.data.exists()


def _old(project: Project) -> Path:
    return project.intake / "old"


def _folders(data: Path, keep: set[str] | None) -> dict[str, list[str]]:
    """Each folder below `data/` with the names of the files and links to keep in it."""
    found = {}
    for parent, folders, files in os.walk(data):
        below = Path(parent).relative_to(data).as_posix()
        links = [name for name in folders if Path(parent, name).is_symlink()]
        names = [name for name in [*files, *links] if keep is None or f"{below}/{name}" in keep]
        if names:
            found[below] = sorted(names)
    return found


def _link(path: str, target: str) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(path, target, follow_symlinks=False)


MAX_COPIES = 2**30
"""Bytes of copies that one import may leave; beyond it files are listed only."""


@dataclass(frozen=True)
class SetAside:
    """One file that was not taken.

    Args:
        origin: where it was in the source.
        reason: `kind: detail`.
        copy: path below `artifacts/quarantine/`; None where none was made.
    """

    origin: str
    reason: str
    copy: str | None = None

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]

    def to_json(self) -> dict[str, str | None]:
        return {"origin": self.origin, "reason": self.reason, "copy": self.copy}


class Quarantine:
    """Where one import puts what it sets aside.

    Copies are named by content below a folder named by the kind of fault, so that the
    same import twice leaves the same files.

    Args:
        project: the checkout.
    """

    def __init__(self, project: Project) -> None:
        self._folder = project.quarantine
        self._project = project
        self._room = MAX_COPIES

    def keep(self, origin: str, reason: str, content: bytes | None) -> SetAside:
        """Copy one file and give its entry; nothing is copied of what could not be read."""
        aside = SetAside(origin, reason)
        if not content or len(content) > self._room:
            return aside
        self._room -= len(content)
        digest = hashlib.sha256(content).hexdigest()[:12]
        copy = f"{_plain(aside.kind)}/{digest}-{_plain(origin.split('/')[-1])}"
        path = self._folder / copy
        with writing(path):
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
        return SetAside(origin, reason, copy)

    def finish(
        self,
        source: str,
        aside: Sequence[SetAside],
        forget: bool,
        standing: Container[str] = (),
    ) -> None:
        """List this import's files in place of what the same source had set aside before.

        Args:
            source: what the list calls the source.
            aside: its files.
            forget: drop what other sources had set aside, too.
            standing: origins of this source that were not read again; what was said of
                them still holds.
        """
        # Of a list that cannot be read nobody knows which copies are somebody's.
        listed = _listed(self._project)
        known = listed is not None or not _list(self._project).exists()
        earlier = listed or {}
        sources = {} if forget else dict(earlier)
        files = [each for each in earlier.get(source, []) if each["origin"] in standing]
        sources[source] = files + [each.to_json() for each in aside]
        if not sources[source]:
            del sources[source]
        with writing(self._folder):
            if sources or self._folder.exists():
                if not known:
                    _list(self._project).replace(_spoilt(self._project))
                write_json(_list(self._project), {"sources": sources})
                if not _spoilt(self._project).exists():
                    self._prune({each["copy"] for files in sources.values() for each in files})

    def _prune(self, listed: set[str | None]) -> None:
        for path in sorted(self._folder.glob("*/*")):
            if path.is_file() and path.relative_to(self._folder).as_posix() not in listed:
                path.unlink()


def set_aside(project: Project) -> dict[str, list[dict[str, Any]]]:
    """Files that are listed, by source; none where the list cannot be read."""
    return _listed(project) or {}


def _listed(project: Project) -> dict[str, list[dict[str, Any]]] | None:
    try:
        sources = json.loads(_list(project).read_text(encoding="utf-8"))["sources"]
        return {
            str(name): [SetAside(**each).to_json() for each in files]
            for name, files in sources.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _list(project: Project) -> Path:
    return project.quarantine / "quarantine.json"


def _spoilt(project: Project) -> Path:
    """A list that could not be read; while it lies there, no copy goes."""
    return project.quarantine / "quarantine.json.spoilt"


def _plain(name: str) -> str:
    """Letters, digits, dot, dash and underscore; never hidden, never a parent."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:].lstrip(".") or "_"

"""The photos held in `data/`, and how that folder is replaced whole.

The next state is built in `.local/intake/new`: what is held is linked, never copied or
touched (DVC may share these files with its cache), new photos are moved in. Two renames
then put it in place. Killed between the two, `data/` is missing and the former one lies
in `.local/intake/old`; `recover` puts it back. Swapping both in one call would need
renameat2, which neither every file system nor every system has, and so this too.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.errors import BusyError, DataError
from tasks.labels import LABELS
from tasks.layout import FOLDERS, Layout
from tasks.progress import Progress

Place = tuple[str, str]
"""Split and label."""

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


def held_photos(layout: Layout) -> dict[str, Place]:
    """Index what `data/` holds.

    Args:
        layout: the checkout.

    Returns:
        Each file name below `data/<split>/<label>/` with its place.
    """
    held: dict[str, Place] = {}
    for split in FOLDERS:
        for label in LABELS:
            folder = layout.data / split / label
            if folder.is_dir():
                held.update((entry.name, (split, label)) for entry in os.scandir(folder))
    return held


def recover(layout: Layout, wait: float = 60.0) -> None:
    """Put `data/` back if an import was killed while it replaced the folder.

    Cheap where nothing is to be done; anybody who reads `data/` may call it.

    Args:
        layout: the checkout.
        wait: seconds to wait for an import that is running.

    Raises:
        BusyError: an import runs for longer than that.
        DataError: the folder cannot be put back.
    """
    if _is_torn(layout):
        with locked(layout, wait):
            mend(layout)


def mend(layout: Layout) -> None:
    """Do what `recover` does; the caller holds the lock."""
    if _is_torn(layout):
        with writing(layout.data):
            _old(layout).rename(layout.data)


@contextmanager
def locked(layout: Layout, wait: float) -> Iterator[None]:
    """Hold the right to change `data/`; a killed holder's right ends with it."""
    with writing(layout.local):
        layout.local.mkdir(parents=True, exist_ok=True)
        lock = FileLock(layout.local / "intake.lock", timeout=wait)
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
def workshop(layout: Layout) -> Iterator[Path]:
    """Give an empty folder on `data/`'s file system; it goes whatever happens."""
    with writing(layout.intake):
        shutil.rmtree(layout.intake, ignore_errors=True)
        layout.intake.mkdir(parents=True, exist_ok=True)
    try:
        yield layout.intake
    finally:
        mend(layout)
        shutil.rmtree(layout.intake, ignore_errors=True)


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


def build(layout: Layout, keep: set[str] | None, progress: Progress) -> Path:
    """Link what is held into a new folder beside `data/`.

    Args:
        layout: the checkout.
        keep: paths below `data/` to keep, and nothing else; None keeps every file.
        progress: told about each file.

    Returns:
        The new folder.
    """
    new = layout.intake / "new"
    new.mkdir()
    for folder, names in _folders(layout.data, keep).items():
        target = new / folder
        target.mkdir(parents=True, exist_ok=True)
        # Plain strings: this runs for every photo held.
        before, after = str(layout.data / folder), str(target)
        for done, name in enumerate(names, start=1):
            _link(f"{before}/{name}", f"{after}/{name}")
            progress("keep", done, len(names))
    return new


def swap(layout: Layout, new: Path, progress: Progress) -> None:
    """Put `new` in the place of `data/`; what was there goes afterwards."""
    # New files first, or a power failure could leave names without content.
    os.sync()
    progress("swap", 0, 2)
    if layout.data.exists():
        layout.data.rename(_old(layout))
    progress("swap", 1, 2)
    new.rename(layout.data)
    progress("swap", 2, 2)


def _is_torn(layout: Layout) -> bool:
    return _old(layout).exists() and not layout.data.exists()


def _old(layout: Layout) -> Path:
    return layout.intake / "old"


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

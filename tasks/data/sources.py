"""Where photos are imported from."""

import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tasks.data.directory import locked, recover
from tasks.data.folders import Item, Source, arrange, folder_entries, zip_entries
from tasks.data.h5 import h5_items
from tasks.data.images import printable
from tasks.errors import DataError, ServiceError, SourceError
from tasks.project import FOLDERS, Project
from tasks.services.dvc import Pipeline
from tasks.stage import Progress, silent

_H5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ZIP_SIGNATURE = b"PK\x03\x04"


@contextmanager
def open_source(path: Path, spool: Path) -> Iterator[Source]:
    """Recognise a source by what it holds, check it as a whole and list its photos.

    Args:
        path: a folder of class folders, a .zip of one, an .h5 file, or a folder with
            .h5 files and no class folder beside them.
        spool: a folder on this machine where arrays are unpacked.

    Yields:
        The source; its items can be read until the context ends.

    Raises:
        SourceError: it is missing, empty, unreadable or not to be trusted.
    """
    with ExitStack() as stack:
        try:
            source = _recognise(path, spool, stack)
        except FileNotFoundError as error:
            raise _refused("does not exist", path, "Check the path") from error
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or printable(str(error))
            raise _refused(f"cannot be read ({fault})", path, "Check its permission") from error
        name = printable(path.resolve().name)
        items = (replace(item, origin=f"{name}/{item.origin}") for item in source.items)
        yield replace(source, items=tuple(items))


def _recognise(path: Path, spool: Path, stack: ExitStack) -> Source:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _from_folder(path, spool)
    # Nothing but a regular file is opened: opening a pipe would wait for its writer.
    start = _start(path) if stat.S_ISREG(mode) else b""
    if start == _H5_SIGNATURE:
        spool.joinpath("h5").mkdir()
        return Source(tuple(h5_items(path, spool / "h5")))
    if start and (start.startswith(_ZIP_SIGNATURE) or path.suffix.lower() == ".zip"):
        return arrange(stack.enter_context(zip_entries(path)), str(path))
    raise _refused("is neither a folder nor a .zip nor an .h5 file", path, "Name one of these")


def _refused(fault: str, path: Path, advice: str) -> SourceError:
    return SourceError(f"Source {fault}. Received: '{printable(str(path))}'. {advice}.")


def as_test(source: Source, path: Path) -> Source:
    """Make a source that was named as the test set one."""
    if {item.split for item in source.items} == set(FOLDERS):
        raise _refused("for the test has a train set too", path, "Name its test part alone")
    return replace(source, items=tuple(replace(item, split="test") for item in source.items))


def _from_folder(path: Path, spool: Path) -> Source:
    entries = folder_entries(path)
    top = [entry.parts[0] for entry in entries if len(entry.parts) == 1 and not entry.fault]
    files = sorted(name for name in top if name.endswith(".h5") and not name.startswith("."))
    if files and all(len(entry.parts) == 1 for entry in entries):
        return Source(tuple(_h5_in_folder(path, files, spool)))
    return arrange(entries, str(path))


def _h5_in_folder(path: Path, files: list[str], spool: Path) -> Iterator[Item]:
    for number, name in enumerate(files):
        folder = spool / f"h5-{number}"
        folder.mkdir()
        for item in h5_items(path / name, folder):
            yield replace(item, origin=f"{printable(name)}/{item.origin}")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_H5_SIGNATURE))


WAIT = 60.0
"""Longest wait in seconds for an import that is running."""


def fetch_data(project: Project, pipeline: Pipeline, progress: Progress = silent) -> str:
    """Lay out the photos that `data.dvc` names, unless somebody changed `data/`.

    Args:
        project: the checkout.
        pipeline: its pipeline, which knows the version and the remote.
        progress: told how far rendering is.

    Returns:
        What was done, in words for the log.

    Raises:
        DataError: the version is nowhere to be had.
        ServiceError: there is a remote, and it does not answer.
        BusyError: an import runs for too long.
    """
    recover(project)
    if pipeline.data_state() in ("clean", "edited"):
        return "data/ is in place."
    version = pipeline.data_version()
    if version is None:
        raise DataError(
            "There are no photos yet. Run `handsigns import FOLDER` to bring in yours, "
            "or `handsigns sample` to render an example set."
        )
    if pipeline.checkout_data():
        return f"data/ {version} was laid out from the local DVC cache."
    pulled = _pull(pipeline, version)
    if pulled:
        return pulled
    if pipeline.data_source() != "sample":
        raise DataError(
            f"Photos of version {version} are not in the local DVC cache, and no DVC remote is "
            "set. Set HANDSIGNS_DVC_REMOTE_URL to where they were pushed, or import them again."
        )
    return render(project, pipeline, progress)


def render(project: Project, pipeline: Pipeline, progress: Progress = silent) -> str:
    """Render the sample set into `data/` and version it; what was done, in words."""
    from tasks.rendering.sample import render_sample

    expected = pipeline.data_version() if pipeline.data_source() == "sample" else None
    with locked(project, WAIT):
        render_sample(project.data, progress)
    version = pipeline.version_data("sample")
    if expected in (None, version):
        return f"The sample set was rendered: data/ {version}."
    return (
        f"The sample set was rendered, but this machine's arithmetic gave other bytes: "
        f"data/ {version} instead of {expected}. It is versioned as such."
    )


def _pull(pipeline: Pipeline, version: str) -> str | None:
    if not pipeline.has_remote():
        return None
    try:
        pipeline.pull_data()
    except ServiceError:
        if pipeline.data_source() != "sample":
            raise
        return None
    return f"data/ {version} was pulled from the DVC remote."

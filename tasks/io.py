"""JSON files, and atomic file and directory writes."""

import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PART = ".part"
STALE_SECONDS = 86_400  # without a change: a temporary folder of a killed process


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with sorted keys; `ValueError` if it has NaN or infinity."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path`, be it a link into DVC's cache, on success."""
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        temporary.replace(path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that replaces `path` on success."""
    with _temporary_folder(path) as folder:
        temporary = folder / "new"
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(folder / "old")
        temporary.rename(path)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Once per parent folder: a scan for each file would take quadratic time.
@functools.lru_cache(maxsize=1024)
def _remove_stale(parent: Path) -> None:
    """Remove what killed processes left, which may be large."""
    for left in parent.glob(f".*{PART}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)

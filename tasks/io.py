"""Outputs that appear whole or not at all."""

import glob
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
STALE_SECONDS = 86_400
"""After this long without a change nobody writes to a folder any more."""


def write_json(path: Path, content: Any) -> None:
    """Write `content` with sorted keys; the same content gives the same bytes.

    Args:
        path: the file, replaced in one move. A read-only link that DVC put there is
            replaced too, never written through.
        content: what `json.dumps` takes; NaN and infinity are refused.
    """
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Content of a JSON file; None where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path with `path`'s suffix; on success it becomes `path`.

    Args:
        path: the file to appear.

    Yields:
        A path in a fresh folder beside `path`, removed whatever happens.
    """
    with _beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        temporary.replace(path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; on success it becomes `path`.

    What was at `path` before stays until the new folder is complete, then goes.

    Args:
        path: the folder to appear.

    Yields:
        An empty folder beside `path`.
    """
    with _beside(path) as folder:
        temporary = folder / "new"
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(folder / "old")
        temporary.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what a killed writer of the same path left, which may be large."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PART}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)

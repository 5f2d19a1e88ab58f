"""The service that `handsigns up` left running in a checkout: where each part answers.

`.local/service.json` names the addresses, no secrets. It counts for as long as the
process runner holds `.local/service.lock`: the kernel lets go of that however it ends.
"""

import fcntl
import os
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tasks.whole import write_json

FILE = "service.json"
LOCK = "service.lock"


class Running(BaseModel):
    """Addresses of a running service.

    Args:
        pid: the process runner.
        s3: endpoint of the local S3 server; None where the environment names another.
        mlflow: tracking URI of the local MLflow server, or None as before.
        prefect: URL of the local Prefect API, or None as before.
        database: PostgreSQL's address without user and password; None with SQLite.
    """

    pid: int
    s3: str | None = None
    mlflow: str | None = None
    prefect: str | None = None
    database: str | None = None


def find_running(folder: Path) -> Running | None:
    """Return the service that runs in a checkout, or None.

    Args:
        folder: the checkout's `.local/`.
    """
    file = folder / FILE
    if not file.is_file() or not is_held(folder):
        return None
    try:
        return Running.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def keep_running(folder: Path, running: Running) -> None:
    """Write what `find_running` reads, for its owner alone."""
    write_json(folder / FILE, running.model_dump())
    (folder / FILE).chmod(0o600)


def hold(folder: Path) -> int | None:
    """Take the service's lock.

    Returns:
        A descriptor that holds it, to be handed to the process runner; None where
        another one has it.
    """
    descriptor = _open(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_held(folder: Path) -> bool:
    """Tell whether a process runner is there."""
    descriptor = _open(folder)
    try:
        # Shared, so that two who look at once do not take each other for it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

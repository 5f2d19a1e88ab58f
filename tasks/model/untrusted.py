"""Model files from unknown sources, checked in a sandbox before they are loaded."""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from tasks.errors import ModelError

MAX_FILE = 256 << 20
MEMORY = 4 << 30
SECONDS = 60
_REFUSED = 3
"""Exit code of a child process that refuses its file; its last line says why."""
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


def check_graph(path: Path, size: int) -> None:
    """Run a `.pb` file once in a process with limited memory and time, without secrets.

    Args:
        size: side in pixels of the photos that it must take.

    Raises:
        ModelError: the file is missing or rejected.
    """
    if path.suffix != ".pb":
        raise _rejected(path, "is not a .pb file")
    if not path.is_file():
        raise _rejected(path, "does not exist")
    if path.stat().st_size > MAX_FILE:
        raise _rejected(path, f"is larger than {MAX_FILE >> 20} MiB")
    try:
        child = run_confined("tasks.model.untrusted", str(path.resolve()), str(size))
    except subprocess.TimeoutExpired:
        raise _rejected(path, f"takes more than {SECONDS} s to run") from None
    if child.returncode == _REFUSED:
        # OpenVINO may have written lines of its own before.
        raise _rejected(path, child.stderr.decode(errors="replace").strip().splitlines()[-1])
    if child.returncode:
        code = child.returncode
        raise _rejected(
            path,
            f"is damaged, or needs more than {MEMORY >> 30} GiB (its reader exited with {code})",
        )


def run_confined(module: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m module` without secrets in its environment."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return subprocess.run(  # noqa: S603, our own interpreter and module
        [sys.executable, "-P", "-m", module, *arguments],
        env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        timeout=SECONDS,
    )


def confine(memory: int, seconds: int, file_size: int) -> None:
    """Limit this process: bytes of memory, seconds of CPU time, bytes of each file."""
    for kind, wanted in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_size),
    ):
        present, _ = resource.getrlimit(kind)
        limit = wanted if present == resource.RLIM_INFINITY else min(wanted, present)
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def refuse(reason: str) -> None:
    """Exit as a child process that refuses its file."""
    print(" ".join(reason.split())[:300], file=sys.stderr)
    sys.exit(_REFUSED)


def _rejected(path: Path, fault: str) -> ModelError:
    return ModelError(
        f"Model file '{path}' {fault}. Name a .pb file that the assemble stage wrote, or a release."
    )


def _main(path: Path, size: int) -> None:
    from tasks.model.inference import Engine

    confine(MEMORY, SECONDS, MAX_FILE)
    try:
        engine = Engine(path, cores=1)
        if engine.size != size:
            refuse(f"takes photos of {engine.size} pixels, not of {size}")
        if not np.isfinite(engine(np.full((size, size, 3), 128, np.uint8))).all():
            refuse("holds numbers that are not finite")
    except MemoryError:
        refuse(f"needs more than {MEMORY >> 30} GiB")
    except ModelError as error:
        reason = str(error).partition("does not hold a graph for photos (")[2].rpartition(").")[0]
        refuse(f"does not hold a graph for photos ({reason})")
    except Exception as error:  # a damaged file raises anything
        refuse(f"is damaged ({' '.join(str(error).split())[:160]})")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))

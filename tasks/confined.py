"""A module of ours as a child with limits, for files that anybody may have made.

Libraries that parse such files in C may crash, hang or exhaust the process that opens them.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

REFUSED = 3
"""Exit code of a child that says in its last line what is wrong with the file."""

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


def run_confined(
    module: str, arguments: list[str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m module` on a file, without the secrets of our environment.

    Args:
        module: calls `confine` before it opens the file.
        arguments: for it.
        seconds: longest wait.

    Returns:
        How the child ended, and what it said.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # HDF5 would else load whatever plug-ins its search path names.
    environment |= {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "HDF5_PLUGIN_PATH": "::",
    }
    return subprocess.run(  # noqa: S603, our own interpreter and module
        [sys.executable, "-P", "-m", module, *arguments],
        env=environment,
        capture_output=True,
        timeout=seconds,
    )


def confine(memory: int, seconds: int, file_size: int) -> None:
    """Limit this process further, where the system has such limits.

    Args:
        memory: bytes of address space.
        seconds: of processor time.
        file_size: bytes of any one file that it writes.
    """
    import resource

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
    """End this process as one that refuses its file; one line says why."""
    print(" ".join(reason.split())[:300], file=sys.stderr)
    sys.exit(REFUSED)

"""The bill of materials of a release: every package that it was made with, and its digests."""

import os
import subprocess
import sys
from pathlib import Path

from tasks.errors import StageError
from tasks.whole import whole_file

SECONDS = 120


def write_bill(lock: Path, project: Path, target: Path) -> None:
    """Write a CycloneDX bill of materials of a locked environment.

    It holds no time and no serial number, so the same lock gives the same bytes, and the
    release's id stays derived from what is in it.

    Args:
        lock: `requirements.lock`, with hashes.
        project: `pyproject.toml`, which names the root component.
        target: the file to appear, JSON.

    Raises:
        StageError: the lock cannot be read as one.
    """
    command = [sys.executable, "-P", "-m", "cyclonedx_py", "requirements", "--output-reproducible"]
    # What this tool writes is known to be valid, and looking again takes 7 s.
    command += ["--no-validate", "--output-format", "JSON", "--pyproject", str(project)]
    # A date of the build, if one is set, would get into the file.
    left_out = ("SOURCE_DATE_EPOCH", "PYTHONPATH")
    environment = {name: text for name, text in os.environ.items() if name not in left_out}
    with whole_file(target) as temporary:
        command += ["--output-file", str(temporary), str(lock)]
        try:
            subprocess.run(  # noqa: S603, our own interpreter
                command, env=environment, capture_output=True, timeout=SECONDS, check=True
            )
        except subprocess.SubprocessError as error:
            told = (getattr(error, "stderr", None) or b"").decode(errors="replace").split("\n")
            reason = next((line for line in reversed(told) if line.strip()), type(error).__name__)
            raise StageError(
                f"No bill of materials could be made ({reason.strip()[:200]}). "
                f"Received: '{lock}'. Run `make lock`, and look at what it says."
            ) from error

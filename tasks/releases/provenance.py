"""What a release came from: data, code, libraries and processor."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.model.inference import usable_cores
from tasks.releases.pointer import Champion
from tasks.services.git import read_revision

LIBRARIES = (
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "numpy",
    "openvino",
    "opencv-python-headless",
    "pillow",
    "scikit-learn",
    "dvc",
)
"""Those whose arithmetic, decoding or formats a release's bytes come from."""

INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
"""By which libraries choose other kernels, which round differently."""


def release_facts(root: Path, data_version: str, champion: Champion | None) -> dict[str, Any]:
    """Facts of a release's manifest: JSON values that do not change its id.

    Args:
        root: the checkout.
        data_version: DVC's hash of the photos.
        champion: of the storage that the release goes to; the number of its moves orders
            releases, as clocks may be wrong.
    """
    revision = read_revision(root)
    problem = {"git_problem": revision.problem} if revision.problem else {}
    return {
        "data_version": data_version,
        "git_revision": revision.commit,
        "changed": list(revision.changed),
        **problem,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "pointer_moves": len(champion.pointer.moves) if champion else 0,
    }


def environment() -> dict[str, Any]:
    """Name the interpreter, the libraries and the processor of this process.

    Returns:
        `python`, `system`, `libraries` (version by name), `processor`, `cores` and
        `instructions`.
    """
    processor, flags = _processor()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "processor": processor,
        "cores": usable_cores(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """Its name and instructions; where the system does not say, only its kind."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    lines = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    name = fields.get("model name") or platform.machine()
    return name, (fields.get("flags") or fields.get("Features") or "").split()

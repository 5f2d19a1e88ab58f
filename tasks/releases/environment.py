"""What a model was computed with, as far as it can change the last digit of a result."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.network.engine import usable_cores

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


def environment() -> dict[str, Any]:
    """Name the interpreter, the libraries and the processor of this process.

    Returns:
        `python`, `system`, `libraries` (version by name), `processor`,
        `cores` and `instructions`.
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
    """Its name and what it can do; where the system does not tell, only its kind."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    lines = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    name = fields.get("model name") or platform.machine()
    return name, (fields.get("flags") or fields.get("Features") or "").split()

"""What a release came from: code, libraries, processor; and whether a rebuild is the same."""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import StageError
from tasks.io import atomic_write, read_json
from tasks.model.inference import usable_cores
from tasks.project import Project
from tasks.releases.champion import METRICS, Champion
from tasks.services.git import read_revision

# Those whose arithmetic, decoding or formats a release's bytes come from.
LIBRARIES: tuple[str, ...] = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "openvino")
LIBRARIES += ("opencv-python-headless", "pillow", "scikit-learn", "dvc")


def release_facts(root: Path, data_version: str, champion: Champion | None) -> dict[str, Any]:
    """Facts of a release's manifest: JSON values that do not change its id.

    The number of the champion's moves orders releases, as clocks may be wrong.
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
    """Name the interpreter, the libraries and the processor of this process."""
    known = {one.name: one.version for one in distributions()}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {name: known[name] for name in LIBRARIES if name in known},
        "processor": _processor(),
        "cores": usable_cores(),
    }


def _processor() -> str:
    """Its name, by which libraries choose kernels, or its kind where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_bill(lock: Path, project: Path, target: Path) -> None:
    """Write a CycloneDX bill of materials of a lock file; the same lock gives the same bytes."""
    command = [sys.executable, "-P", "-m", "cyclonedx_py", "requirements", "--output-reproducible"]
    # What this tool writes is known to be valid, and looking again takes 7 s.
    command += ["--no-validate", "--output-format", "JSON", "--pyproject", str(project)]
    # A date of the build, if one is set, would get into the file.
    left_out = ("SOURCE_DATE_EPOCH", "PYTHONPATH")
    named = {name: text for name, text in os.environ.items() if name not in left_out}
    with atomic_write(target) as temporary:
        command += ["--output-file", str(temporary), str(lock)]
        done = subprocess.run(command, env=named, capture_output=True, text=True)  # noqa: S603, ours
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason"]
            raise StageError(
                f"No bill of materials could be made of '{lock}' ({said[-1]}). Run `make lock`."
            )


@dataclass(frozen=True)
class RebuildComparison:
    """A release and what was rebuilt from its record, with the first difference and its cause."""

    identical: bool
    difference: str | None
    cause: str | None
    metrics: dict[str, tuple[Any, Any]]
    release: str = ""
    revision: str = ""
    seconds: float = 0.0

    def describe(self) -> str:
        """The verdict in one line."""
        found = f"{self.difference} Likely cause: {self.cause}"
        verdict = "identical." if self.identical else found
        return f"Release {self.release} was rebuilt from {self.revision[:12]}: {verdict}"


def compare_builds(
    release: Path, built: Project, then: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> RebuildComparison:
    """Compare a rebuilt model, and the environment of then and now, with the release's folder."""
    files = {"model.keras": built.model, "model.pb": built.graph}
    files |= {"metrics.json": built.metrics, "gate.json": built.gate}
    same = all((release / name).read_bytes() == path.read_bytes() for name, path in files.items())
    before, after = read_json(release / "metrics.json"), read_json(built.metrics)
    metrics = {name: (before.get(name), after.get(name)) for name in METRICS}
    if same:
        return RebuildComparison(True, None, None, metrics)
    locks = (yaml.safe_load(path.read_bytes()) for path in (release / "dvc.lock", built.lock))
    difference = _first_difference(*(lock["stages"] for lock in locks))
    return RebuildComparison(False, difference, _cause(then, now), metrics)


def _first_difference(released: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> str:
    """What differs first in `dvc.lock`, whose stages come in the order in which they ran."""
    for name, stage in released.items():
        for part in ("params", "deps", "outs"):
            if stage.get(part) != rebuilt.get(name, {}).get(part):
                return f"the {part} of stage {name} differ."
    return "files outside of the pipeline differ."


def _cause(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if not then:
        return "unknown: the release does not say what it was computed with."
    before, after = ({**one, **one.get("libraries", {}), "libraries": ""} for one in (then, now))
    names = sorted(before.keys() | after.keys())
    pairs = [(name, before.get(name, "none"), after.get(name, "none")) for name in names]
    changed = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if changed:
        return f"it was computed with another {', '.join(changed)}."
    return "none that is recorded: libraries and processor are the same."

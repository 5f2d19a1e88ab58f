"""Compare two builds of a model, and find where they part."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import yaml

from tasks.io import read_json
from tasks.project import Project
from tasks.releases.champion import METRICS

PLOTS = "artifacts/plots/"


@dataclass(frozen=True)
class Comparison:
    """A release and what was rebuilt from its record.

    Args:
        identical: Weights and metrics are the same bytes.
        difference: The first thing that differs.
        cause: Its likely cause.
        weights: Largest difference between two weights; None if they cannot be compared.
        metrics: Values in the release and in the rebuilt model, by name.
        release: Id of the release.
        revision: Commit that it was rebuilt from.
    """

    identical: bool
    difference: str | None = None
    cause: str | None = None
    weights: float | None = None
    metrics: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    release: str = ""
    revision: str = ""
    seconds: float = 0.0

    def of(self, release: str, revision: str, seconds: float) -> "Comparison":
        """The same, with what was rebuilt and how long it took."""
        return replace(self, release=release, revision=revision, seconds=round(seconds, 1))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """The verdict in one line."""
        verdict = "identical."
        if not self.identical:
            verdict = f"{self.difference} Likely cause: {self.cause}"
        return f"Release {self.release} was rebuilt from {self.revision[:12]}: {verdict}"


def compare_builds(
    release: Path, built: Project, then: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> Comparison:
    """Compare a rebuilt model with the release's, stage by stage.

    Args:
        release: Folder of the verified release.
        built: Checkout in which every stage ran again.
        then: The environment in which the release was made, if recorded.
        now: The same today.
    """
    files = {"model.keras": built.model, "model.pb": built.graph}
    files |= {"metrics.json": built.metrics, "gate.json": built.gate}
    same = all((release / name).read_bytes() == path.read_bytes() for name, path in files.items())
    before, after = read_json(release / "metrics.json"), read_json(built.metrics)
    metrics = {name: (before.get(name), after.get(name)) for name in METRICS}
    if same:
        return Comparison(True, metrics=metrics, weights=0.0)
    difference, by_code = _first_difference(_lock(release / "dvc.lock"), _lock(built.lock))
    return Comparison(
        False,
        difference,
        by_code or _cause(then, now),
        _largest_difference(release / "model.keras", built.model),
        metrics,
    )


def _lock(path: Path) -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    return stages


def _first_difference(
    released: Mapping[str, Any], rebuilt: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The stage whose results differ although its inputs do not; the cause if `dvc.lock` has it."""
    for name, stage in released.items():
        other = rebuilt.get(name)
        if other is None:
            return f"stage {name} is gone.", "another dvc.yaml than the release's."
        if stage.get("params") != other.get("params"):
            return f"stage {name} has other parameters.", "another params.yaml."
        for path in _differing(stage, other, "deps"):
            if path == "data":
                return "the photos differ.", "they were rendered on other arithmetic, or replaced."
            if not path.startswith("artifacts/"):
                return f"{path} is not what {name} ran.", "code that was not in the commit."
    for name, stage in released.items():
        other = rebuilt[name]
        results = [p for p in _differing(stage, other, "outs") if not p.startswith(PLOTS)]
        if results and not _differing(stage, other, "deps"):
            return f"stage {name} gave another {results[0]} from the same inputs.", None
    return "files outside of the pipeline differ.", None


def _differing(stage: Mapping[str, Any], other: Mapping[str, Any], part: str) -> list[str]:
    """Paths whose digest differs."""
    found = {entry["path"]: entry.get("md5") for entry in other.get(part, ())}
    return [e["path"] for e in stage.get(part, ()) if found.get(e["path"]) != e.get("md5")]


def _cause(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if not then:
        return "unknown: the release does not say what it was computed with."
    before, after = then.get("libraries", {}), now["libraries"]
    changed = [
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        return f"other library versions: {', '.join(changed)}."
    for name, words in (
        ("instructions", "a processor with other instructions"),
        ("processor", "another processor"),
        ("cores", "another number of cores"),
        ("python", "another Python"),
        ("system", "another system"),
    ):
        if then.get(name) != now[name]:
            return f"{words}: {then.get(name)} -> {now[name]}."
    return "none that is recorded: libraries and processor are the same."


def _largest_difference(released: Path, rebuilt: Path) -> float | None:
    """Between the weights of two .keras files; None if their arrays do not match."""
    import numpy as np

    one, two = _arrays(released), _arrays(rebuilt)
    if one.keys() != two.keys() or any(one[name].shape != two[name].shape for name in one):
        return None
    return max(float(np.abs(one[name] - two[name]).max(initial=0.0)) for name in one)


def _arrays(path: Path) -> dict[str, Any]:
    import h5py
    import numpy as np

    found: dict[str, Any] = {}

    def take(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            found[name] = np.asarray(entry, np.float64)

    with ZipFile(path) as archive, h5py.File(BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(take)
    return found

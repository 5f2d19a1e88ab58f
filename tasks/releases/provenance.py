"""What a release says of itself: model card, facts, bill of materials; is a rebuild the same?"""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import joblib
import yaml

from tasks.data.dataset import SYNTHETIC
from tasks.errors import StageError
from tasks.gate import shown
from tasks.io import atomic_write, read_json
from tasks.params import PHASES, list_labels, load_params
from tasks.project import Project
from tasks.releases.champion import METRICS, Champion
from tasks.services.git import read_revision
from tasks.synthetic import SIGNS

# Those whose arithmetic, decoding or formats a release's bytes come from.
LIBRARIES: tuple[str, ...] = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "openvino")
LIBRARIES += ("opencv-python-headless", "pillow", "scikit-learn", "dvc")


def release_facts(root: Path, data_version: str, champion: Champion | None) -> dict[str, Any]:
    """Facts outside of a release's id; moves order releases, as clocks may be wrong."""
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
    known = {one.name: one.version for one in distributions()}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {name: known[name] for name in LIBRARIES if name in known},
        "processor": _processor(),
        "cores": joblib.cpu_count(),
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


Content = Mapping[str, Any]

HANDS = """\
# Hand signs

Reads the digit, 0 to 5, that one hand shows in a photo."""
HANDS_USE = """\
For one upright hand that fills most of the picture, on a plain background, as in the training \
photos. It does not read sign language and does not recognise people."""
OTHERS = """\
# Image classifier

Says which of {count} classes a photo shows: {labels}."""
OTHERS_USE = "For photos like those that it was trained on."
CARD = """\
{about} An EfficientNetB0 with global average pooling and a softmax over {count} classes, as one \
Keras functional model: float32 `(batch, 224, 224, 3)`, RGB in [0, 255], to probabilities \
`(batch, {count})`, in the order of `labels.json`.

Photos are cut to their central square, reduced to {size} x {size} pixels{blur}, and \
enlarged to 224 x 224 before they reach the model. Pixels are not scaled to [0, 1]: the model \
does that itself.

## Intended use and limits

{use} {mirror}

- It always answers with one of its classes, also when a photo shows none of them. A low highest \
probability is the only hint.
- The scores below hold for photos like those it was tested on. Others may score much lower: run \
`handsigns evaluate FOLDER` on your own photos first.
- It must not decide anything that can harm somebody.

## Data

Version `{version}`. {note} Photos that are nearly the same are kept in one split.{synthetic}

{counts}

## Training

Seed {seed}, {seen}, mode `{mode}`.

{phases}

## Evaluation

On {n} test photos that training never saw.

{overall}

{per_class}

## Gate

{verdict}. `gate.json` has every check with its value and limit.

## Licence

Apache-2.0. The backbone starts from EfficientNetB0's ImageNet weights.
"""


def model_card(
    project: Project, counts: Mapping[str, int], data_version: str, data_note: str
) -> str:
    """Write the model card in Markdown; `counts` are photos by split, and `synthetic` hands."""
    metrics, gate = read_json(project.metrics), read_json(project.gate)
    params = load_params(project.params).model_dump()
    labels, mode = params["labels"], params["training"]["mode"]
    blur, hands = params["preprocess"]["blur_sigma"], counts[SYNTHETIC]
    about, use = (HANDS, HANDS_USE) if tuple(labels) == SIGNS else (OTHERS, OTHERS_USE)
    mirror = (
        "Left and right count alike: photos are mirrored at random while training."
        if params["augmentation"]["horizontal_flip"]
        else "Photos are not mirrored while training: the rarer side may be read worse."
    )
    low, high = metrics["accuracy_interval"]
    overall = (
        ("accuracy", f"{shown(metrics['accuracy'])} (95% Wilson: {low:.4f} to {high:.4f})"),
        ("loss (categorical cross-entropy)", metrics["loss"]),
        ("AUC (one against the rest, macro)", metrics["auc"]),
        ("expected calibration error", metrics["ece"]),
    )
    scores = ("label", "precision", "recall", "f1", "support")
    per_class = [[row[name] for name in scores] for row in metrics["per_class"]]
    failed = [check["name"] for check in gate["checks"] if not check["passed"]]
    copies = f"{params['features']['augmented_copies']} augmented copies of each photo"
    return CARD.format(
        about=about.format(count=len(labels), labels=_cell(list_labels(labels))),
        use=use,
        mirror=mirror,
        count=len(labels),
        size=params["preprocess"]["image_size"],
        blur=f", blurred by up to {blur} of them where they were larger" if blur else "",
        version=data_version,
        note=data_note,
        counts=table(("split", "photos"), [(k, n) for k, n in counts.items() if k != SYNTHETIC]),
        synthetic=f" Training also used {hands} synthetic (rendered) hands." if hands else "",
        seed=params["seed"],
        seen="each photo augmented anew in every epoch" if mode == "end_to_end" else copies,
        mode=mode,
        phases=_phases(project, params),
        n=metrics["n"],
        overall=table(("measure", "value"), overall),
        per_class=table(("label", "precision", "recall", "F1", "photos"), per_class),
        verdict="Passed" if gate["passed"] else f"Failed: {', '.join(failed)}",
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what a cell holds cannot break out of it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _phases(project: Project, params: Content) -> str:
    heads = ("phase", "photos", "open layers", "learning rate", "epochs", "val loss", "val acc.")
    rows = []
    for phase in PHASES:
        one, recipe = read_json(project.history(phase)), params["phases"][phase]
        chosen = (one["images"], recipe["trainable_layers"], f"{recipe['learning_rate']:g}")
        reached = (len(one["epochs"]), one["val_loss"], one["val_accuracy"])
        rows.append((phase, *chosen, *reached))
    return table(heads, rows)


def _cell(value: Any) -> str:
    return " ".join(shown(value).replace("|", "\\|").split())

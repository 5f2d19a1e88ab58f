"""Stage: put trained weights into `model.keras`, and `model.pb`, for use without TensorFlow."""

import json
import zipfile
from pathlib import Path
from typing import Any

from tasks.io import atomic_write
from tasks.model.files import BACKBONE_FILE, export_graph, read_phase
from tasks.params import BACKBONE, INPUT_SIZE, PHASES
from tasks.stage import Context


def run(context: Context, item: str | None = None, size: int = INPUT_SIZE) -> None:
    """Write the files from the backbone and the last phase, for an input of `size` pixels."""
    from tasks.model.network import HEAD, build_model, freeze, set_tail

    project, params = context.project, context.params
    weights = read_phase(project, PHASES[-1])
    for name in ("kernel", "bias"):
        weights[f"{HEAD}/{name}"] = weights[f"{HEAD}/{name}"] / params.training.temperature
    model = build_model(
        len(weights[f"{HEAD}/bias"]),
        params.augmentation,
        params.training.dropout,
        size=size,
        backbone_weights=project.weights(BACKBONE) / BACKBONE_FILE,
        seed=params.seed,
    )
    set_tail(model, weights)
    freeze(model, 0)  # so that BatchNorm stays frozen for whoever trains the file further
    save_model(model, project.model)
    with atomic_write(project.graph) as temporary:
        temporary.write_bytes(export_graph(model))
    context.progress("assemble model", 1, 1)


def save_model(model: Any, path: Path) -> None:
    """Save a `.keras` file without the time, memory addresses and zip dates."""
    with atomic_write(path) as temporary:
        raw = temporary.with_name("raw.keras")
        model.save(raw)
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(temporary, "w") as target:
            for name in sorted(source.namelist()):
                content = source.read(name)
                if name.endswith(".json"):
                    fields = _renumbered(json.loads(content), {})
                    fields.pop("date_saved", None)
                    content = json.dumps(fields, sort_keys=True).encode()
                target.writestr(zipfile.ZipInfo(name), content)  # of 1980


def _renumbered(value: Any, numbers: dict[int, int], key: str = "") -> Any:
    """Replace memory addresses, which identify shared objects, by 0, 1, 2…"""
    if key == "shared_object_id":
        return numbers.setdefault(value, len(numbers))
    if isinstance(value, list):
        return [_renumbered(entry, numbers) for entry in value]
    if isinstance(value, dict):
        return {name: _renumbered(entry, numbers, name) for name, entry in value.items()}
    return value

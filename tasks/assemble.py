"""Stage: the trained weights back in the functional model.

`model.keras` is the model, `model.pb` the same network for inference alone, which needs
no TensorFlow. The same weights give the same bytes: Keras writes the time, object
addresses and zip dates into its files, and these are taken out again.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

from tasks.io import atomic_write
from tasks.model.augment import INPUT_SIZE
from tasks.model.export import frozen_graph
from tasks.model.weights import BACKBONE_FILE, read_phase
from tasks.params import BACKBONE
from tasks.stage import Context, stage_main

_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest a zip entry can have."""


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/model.keras` and `artifacts/model.pb` from the backbone and the last phase.

    Raises:
        ModelError: weights are missing or do not fit.
    """
    assemble(context)


def assemble(context: Context, size: int = INPUT_SIZE) -> None:
    """Do `run`'s work for an input of `size` pixels a side."""
    from tasks.model.network import HEAD, build_model, freeze
    from tasks.training.tail import put_tail

    project, params = context.project, context.params
    weights = read_phase(project, params.last_phase)
    for part in ("kernel", "bias"):
        weights[f"{HEAD}/{part}"] = weights[f"{HEAD}/{part}"] / params.training.temperature
    model = build_model(
        params.augmentation,
        params.training.dropout,
        size=size,
        backbone_weights=project.weights(BACKBONE) / BACKBONE_FILE,
        seed=params.seed,
    )
    put_tail(model, weights)
    freeze(model, 0)  # whoever fits the file further does not shift its batch norms
    context.progress("assemble model", 0, 2)
    save_model(model, project.model)
    context.progress("assemble model", 1, 2)
    with atomic_write(project.graph) as temporary:
        temporary.write_bytes(frozen_graph(model))
    context.progress("assemble model", 2, 2)


def save_model(model: Any, path: Path) -> None:
    """Save a Keras model so that equal models give equal files."""
    with atomic_write(path) as temporary:
        raw = temporary.with_name("raw.keras")
        model.save(raw)
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(temporary, "w") as target:
            for name in sorted(source.namelist()):
                target.writestr(zipfile.ZipInfo(name, _DATE), _plain(name, source.read(name)))


def _plain(name: str, content: bytes) -> bytes:
    if not name.endswith(".json"):
        return content
    fields = json.loads(content)
    if name == "metadata.json":
        del fields["date_saved"]
    return json.dumps(_renumbered(fields, {}), sort_keys=True).encode()


def _renumbered(value: Any, numbers: dict[int, int]) -> Any:
    """Replace addresses in memory that tell shared objects apart by 0, 1, 2…"""
    if isinstance(value, list):
        return [_renumbered(entry, numbers) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: numbers.setdefault(entry, len(numbers))
        if key == "shared_object_id"
        else _renumbered(entry, numbers)
        for key, entry in value.items()
    }


if __name__ == "__main__":
    stage_main(run)

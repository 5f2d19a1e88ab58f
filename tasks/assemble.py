"""Stage: put the trained weights back into the functional model, `model.keras`.

`model.pb` is the same network for inference without TensorFlow.
"""

from tasks.io import atomic_write
from tasks.model.files import BACKBONE_FILE, export_graph, read_phase, save_model
from tasks.params import BACKBONE, INPUT_SIZE
from tasks.stage import Context, stage_main


def run(context: Context, item: str | None = None, size: int = INPUT_SIZE) -> None:
    """Write the files from the backbone and the last phase, for an input of `size` pixels."""
    from tasks.model.network import HEAD, build_model, freeze, set_tail

    project, params = context.project, context.params
    weights = read_phase(project, params.last_phase)
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
    context.progress("assemble model", 1, 2)
    with atomic_write(project.graph) as temporary:
        temporary.write_bytes(export_graph(model))
    context.progress("assemble model", 2, 2)


if __name__ == "__main__":
    stage_main(run)

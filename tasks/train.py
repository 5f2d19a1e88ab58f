"""Stage: train one phase, starting from the one before it.

Writes `artifacts/weights/<phase>/`: `weights.safetensors`, the layers above the cut
and the head, and `history.json`, the learning curve and the precision.
"""

import logging
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import Dataset, open_dataset
from tasks.errors import StageError
from tasks.io import atomic_directory, write_json
from tasks.model.augment import INPUT_SIZE
from tasks.model.weights import BACKBONE_FILE, WEIGHTS_FILE, read_phase, write_weights
from tasks.params import BACKBONE
from tasks.stage import Context, stage_main
from tasks.training.plan import Epoch, Plan, plan_phase
from tasks.training.temperature import score

_log = logging.getLogger(__name__)


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/weights/<item>/`, where `item` is a phase of params.yaml.

    Raises:
        ParamsError: there is no such phase.
        DataError: photos or features are missing or damaged.
        ModelError: the weights to start from are missing or do not fit.
        StageError: training diverged.
    """
    train(context, item)


def train(context: Context, name: str | None, size: int = INPUT_SIZE) -> None:
    """Do `run`'s work for an input of `size` pixels a side."""
    import tensorflow as tf

    from tasks.training.tail import tail_weights

    # Measured to cost nothing here; without it bits would hang on thread timing.
    tf.config.experimental.enable_op_determinism()
    dataset = open_dataset(context.project.dataset)
    plan = _on_this_machine(plan_phase(context.params, name, dataset))
    strategy = _strategy(plan)
    with strategy.scope():
        model = _starting_model(context, plan, size)
    curve, logits = _fit(context, model, plan, dataset, strategy)
    _require_finite(plan, curve)
    weights = tail_weights(model)
    history = _history(plan, curve)
    if plan.name == context.params.last_phase:
        # The loss of the model that the assemble stage makes of these weights.
        temperature = context.params.training.temperature
        history["val_loss"] = score(logits / temperature, plan.val_labels)[0]
    with atomic_directory(context.project.weights(plan.name)) as folder:
        write_weights(folder / WEIGHTS_FILE, weights)
        write_json(folder / context.project.history(plan.name).name, history)


def _on_this_machine(plan: Plan) -> Plan:
    """Settle the precision that `plan` trains in here."""
    from tasks.training.tail import FULL, usable_precision

    wanted = plan.training.precision
    usable = usable_precision(wanted) if plan.training.mode == "cached" else FULL
    if usable != wanted and plan.training.mode == "cached":
        _log.info("Phase %s trains in %s: %s would be emulated here.", plan.name, usable, wanted)
    return replace(plan, training=plan.training.model_copy(update={"precision": usable}))


def _starting_model(context: Context, plan: Plan, size: int) -> Any:
    from tasks.model.network import build_model, build_tail, freeze
    from tasks.training.tail import put_tail

    weights = read_phase(context.project, plan.phase.init_from)
    if plan.training.mode == "cached":
        model = build_tail(size, plan.seed)
    else:
        model = build_model(
            context.params.augmentation,
            plan.training.dropout,
            size=size,
            backbone_weights=context.project.weights(BACKBONE) / BACKBONE_FILE,
            seed=plan.seed,
        )
    put_tail(model, weights)
    freeze(model, plan.phase.trainable_layers)
    return model


def _strategy(plan: Plan) -> Any:
    """Only end-to-end training is worth sharing out: the tail alone is too short."""
    import tensorflow as tf

    if plan.training.mode == "end_to_end":
        from tasks.training.end_to_end import find_strategy

        return find_strategy() or tf.distribute.get_strategy()
    return tf.distribute.get_strategy()


def _fit(
    context: Context, model: Any, plan: Plan, dataset: Dataset, strategy: Any
) -> tuple[list[Epoch], NDArray[np.float32]]:
    if plan.training.mode == "cached":
        from tasks.model.feature_store import open_features
        from tasks.training.cached import fit_cached

        features = open_features(context.project.features)
        return fit_cached(model, plan, dataset.names, features, context.progress)
    if strategy.num_replicas_in_sync > 1:
        from tasks.training.end_to_end import fit_distributed

        return fit_distributed(strategy, model, plan, dataset.images, context.progress)
    from tasks.training.end_to_end import fit_end_to_end

    return fit_end_to_end(model, plan, dataset.images, context.progress)


def _require_finite(plan: Plan, curve: list[Epoch]) -> None:
    for epoch in curve:
        if not (math.isfinite(epoch.loss) and math.isfinite(epoch.val_loss)):
            raise StageError(
                f"Phase {plan.name} diverged in epoch {epoch.epoch}. Received: loss {epoch.loss}, "
                f"val_loss {epoch.val_loss}. Lower phases.{plan.name}.learning_rate "
                f"(now {plan.phase.learning_rate}) in params.yaml."
            )


def _history(plan: Plan, curve: list[Epoch]) -> dict[str, Any]:
    return {
        "phase": plan.name,
        "images": len(plan.train),
        "precision": plan.training.precision,
        "epochs": [asdict(epoch) for epoch in curve],
        "val_accuracy": curve[-1].val_accuracy,
        "val_loss": curve[-1].val_loss,
    }


if __name__ == "__main__":
    stage_main(run)

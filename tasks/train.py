"""Stage: train one phase, starting from the previous one."""

import logging
import math
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import Dataset, open_dataset
from tasks.errors import StageError
from tasks.io import atomic_directory, write_json
from tasks.model.files import BACKBONE_FILE, WEIGHTS_FILE, Weights, read_phase, write_weights
from tasks.params import BACKBONE, INPUT_SIZE, PHASES
from tasks.stage import Context
from tasks.training.plan import Epoch, Plan, plan_phase, score_logits

_log = logging.getLogger(__name__)

Trained = tuple[Weights, list[Epoch], NDArray[np.float32]]
"""Weights of the tail, learning curve, and validation logits."""


def run(context: Context, item: str | None = None, size: int = INPUT_SIZE) -> None:
    """Train the phase `item`; write the weights above the cut, and `history.json`, the curve."""
    import tensorflow as tf

    from tasks.model.network import FULL, usable_precision

    # Costs no measurable time; without it results would depend on thread timing.
    tf.config.experimental.enable_op_determinism()
    dataset = open_dataset(context.project.dataset)
    plan = plan_phase(context.params, str(item), dataset)
    wanted, cached = plan.training.precision, plan.training.mode == "cached"
    usable = usable_precision(wanted) if cached else FULL
    if cached and usable != wanted:
        _log.info("Phase %s trains in %s: %s would be emulated here.", plan.name, usable, wanted)
    plan = replace(plan, training=plan.training.model_copy(update={"precision": usable}))
    start = read_phase(context.project, plan.phase.init_from)
    fit = _fit_cached if cached else _fit_end_to_end
    weights, curve, logits = fit(context, plan, dataset, start, size)
    for epoch in curve:
        if not (math.isfinite(epoch.loss) and math.isfinite(epoch.val_loss)):
            raise StageError(
                f"Phase {plan.name} diverged in epoch {epoch.epoch} (loss {epoch.loss}, val_loss "
                f"{epoch.val_loss}). Lower phases.{plan.name}.learning_rate "
                f"(now {plan.phase.learning_rate}) in params.yaml."
            )
    val_loss = curve[-1].val_loss
    if plan.name == PHASES[-1]:
        # The loss of the model that the assemble stage makes of these weights.
        val_loss, _ = score_logits(logits / plan.training.temperature, plan.val_labels)
    history = {
        "phase": plan.name,
        "images": len(plan.train),
        "precision": usable,
        "epochs": [asdict(epoch) for epoch in curve],
        "val_accuracy": curve[-1].val_accuracy,
        "val_loss": val_loss,
    }
    with atomic_directory(context.project.weights(plan.name)) as folder:
        write_weights(folder / WEIGHTS_FILE, weights)
        write_json(folder / "history.json", history)


def _fit_cached(
    context: Context, plan: Plan, dataset: Dataset, start: Weights, size: int
) -> Trained:
    from tasks.features import open_features
    from tasks.model.network import Tail
    from tasks.training.cached import fit_cached

    layers, dropout = plan.phase.trainable_layers, plan.training.dropout
    tail = Tail(start, plan.classes, layers, dropout, plan.seed)
    features = open_features(context.project.features)
    curve, logits = fit_cached(tail, plan, dataset.names, features, context.progress)
    return tail.weights(), curve, logits


def _fit_end_to_end(
    context: Context, plan: Plan, dataset: Dataset, start: Weights, size: int
) -> Trained:
    from tasks.model.network import build_model, freeze, get_tail, set_tail
    from tasks.training.end_to_end import find_strategy, fit_end_to_end

    with find_strategy().scope():
        model = build_model(
            plan.classes,
            context.params.augmentation,
            plan.training.dropout,
            size=size,
            backbone_weights=context.project.weights(BACKBONE) / BACKBONE_FILE,
            seed=plan.seed,
        )
        set_tail(model, start)
        freeze(model, plan.phase.trainable_layers)
    curve, logits = fit_end_to_end(model, plan, dataset.images, context.progress)
    return get_tail(model), curve, logits

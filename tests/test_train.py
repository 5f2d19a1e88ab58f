"""Training in both modes, on an untrained network at 32 x 32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks.data.dataset import open_dataset
from tasks.model.network import backbone_of, build_model, freeze, trunk_of
from tasks.model.weights import BACKBONE_FILE, Weights, take
from tasks.stage import Context, silent
from tasks.training.cached import fit_cached
from tasks.training.end_to_end import fit_end_to_end
from tasks.training.plan import plan_phase
from tasks.training.tail import tail_weights
from tests.fixtures.models import SIZE, StoredArrays

PHASES = ["base", "fine_tune", "full"]
Workshop = Callable[..., Context]


def start(context: Context, phase: str, plain: bool = True) -> Any:
    """The whole model at 32 x 32, opened for one phase."""
    model = build_model(
        None if plain else context.params.augmentation,
        context.params.training.dropout,
        size=SIZE,
        backbone_weights=context.project.weights("backbone") / BACKBONE_FILE,
        seed=context.params.seed,
    )
    freeze(model, context.params.phases[phase].trainable_layers)
    return model


def fit(context: Context, phase: str, mode: str, model: Any, features: Any = None) -> Any:
    dataset = open_dataset(context.project.dataset)
    plan = plan_phase(context.params, phase, dataset)
    if mode == "end_to_end":
        return fit_end_to_end(model, plan, dataset.images, silent)
    return fit_cached(model, plan, dataset.names, features, silent)


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


class Witness:
    """Remembers a model's backbone, and says what training changed in it."""

    def __init__(self, model: Any) -> None:
        self._backbone = backbone_of(model)
        self._trunk = trunk_of(self._backbone)
        self._photos = np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3))
        self._weights = take(self._backbone.layers)
        self._features = self._run()

    def _run(self) -> np.ndarray:
        return np.asarray(self._trunk(self._photos.astype(np.float32), training=True))

    def check(self) -> None:
        """Only open layers changed; batch norm statistics and the trunk's output did not."""
        after = take(self._backbone.layers)
        changed = {
            name.split("/")[0]
            for name, before in self._weights.items()
            if not np.array_equal(before, after[name])
        }
        opened = {layer.name for layer in self._backbone.layers if layer.trainable_variables}
        assert changed == opened
        assert not [name for name in changed if name.endswith("bn")]
        assert np.array_equal(self._run(), self._features)


@pytest.mark.parametrize("phase", PHASES)
def test_trunk_and_batch_norms_stay_while_a_phase_trains(
    workshop: Workshop, stored: StoredArrays, phase: str
) -> None:
    context = workshop()
    model = start(context, phase)
    witness = Witness(model)
    fit(context, phase, "cached", model, stored)
    witness.check()


def test_trunk_and_batch_norms_stay_under_live_augmentation(workshop: Workshop) -> None:
    context = workshop()
    model = start(context, "full", plain=False)
    witness = Witness(model)
    fit(context, "full", "end_to_end", model)
    witness.check()


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_both_modes_give_the_same_losses_for_the_same_views(
    workshop: Workshop, stored: StoredArrays, phase: str
) -> None:
    context = workshop(dropout=0.0, precision="float32")
    views = context.params.features.model_copy(update={"augmented_copies": 0})
    context = Context(context.project, context.params.model_copy(update={"features": views}))
    models = start(context, phase), start(context, phase)
    witness = Witness(models[1])

    cached, cached_logits = fit(context, phase, "cached", models[0], stored)
    plain, plain_logits = fit(context, phase, "end_to_end", models[1])

    witness.check()
    for left, right in zip(cached, plain, strict=True):
        assert left.loss == pytest.approx(right.loss, abs=1e-4)
        assert left.val_loss == pytest.approx(right.val_loss, abs=1e-4)
        assert left.accuracy == pytest.approx(right.accuracy)
    centred = [rows - rows.mean(axis=1, keepdims=True) for rows in (cached_logits, plain_logits)]
    np.testing.assert_allclose(*centred, atol=1e-3)
    kept = [tail_weights(model)["predictions/kernel"] for model in models]
    np.testing.assert_allclose(*kept, atol=1e-4)


def test_mixed_precision_follows_the_same_curve(workshop: Workshop, stored: StoredArrays) -> None:
    curves, weights = [], []
    for precision in ("float32", "mixed_bfloat16"):
        # Dropout would scale up what it leaves of an untrained network, and its rounding.
        context = workshop(precision=precision, dropout=0.0)
        model = start(context, "full")
        curve, _ = fit(context, "full", "cached", model, stored)
        curves.append(curve)
        weights.append(tail_weights(model))
    for full, mixed in zip(*curves, strict=True):
        assert mixed.loss == pytest.approx(full.loss, rel=0.03)
        assert mixed.val_loss == pytest.approx(full.val_loss, rel=0.03)
    assert not same(*weights)
    assert all(values.dtype == np.float32 for values in weights[1].values())


@pytest.mark.parametrize("mode", ["cached", pytest.param("end_to_end", marks=pytest.mark.slow)])
def test_training_twice_gives_the_same_bits(
    workshop: Workshop, stored: StoredArrays, mode: str
) -> None:
    context = workshop(mode=mode)
    runs = []
    for _ in range(2):
        model = start(context, "full", plain=False)
        curve, _ = fit(context, "full", mode, model, stored)
        runs.append((curve, tail_weights(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_a_phase_learns(workshop: Workshop, stored: StoredArrays) -> None:
    context = workshop(dropout=0.0)
    phases = context.params.phases
    longer = phases | {"full": phases["full"].model_copy(update={"epochs": 12})}
    context = Context(context.project, context.params.model_copy(update={"phases": longer}))
    curve, _ = fit(context, "full", "cached", start(context, "full"), stored)
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert curve[-1].accuracy > curve[0].accuracy

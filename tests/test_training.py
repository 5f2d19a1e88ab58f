"""The training stage: batches of a phase, both modes, and what it writes; at 32 x 32."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.dataset import open_dataset
from tasks.errors import ModelError, ParamsError, StageError
from tasks.model.network import build_model, freeze, get_tail, set_tail
from tasks.model.tail import FULL, MIXED, Tail, matmul_in, usable_precision
from tasks.model.weights import BACKBONE_FILE, Weights, read_phase
from tasks.params import BACKBONE, PhaseParams, TrainingParams
from tasks.project import Project
from tasks.stage import Context, silent
from tasks.train import train
from tasks.training.cached import fit_cached
from tasks.training.end_to_end import fit_end_to_end
from tasks.training.plan import Plan, plan_phase, score_logits
from tests.fixtures.models import SIZE, StoredArrays

Workshop = Callable[..., Context]
PHASES = ["base", "fine_tune", "full"]


def plan_of(photos: int, copies: int, batch_size: int = 8, name: str = "full") -> Plan:
    rows = np.arange(photos, dtype=np.int64)
    return Plan(
        name=name,
        phase=PhaseParams(
            init_from="base",
            data_fraction=1.0,
            trainable_layers=10,
            learning_rate=1e-3,
            epochs=3,
            swa_fraction=0.0,
        ),
        training=TrainingParams(
            mode="cached",
            precision="float32",
            batch_size=batch_size,
            dropout=0.0,
            mixstyle_prob=0.0,
            random_erasing_prob=0.0,
            temperature=1.0,
        ),
        seed=7,
        copies=copies,
        train=rows,
        train_labels=rows % 6,
        synthetic=rows < 0,
        val=rows[:0],
        val_labels=rows[:0],
    )


@given(
    photos=st.integers(1, 50),
    copies=st.integers(0, 5),
    batch_size=st.integers(1, 20),
    cycle=st.integers(0, 3),
)
def test_each_photo_shows_every_copy_once_before_any_comes_again(
    photos: int, copies: int, batch_size: int, cycle: int
) -> None:
    plan = plan_of(photos, copies, batch_size)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(cycle * (copies + 1), (cycle + 1) * (copies + 1)):
        batches = list(plan.batches(epoch))
        assert len(batches) == plan.updates_per_epoch
        assert [len(chosen) for chosen, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
        positions = np.concatenate([chosen for chosen, _ in batches])
        assert sorted(positions) == list(range(photos))
        seen.update(
            zip(positions, np.concatenate([numbers for _, numbers in batches]), strict=True)
        )
    assert set(seen.values()) == {1}
    assert len(seen) == photos * (copies + 1)


def test_order_depends_on_epoch_and_phase_and_repeats() -> None:
    def order(plan: Plan, epoch: int) -> list[int]:
        return np.concatenate([chosen for chosen, _ in plan.batches(epoch)]).tolist()

    plan = plan_of(40, 2)
    assert order(plan, 0) == order(plan_of(40, 2), 0)
    assert order(plan, 0) != order(plan, 1)
    assert order(plan, 0) != order(plan_of(40, 2, name="base"), 0)


def test_phases_with_one_fraction_share_their_photos(workshop: Workshop) -> None:
    context = workshop()
    dataset = open_dataset(context.project.dataset)
    halves = {
        name: phase.model_copy(update={"data_fraction": 0.5})
        for name, phase in context.params.phases.items()
    }
    params = context.params.model_copy(update={"phases": halves})
    base, fine_tune = (plan_phase(params, name, dataset) for name in ("base", "fine_tune"))
    assert np.array_equal(base.train, fine_tune.train)
    assert len(base.train) == 12
    assert set(base.train) <= set(dataset.rows("train"))
    assert np.array_equal(base.val, dataset.rows("val"))


def test_an_unknown_phase_is_refused(workshop: Workshop) -> None:
    context = workshop()
    with pytest.raises(ParamsError, match="no phase 'head', only base, fine_tune, full"):
        plan_phase(context.params, "head", open_dataset(context.project.dataset))


def test_loss_of_logits_is_the_cross_entropy_and_stays_finite() -> None:
    assert score_logits(np.zeros((12, 6)), np.arange(12) % 6) == pytest.approx((np.log(6), 1 / 6))
    logits = np.array([[1e4, 0, 0, 0, 0, 0]], np.float32)
    assert score_logits(logits, np.array([1]))[0] == pytest.approx(1e4)


def start(context: Context, phase: str, augmented: bool = False) -> Any:
    """The whole model, unfrozen for one phase."""
    model = build_model(
        context.params.augmentation if augmented else None,
        context.params.training.dropout,
        size=SIZE,
        backbone_weights=context.project.weights("backbone") / BACKBONE_FILE,
        seed=context.params.seed,
    )
    freeze(model, context.params.phases[phase].trainable_layers)
    return model


def fit(context: Context, phase: str, mode: str, features: Any, model: Any = None) -> Any:
    """Train one phase from the backbone; weights, curve and validation logits."""
    dataset = open_dataset(context.project.dataset)
    plan = plan_phase(context.params, phase, dataset)
    if mode == "end_to_end":
        model = model or start(context, phase)
        curve, logits = fit_end_to_end(model, plan, dataset.images, silent)
        return get_tail(model), curve, logits
    weights = read_phase(context.project, BACKBONE)
    tail = Tail(weights, plan.phase.trainable_layers, plan.training.dropout, plan.seed)
    curve, logits = fit_cached(tail, plan, dataset.names, features, silent)
    return tail.weights(), curve, logits


def changed(before: Weights, after: Weights) -> set[str]:
    """Layers whose weights differ."""
    assert before.keys() == after.keys()
    return {name.split("/")[0] for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_trains_its_layers_and_no_batch_norm(
    workshop: Workshop, stored: StoredArrays, phase: str
) -> None:
    context = workshop()
    model = start(context, phase)
    before = get_tail(model)
    weights, _, _ = fit(context, phase, "cached", stored)
    opened = {layer.name for layer in model.get_layer("efficientnetb0").layers if layer.trainable}
    weighted = {name.split("/")[0] for name in before}
    assert changed(before, weights) == (opened & weighted) | {"predictions"}
    assert not [name for name in changed(before, weights) if name.endswith("bn")]


@pytest.mark.slow
def test_trunk_and_batch_norms_stay_under_live_augmentation(workshop: Workshop) -> None:
    context = workshop()
    model = start(context, "full", augmented=True)
    backbone = model.get_layer("efficientnetb0")
    before = {v.path: v.numpy() for layer in backbone.layers for v in layer.weights}
    fit(context, "full", "end_to_end", None, model)
    after = {v.path: v.numpy() for layer in backbone.layers for v in layer.weights}
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {v.path for layer in backbone.layers for v in layer.trainable_variables}
    assert not [name for name in moved if "bn" in name or "block6" in name]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_both_modes_give_the_same_losses_for_the_same_pictures(
    workshop: Workshop, stored: StoredArrays, phase: str
) -> None:
    context = workshop(dropout=0.0, precision="float32")
    plain = context.params.features.model_copy(update={"augmented_copies": 0})
    context = replace(context, params=context.params.model_copy(update={"features": plain}))
    weights, curve, logits = fit(context, phase, "cached", stored)
    keras_weights, keras_curve, keras_logits = fit(context, phase, "end_to_end", None)
    for left, right in zip(curve, keras_curve, strict=True):
        assert left.loss == pytest.approx(right.loss, abs=1e-4)
        assert left.val_loss == pytest.approx(right.val_loss, abs=1e-4)
        assert left.accuracy == pytest.approx(right.accuracy)
    centred = [rows - rows.mean(axis=1, keepdims=True) for rows in (logits, keras_logits)]
    np.testing.assert_allclose(*centred, atol=1e-3)
    name = "predictions/kernel"
    np.testing.assert_allclose(weights[name], keras_weights[name], atol=1e-4)


def test_mixed_precision_follows_the_same_curve(workshop: Workshop, stored: StoredArrays) -> None:
    # Dropout would scale up what it leaves of an untrained network, and its rounding.
    runs = [
        fit(workshop(precision=precision, dropout=0.0), "full", "cached", stored)
        for precision in (FULL, MIXED)
    ]
    for full, mixed in zip(runs[0][1], runs[1][1], strict=True):
        assert mixed.loss == pytest.approx(full.loss, rel=0.03)
        assert mixed.val_loss == pytest.approx(full.val_loss, rel=0.03)
    assert changed(runs[0][0], runs[1][0])
    assert all(values.dtype == np.float32 for values in runs[1][0].values())


@pytest.mark.parametrize("mode", ["cached", pytest.param("end_to_end", marks=pytest.mark.slow)])
def test_training_twice_gives_the_same_bits(
    workshop: Workshop, stored: StoredArrays, mode: str
) -> None:
    context = workshop(mode=mode)
    first, again = (fit(context, "full", mode, stored) for _ in range(2))
    assert first[1] == again[1]
    assert not changed(first[0], again[0])


def test_a_phase_learns(workshop: Workshop, stored: StoredArrays) -> None:
    context = workshop(dropout=0.0)
    phases = context.params.phases
    longer = phases | {"full": phases["full"].model_copy(update={"epochs": 12})}
    context = replace(context, params=context.params.model_copy(update={"phases": longer}))
    _, curve, _ = fit(context, "full", "cached", stored)
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert curve[-1].accuracy > curve[0].accuracy


def product_and_gradients(precision: str) -> list[np.ndarray]:
    """A product of random matrices, and the gradient of its sum of squares."""
    random = np.random.default_rng(0)
    left, right = (
        tf.constant(random.normal(size=size).astype("f4")) for size in [(64, 48), (48, 32)]
    )
    with tf.GradientTape() as tape:
        tape.watch([left, right])
        product = matmul_in(precision)(left, right)
        total = tf.reduce_sum(product**2)
    return [product.numpy(), *(part.numpy() for part in tape.gradient(total, [left, right]))]


def test_mixed_products_and_gradients_are_exact_but_for_rounding() -> None:
    half_a_step = 2.0**-9
    pairs = zip(product_and_gradients(MIXED), product_and_gradients(FULL), strict=True)
    for mixed, exact in pairs:
        assert mixed.dtype == np.float32
        error = np.sqrt(np.mean((mixed - exact) ** 2) / np.mean(exact**2))
        assert 0 < error < 3 * half_a_step


@pytest.mark.parametrize(
    ("flags", "onednn", "usable"),
    [
        ("fpu sse2 avx512f avx512_bf16", "1", MIXED),
        ("fpu sse2 avx512f amx_bf16 amx_tile", "1", MIXED),
        ("fpu sse2 avx512f avx512_bf16", "0", FULL),
        ("fpu sse2 not_avx512_bf16", "1", FULL),
        (None, "1", FULL),
    ],
)
def test_mixed_precision_is_used_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, onednn: str, usable: str
) -> None:
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", onednn)
    cpuinfo = tmp_path / "cpuinfo"
    if flags:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: any\nflags\t\t: {flags}\n")
    assert usable_precision(MIXED, cpuinfo) == usable
    assert usable_precision(FULL, cpuinfo) == FULL


def test_a_phase_trains_in_float32_where_bfloat16_would_be_emulated(
    chain: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    runs = []
    for wanted in (MIXED, FULL):
        project = copied(chain, tmp_path / wanted)
        training = chain.params.training.model_copy(update={"precision": wanted})
        params = chain.params.model_copy(update={"training": training})
        with caplog.at_level(logging.INFO, "tasks.train"):
            train(Context(project, params), "full", SIZE)
        folder = project.weights("full")
        runs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert runs[0] == runs[1]
    assert json.loads(runs[0]["history.json"])["precision"] == FULL
    assert [record.getMessage() for record in caplog.records] == [
        "Phase full trains in float32: mixed_bfloat16 would be emulated here."
    ]


def copied(chain: Context, root: Path) -> Project:
    project = Project(root)
    shutil.copytree(chain.project.artifacts, project.artifacts)
    return project


def test_a_diverged_phase_writes_nothing(chain: Context, tmp_path: Path) -> None:
    project = copied(chain, tmp_path)
    shutil.rmtree(project.weights("full"))
    phases = chain.params.phases
    wild = phases | {"full": phases["full"].model_copy(update={"learning_rate": 1e30})}
    context = Context(project, chain.params.model_copy(update={"phases": wild}))
    with pytest.raises(StageError, match=r"full diverged in epoch 1 .*learning_rate"):
        train(context, "full", SIZE)
    assert not project.weights("full").exists()


def test_a_phase_names_the_weights_it_lacks(chain: Context, tmp_path: Path) -> None:
    project = copied(chain, tmp_path)
    shutil.rmtree(project.weights("fine_tune"))
    with pytest.raises(ModelError, match=r"fine_tune/weights\.safetensors'"):
        train(Context(project, chain.params), "full", SIZE)
    with pytest.raises(ModelError, match="block7a_expand_conv/kernel' are missing"):
        Tail({}).pooled(tf.zeros((1, 1, 1, 192)))


def test_history_lists_each_epoch_and_no_times(chain: Context) -> None:
    for phase in PHASES:
        history = json.loads(chain.project.history(phase).read_text())
        assert history["phase"] == phase
        assert history["images"] == 24
        assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
        assert set(history["epochs"][0]) == {
            *("epoch", "loss", "accuracy", "val_loss", "val_accuracy")
        }


def test_training_again_gives_the_same_bytes(chain: Context, tmp_path: Path) -> None:
    project = copied(chain, tmp_path)
    for phase in PHASES:
        shutil.rmtree(project.weights(phase))
        train(Context(project, chain.params), phase, SIZE)
        for path in project.weights(phase).iterdir():
            first = chain.project.weights(phase) / path.name
            assert path.read_bytes() == first.read_bytes(), path


@pytest.mark.parametrize("opened", [0, 10, 16])
def test_the_tail_and_the_model_train_the_same_variables(workshop: Workshop, opened: int) -> None:
    weights = read_phase(workshop().project, BACKBONE)
    model = build_model(size=SIZE, seed=3)
    set_tail(model, weights)
    freeze(model, opened)
    tail = Tail(weights, opened, seed=3)
    assert not changed(get_tail(model), tail.weights())
    shapes = sorted(tuple(variable.shape) for variable in tail.trainable_variables)
    layers = [*model.get_layer("efficientnetb0").layers[-16:], model.get_layer("predictions")]
    variables = [variable for layer in layers for variable in layer.trainable_variables]
    assert shapes == sorted(tuple(variable.shape) for variable in variables)

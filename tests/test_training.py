"""The training phases: plan, modes, precision, regularizers, devices and what is written."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from flows.local.processes import choose_ports
from tasks.data.dataset import open_dataset
from tasks.errors import ModelError, StageError
from tasks.features import open_features
from tasks.model.files import BACKBONE_FILE, Weights, read_phase, read_weights
from tasks.model.network import (
    FULL,
    HEAD,
    LAYERS,
    MIXED,
    Tail,
    backbone_of,
    build_model,
    freeze,
)
from tasks.params import BACKBONE
from tasks.project import Project
from tasks.stage import Context, silent
from tasks.train import run as train
from tasks.training.cached import Adam, WeightAverage, fit_cached, mixstyle, random_erasing
from tasks.training.end_to_end import fit_end_to_end
from tasks.training.plan import Plan, plan_phase
from tests.fixtures.models import SIZE, Repo, changed, copied, with_phases
from tests.fixtures.photos import STILL
from tests.fixtures.worker import plain_context

PHASES = ["base", "fine_tune", "full"]


@pytest.fixture(scope="session")
def plan(repo: Repo) -> Plan:
    context = repo()
    return plan_phase(context.params, "full", open_dataset(context.project.dataset))


def sized(plan: Plan, photos: int, copies: int, batch_size: int) -> Plan:
    """The same plan for photos without synthetic hands."""
    rows, training = np.arange(photos), plan.training.model_copy(update={"batch_size": batch_size})
    labels, synthetic = rows % 6, rows < 0
    plan = replace(plan, train=rows, train_labels=labels, synthetic=synthetic)
    return replace(plan, training=training, copies=copies)


@given(
    photos=st.integers(1, 50),
    copies=st.integers(0, 5),
    batch_size=st.integers(1, 20),
    cycle=st.integers(0, 3),
)
def test_each_photo_shows_every_copy_once_before_any_comes_again(
    plan: Plan, photos: int, copies: int, batch_size: int, cycle: int
) -> None:
    plan = sized(plan, photos, copies, batch_size)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(cycle * (copies + 1), (cycle + 1) * (copies + 1)):
        batches = list(plan.batches(epoch))
        assert len(batches) == plan.updates_per_epoch
        assert [len(chosen) for chosen, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
        positions = np.concatenate([chosen for chosen, _ in batches])
        assert sorted(positions) == list(range(photos))
        numbers = np.concatenate([numbers for _, numbers in batches])
        seen.update(zip(positions, numbers, strict=True))
    assert set(seen.values()) == {1}
    assert len(seen) == photos * (copies + 1)


def test_a_phase_plans_its_own_order_of_the_shared_photos(repo: Repo) -> None:
    context = with_phases(repo(), data_fraction=0.5)
    dataset = open_dataset(context.project.dataset)
    plans = [plan_phase(context.params, name, dataset) for name in ("base", "base", "fine_tune")]
    for plan in plans:
        assert np.array_equal(plan.train, plans[0].train)
        assert np.array_equal(plan.val, dataset.rows("val"))
    assert len(plans[0].train) == 12
    assert set(plans[0].train) <= set(dataset.rows("train"))
    first, same, other = ([chosen.tolist() for chosen, _ in plan.batches(0)] for plan in plans)
    assert first == same != other
    assert first != [chosen.tolist() for chosen, _ in plans[0].batches(1)]


def test_synthetic_hands_weigh_more_than_photos_in_the_loss(plan: Plan) -> None:
    training = plan.training.model_copy(update={"synthetic_weight": 3.0})
    plan = replace(sized(plan, 8, 0, 4), training=training, synthetic=np.arange(8) % 4 == 3)
    targets = plan.targets(np.array([3, 0]))
    assert targets.argmax(axis=1).tolist() == [3, 0]
    assert targets.sum(axis=1) == pytest.approx([2.0, 2 / 3])
    assert plan.targets(np.arange(8)).sum() == pytest.approx(8)


@pytest.fixture
def context(chain: Context, tmp_path: Path) -> Context:
    """A copy of the chain in which each phase starts from the backbone."""
    return with_phases(copied(chain, tmp_path), init_from=BACKBONE)


def fit(context: Context, phase: str, **training: Any) -> tuple[Weights, list[dict[str, float]]]:
    """Run the stage with other parameters; the weights of the tail and the learning curve."""
    train(changed(context, "training", **training), phase, SIZE)
    history = json.loads(context.project.history(phase).read_text())
    return read_phase(context.project, phase), history["epochs"]


def changed_layers(before: Weights, after: Weights) -> set[str]:
    """Layers of the trained tail whose weights differ."""
    return {
        name.split("/")[0]
        for name, value in after.items()
        if name not in before or not np.array_equal(before[name], value)
    }


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_trains_its_layers_and_no_batch_norm(context: Context, phase: str) -> None:
    before = read_phase(context.project, BACKBONE)
    after, _ = fit(context, phase)
    opened = LAYERS[len(LAYERS) - context.params.phases[phase].trainable_layers :]
    expected = {name for name in opened if f"{name}/kernel" in after}
    assert changed_layers(before, after) == {HEAD, *expected}
    assert {name.split("/")[0] for name in after} > {name for name in LAYERS if "bn" in name}


@pytest.mark.slow
def test_trunk_and_batch_norms_stay_under_live_augmentation(context: Context) -> None:
    dataset, params = open_dataset(context.project.dataset), context.params
    weights = context.project.weights(BACKBONE) / BACKBONE_FILE
    model = build_model(6, params.augmentation, 0.2, size=SIZE, backbone_weights=weights)
    freeze(model, params.phases["full"].trainable_layers)
    backbone = backbone_of(model)
    before = {v.path: v.numpy() for layer in backbone.layers for v in layer.weights}
    fit_end_to_end(model, plan_phase(params, "full", dataset), dataset.images, silent)
    after = {v.path: v.numpy() for layer in backbone.layers for v in layer.weights}
    changes = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changes == {v.path for layer in backbone.layers for v in layer.trainable_variables}
    assert not [name for name in changes if "bn" in name or "block6" in name]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_both_modes_give_the_same_losses_for_the_same_pictures(
    context: Context, phase: str
) -> None:
    still = context.params.model_copy(update={"augmentation": STILL})
    context = changed(replace(context, params=still), "features", augmented_copies=0)
    exact = {"dropout": 0.0, "precision": FULL}
    weights, curve = fit(context, phase, **exact)
    (keras_weights, keras_curve), again = (
        fit(context, phase, **exact, mode="end_to_end") for _ in range(2)
    )
    assert keras_curve == again[1]
    assert not changed_layers(keras_weights, again[0])
    # The features of one are rounded to float16.
    for left, right in zip(curve, keras_curve, strict=True):
        assert left == pytest.approx(right, abs=1e-3)
    name = f"{HEAD}/kernel"
    np.testing.assert_allclose(weights[name], keras_weights[name], atol=5e-4)


def test_mixed_precision_follows_the_same_curve(context: Context, plan: Plan) -> None:
    # Dropout, and copies that the random batch norms do not know, would scale up rounding.
    plan, start = replace(plan, copies=0), read_phase(context.project, BACKBONE)
    names = open_dataset(context.project.dataset).names
    features = open_features(context.project.features)
    curves = {}
    for precision in (FULL, MIXED):
        training = plan.training.model_copy(update={"precision": precision})
        tail = Tail(start, 6, plan.phase.trainable_layers, seed=plan.seed)
        one = replace(plan, training=training)
        curves[precision], _ = fit_cached(tail, one, names, features, silent)
    for full, mixed in zip(curves[FULL], curves[MIXED], strict=True):
        assert mixed.loss == pytest.approx(full.loss, rel=0.01)
        assert mixed.val_loss == pytest.approx(full.val_loss, rel=0.01)
        assert mixed != full
    assert curves[FULL][-1].loss < 0.9 * curves[FULL][0].loss, "it learns"


def test_a_phase_trains_in_float32_where_bfloat16_would_be_emulated(
    context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    with caplog.at_level(logging.INFO, "tasks.train"):
        wanted, full = (fit(context, "base", precision=one) for one in (MIXED, FULL))
    assert wanted[1] == full[1]
    assert not changed_layers(wanted[0], full[0])
    assert json.loads(context.project.history("base").read_text())["precision"] == FULL
    assert caplog.messages == [
        "Phase base trains in float32: mixed_bfloat16 would be emulated here."
    ]


def test_a_phase_that_fails_writes_nothing_and_says_why(chain: Context, tmp_path: Path) -> None:
    context = with_phases(copied(chain, tmp_path), learning_rate=1e30)
    shutil.rmtree(context.project.weights("full"))
    with pytest.raises(StageError, match=r"full diverged in epoch 1 .*learning_rate"):
        train(context, "full", SIZE)
    assert not context.project.weights("full").exists()
    shutil.rmtree(context.project.weights("fine_tune"))
    with pytest.raises(ModelError, match=r"fine_tune/weights\.safetensors'"):
        train(context, "full", SIZE)


def test_training_again_gives_the_same_bytes_and_no_times(chain: Context, tmp_path: Path) -> None:
    context = copied(chain, tmp_path)
    for phase in PHASES:
        shutil.rmtree(context.project.weights(phase))
        train(context, phase, SIZE)
        for path in context.project.weights(phase).iterdir():
            first = chain.project.weights(phase) / path.name
            assert path.read_bytes() == first.read_bytes(), path
        history = json.loads(context.project.history(phase).read_text())
        assert (history["phase"], history["images"]) == (phase, 24)
        assert [epoch.pop("epoch") for epoch in history["epochs"]] == [1, 2]
        assert set(history["epochs"][0]) == {"loss", "accuracy", "val_loss", "val_accuracy"}


def test_mixstyle_and_erasing_change_some_batches_and_photos() -> None:
    random = np.random.default_rng(0)
    maps = random.normal(3.0, random.uniform(0.5, 2, (8, 1, 1, 6)), (8, 7, 7, 6)).astype("f4")
    mixed = [mixstyle(maps, random, 1.0) for _ in range(20)]
    for after in mixed:
        one, other = (
            (each - each.mean((1, 2), keepdims=True)) / each.std((1, 2), keepdims=True)
            for each in (maps, after)
        )
        np.testing.assert_allclose(one, other, atol=1e-3)
        assert after.std((1, 2)).max() <= maps.std((1, 2)).max() + 1e-3
    assert max(np.abs(after - maps).max() for after in mixed) > 1
    shares = [sum(mixstyle(maps, random, p) is not maps for _ in range(500)) for p in (0, 0.3, 1)]
    assert shares == [0, pytest.approx(150, abs=40), 500]
    before = random.uniform(1, 2, (300, 7, 7, 3)).astype("f4")
    after = random_erasing(before, random, 0.3)
    assert np.array_equal(after[after != 0], before[after != 0])
    erased = [photo for photo in after == 0 if photo.any()]
    assert len(erased) == pytest.approx(90, abs=30)
    for photo in erased:
        assert (photo == photo[..., :1]).all(), "every channel"
        height, width = (np.ptp(places) + 1 for places in np.nonzero(photo[..., 0]))
        assert photo[..., 0].sum() == height * width, "a rectangle"
        assert max(height, width) <= 3
    assert random_erasing(before[:, :1, :1], random, 1.0).all(), "a single place stays"


@pytest.mark.parametrize(("share", "last"), [(0.0, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_the_last_updates_count_alike_and_the_first_not_at_all(share: float, last: int) -> None:
    values = np.random.default_rng(0).normal(size=8).astype(np.float32)
    variable = tf.Variable(0.0)
    average = WeightAverage([variable], len(values), share)
    for number, value in enumerate(values):
        variable.assign(value)
        average.update()
        with average.applied():
            expected = values[min(number, len(values) - last) : number + 1].mean()
            assert variable.numpy() == pytest.approx(expected, abs=1e-6)
        assert variable.numpy() == value
    average.keep()
    assert variable.numpy() == pytest.approx(values[-last:].mean(), abs=1e-6)


def test_updates_are_those_of_keras_adam() -> None:
    start = np.random.default_rng(0).normal(size=(5, 4)).astype("f4")
    ours, theirs = tf.Variable(start), keras.Variable(start)
    optimizer, reference = Adam([ours], 0.05), keras.optimizers.Adam(0.05)
    for number, scale in enumerate(np.logspace(-6, 3, 12)):
        noise = np.random.default_rng(number).normal(size=start.shape)
        gradient = tf.constant(scale * noise, tf.float32)
        optimizer.apply([gradient])
        reference.apply([gradient], [theirs])
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours.numpy(), start, atol=1e-2)


def config(ports: list[int], number: int) -> dict[str, str]:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": number}
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})}


@pytest.mark.slow
def test_two_processes_and_two_devices_train_the_same_weights_as_one(
    repo: Repo, tmp_path: Path
) -> None:
    ports = choose_ports(2)
    environments = {
        "alone": {},
        "first": config(ports, 0),
        "second": config(ports, 1),
        "mirrored": {"DEVICES": "2"},
    }
    for name in environments:
        shutil.copytree(repo().project.root, tmp_path / name)
    command = [sys.executable, "-m", "tests.fixtures.worker"]
    started = [
        subprocess.Popen(
            [*command, tmp_path / name], env=os.environ | more, stderr=subprocess.PIPE, text=True
        )
        for name, more in environments.items()
    ]
    try:
        for process in started:
            _, said = process.communicate(timeout=500)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()
    folders = {name: Project(tmp_path / name).weights("full") for name in environments}
    first, second = (folders[name] / "weights.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    curves = {
        name: json.loads((folder / "history.json").read_text())["epochs"]
        for name, folder in folders.items()
    }
    rate = plain_context(tmp_path).params.phases["full"].learning_rate
    theirs = read_weights(folders["alone"] / "weights.safetensors")
    for name in ("first", "mirrored"):  # the same but for rounding
        for ours, epoch in zip(curves[name], curves["alone"], strict=True):
            assert ours["loss"] == pytest.approx(epoch["loss"], abs=1e-3)
            assert ours["accuracy"] == pytest.approx(epoch["accuracy"])
            assert ours["val_loss"] == pytest.approx(epoch["val_loss"], abs=1e-2)
        weights = read_weights(folders[name] / "weights.safetensors")
        assert max(np.abs(weights[one] - theirs[one]).mean() for one in theirs) < rate

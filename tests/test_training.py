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

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from flows.local.processes import choose_ports
from tasks.data.dataset import open_dataset
from tasks.errors import ModelError, StageError
from tasks.io import read_json
from tasks.model.files import BACKBONE_FILE, Weights, read_phase
from tasks.model.network import FULL, HEAD, LAYERS, MIXED, backbone_of, build_model, freeze
from tasks.params import BACKBONE, PHASES
from tasks.project import Project
from tasks.stage import Context, silent
from tasks.train import run as train
from tasks.training.cached import WeightAverage, generalize, mixstyle
from tasks.training.end_to_end import fit_end_to_end
from tasks.training.plan import Plan, plan_phase
from tests.fixtures.models import SIZE, changed, copied, small_context, with_phases
from tests.fixtures.photos import STILL


def sized(repo: Context, photos: int, copies: int, **training: Any) -> Plan:
    """A plan for photos without synthetic hands."""
    plan = plan_phase(repo.params, "full", open_dataset(repo.project.dataset))
    rows, training = np.arange(photos), plan.training.model_copy(update=training)
    plan = replace(plan, train=rows, train_labels=rows % 6, synthetic=rows < 0)
    return replace(plan, training=training, copies=copies)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(1, 20), st.integers(0, 3))
def test_each_photo_shows_every_copy_once_before_any_comes_again(
    repo: Context, photos: int, copies: int, batch_size: int, cycle: int
) -> None:
    plan = sized(repo, photos, copies, batch_size=batch_size)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(cycle * (copies + 1), (cycle + 1) * (copies + 1)):
        batches = list(plan.batches(epoch))
        assert len(batches) == plan.updates_per_epoch
        assert {len(chosen) for chosen, _ in batches[:-1]} <= {batch_size}
        positions, numbers = (np.concatenate(one) for one in zip(*batches, strict=True))
        assert sorted(positions) == list(range(photos))
        seen.update(zip(positions, numbers, strict=True))
    assert set(seen.values()) == {1}
    assert len(seen) == photos * (copies + 1)


def test_synthetic_hands_weigh_more_than_photos_in_the_loss(repo: Context) -> None:
    plan = replace(sized(repo, 8, 0, synthetic_weight=3.0), synthetic=np.arange(8) % 4 == 3)
    targets = plan.targets(np.array([3, 0]))
    assert targets.argmax(axis=1).tolist() == [3, 0]
    assert targets.sum(axis=1) == pytest.approx([2.0, 2 / 3])
    assert plan.targets(np.arange(8)).sum() == pytest.approx(8)
    assert plan.gce_q == plan.training.gce_q > 0
    assert replace(plan, synthetic=np.arange(8) < 0).gce_q == 0


@pytest.fixture
def context(chain: Context, tmp_path: Path) -> Context:
    """A copy of the chain in which each phase starts from the backbone."""
    return with_phases(copied(chain, tmp_path), init_from=BACKBONE)


def fit(context: Context, phase: str, **training: Any) -> tuple[Weights, list[dict[str, float]]]:
    """Run the stage with other parameters; the weights of the tail and the learning curve."""
    train(changed(context, "training", **training), phase, SIZE)
    history = read_json(context.project.history(phase))
    return read_phase(context.project, phase), history["epochs"]


def changed_layers(before: Weights, after: Weights) -> set[str]:
    """Layers of the trained tail whose weights differ."""
    same = {name for name in before.keys() & after if np.array_equal(before[name], after[name])}
    return {name.split("/")[0] for name in after.keys() - same}


def test_phases_train_their_layers_to_the_same_bytes(chain: Context, tmp_path: Path) -> None:
    context = copied(chain, tmp_path)
    for phase, params in context.params.phases.items():
        shutil.rmtree(context.project.weights(phase))
        before, (after, epochs) = read_phase(chain.project, params.init_from), fit(context, phase)
        for path in context.project.weights(phase).iterdir():
            assert path.read_bytes() == (chain.project.weights(phase) / path.name).read_bytes()
        opened = LAYERS[len(LAYERS) - params.trainable_layers :]
        trained = {name for name in opened if f"{name}/kernel" in after}  # no batch norm
        assert changed_layers(before, after) == {HEAD, *trained}
        assert {name.split("/")[0] for name in after} > {name for name in LAYERS if "bn" in name}
        history = read_json(context.project.history(phase))
        assert (history["phase"], history["images"]) == (phase, 24)
        assert [epoch.pop("epoch") for epoch in epochs] == [1, 2]
        assert set(epochs[0]) == {"loss", "accuracy", "val_loss", "val_accuracy"}


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
def test_both_modes_give_the_same_losses(context: Context, phase: str) -> None:
    still = context.params.model_copy(update={"augmentation": STILL})
    context = changed(replace(context, params=still), "features", augmented_copies=0)
    exact = {"dropout": 0.0, "precision": FULL}
    weights, curve = fit(context, phase, **exact)
    keras_weights, keras_curve = fit(context, phase, **exact, mode="end_to_end")
    # The features of one are rounded to float16.
    for left, right in zip(curve, keras_curve, strict=True):
        assert left == pytest.approx(right, abs=1e-3)
    name = f"{HEAD}/kernel"
    np.testing.assert_allclose(weights[name], keras_weights[name], atol=2e-3)
    again, same_curve = fit(context, phase, **exact, mode="end_to_end")
    assert keras_curve == same_curve
    assert not changed_layers(keras_weights, again)


def test_mixed_precision_follows_float32_and_is_it_where_it_would_be_emulated(
    context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Dropout, and copies that the random batch norms do not know, would scale up rounding.
    context = changed(context, "features", augmented_copies=0)
    full, mixed = (fit(context, "full", precision=p, dropout=0.0)[1] for p in (FULL, MIXED))
    for one, other in zip(full, mixed, strict=True):
        assert other == pytest.approx(one, rel=0.02)
        assert other != one
    assert full[-1]["loss"] < 0.9 * full[0]["loss"], "it learns"
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    with caplog.at_level(logging.INFO, "tasks.train"):
        wanted, full_again = (fit(context, "base", precision=one) for one in (MIXED, FULL))
    assert wanted[1] == full_again[1]
    assert not changed_layers(wanted[0], full_again[0])
    assert read_json(context.project.history("base"))["precision"] == FULL
    emulated = "Phase base trains in float32: mixed_bfloat16 would be emulated here."
    assert caplog.messages == [emulated]


def test_a_phase_that_fails_writes_nothing_and_says_why(chain: Context, tmp_path: Path) -> None:
    context = with_phases(copied(chain, tmp_path), learning_rate=1e30)
    shutil.rmtree(context.project.weights("full"))
    with pytest.raises(StageError, match=r"full diverged in epoch 1 .*learning_rate"):
        train(context, "full", SIZE)
    assert not context.project.weights("full").exists()
    shutil.rmtree(context.project.weights("fine_tune"))
    with pytest.raises(ModelError, match=r"fine_tune/weights\.safetensors'"):
        train(context, "full", SIZE)


@pytest.mark.parametrize("q", [0.0, 1e-4, 0.5, 1.0])
def test_generalized_cross_entropy_lies_between_cross_entropy_and_absolute_error(q: float) -> None:
    shares, weights = np.array([0.9, 0.1, 1e-30], "f4"), np.array([1.0, 3.0, 1.0], "f4")
    targets = weights[:, np.newaxis] * np.eye(3, dtype="f4")
    losses = generalize(tf.constant(-weights * np.log(shares)), tf.constant(targets), q)
    expected = (1 - shares**q) / q if q > 0.01 else -np.log(shares)
    assert losses.numpy() == pytest.approx(weights * expected, rel=0.01)


def test_mixstyle_changes_styles_alone() -> None:
    def pictures(maps: np.ndarray) -> np.ndarray:
        centered = maps - maps.mean((1, 2), keepdims=True)
        return np.asarray(centered / maps.std((1, 2), keepdims=True))

    random = np.random.default_rng(0)
    maps = random.normal(3.0, random.uniform(0.5, 2, (300, 1, 1, 6)), (300, 7, 7, 6)).astype("f4")
    mixed = mixstyle(maps, random, 1.0)
    np.testing.assert_allclose(pictures(mixed), pictures(maps), atol=1e-3)
    assert mixed.std((1, 2)).max() <= maps.std((1, 2)).max() + 1e-3
    assert np.abs(mixed - maps).max() > 0.1
    unchanged = sum(mixstyle(maps, random, 0.3) is maps for _ in range(200))
    assert unchanged == pytest.approx(140, abs=25)


@pytest.mark.parametrize(("share", "last"), [(0.0, 1), (0.5, 4), (1.0, 8)])
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


def plain_context(root: Path) -> Context:
    """End-to-end training without anything random, so that ways of running it compare.

    Five photos a batch do not divide by two, and neither do the 24 of an epoch by five.
    """
    plain = {"mode": "end_to_end", "dropout": 0.0, "batch_size": 5, "temperature": 1.0}
    context = with_phases(small_context(root, **plain), init_from=BACKBONE)
    return replace(context, params=context.params.model_copy(update={"augmentation": STILL}))


@pytest.mark.slow
def test_processes_and_devices_train_as_one(repo: Context, tmp_path: Path) -> None:
    cluster = {"worker": [f"127.0.0.1:{port}" for port in choose_ports(2)]}
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": n}} for n in range(2)]
    ways = {"alone": {}, "mirrored": {"DEVICES": "2"}}
    ways |= {name: {"TF_CONFIG": json.dumps(task)} for name, task in zip("ab", tasks, strict=True)}
    started = []
    for name, more in ways.items():
        shutil.copytree(repo.project.root, tmp_path / name)
        command = [sys.executable, "-m", "tests.test_training", tmp_path / name]
        started.append(subprocess.Popen(command, env=os.environ | more, stderr=subprocess.PIPE))
    try:
        for process in started:
            _, said = process.communicate(timeout=500)
            assert process.returncode == 0, said.decode()
    finally:
        for process in started:
            process.kill()
    weights = {name: read_phase(Project(tmp_path / name), "full") for name in ways}
    curves = {name: read_json(Project(tmp_path / name).history("full")) for name in ways}
    assert not changed_layers(weights["a"], weights["b"])
    rate = repo.params.phases["full"].learning_rate
    for name in ("a", "mirrored"):  # the same but for rounding
        for ours, epoch in zip(curves[name]["epochs"], curves["alone"]["epochs"], strict=True):
            assert ours == pytest.approx(epoch, abs=1e-2)
        for one, value in weights["alone"].items():
            assert np.abs(weights[name][one] - value).mean() < rate


if __name__ == "__main__":  # one of the processes above
    if devices := int(os.environ.get("DEVICES", "0")):
        parts = [tf.config.LogicalDeviceConfiguration()] * devices
        processor = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(processor, parts)
    train(plain_context(Path(sys.argv[1])), "full", SIZE)

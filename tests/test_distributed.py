"""Training shared out over devices and over processes, against training on one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.ports import choose_ports
from tasks.checkpoint import BACKBONE_FILE
from tasks.dataset import open_dataset
from tasks.distributed import find_strategy
from tasks.end_to_end import fit_end_to_end
from tasks.model import build_model, freeze
from tasks.phase import plan_phase
from tasks.progress import silent
from tasks.stage import Context
from tests.fixtures.models import SIZE

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def alone(workshop: Callable[..., Context]) -> Any:
    """What `keras.Model.fit` makes of the same phase on one device."""
    context = workshop(dropout=0.0, batch_size=5)
    dataset = open_dataset(context.layout.dataset)
    plan = plan_phase(context.params, "full", dataset)
    weights = context.layout.weights("backbone") / BACKBONE_FILE
    model = build_model(size=SIZE, backbone_weights=weights, seed=1)
    freeze(model, plan.phase.trainable_layers)
    return fit_end_to_end(model, plan, dataset.images, silent)


def results(root: Path, folder: Path, environments: list[dict[str, str]]) -> list[Any]:
    """Run one worker process for each environment, all at once."""
    paths = [folder / f"{number}.json" for number in range(len(environments))]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fixtures.worker", root, path],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for path, environment in zip(paths, environments, strict=True)
    ]
    try:
        for process in started:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()
    return [json.loads(path.read_text()) for path in paths]


def agrees(result: Any, alone: Any) -> None:
    curve, logits = alone
    assert np.allclose(result["loss"], [epoch.loss for epoch in curve], atol=1e-3)
    assert np.allclose(result["val_loss"], [epoch.val_loss for epoch in curve], atol=1e-2)
    ours = np.array(result["logits"])
    assert (
        np.abs(
            (ours - ours.mean(1, keepdims=True)) - (logits - logits.mean(1, keepdims=True))
        ).max()
        < 0.1
    )


def test_one_device_needs_no_strategy() -> None:
    assert find_strategy() is None


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_those_of_one(
    workshop: Callable[..., Context], alone: Any, tmp_path: Path
) -> None:
    ports = choose_ports(tmp_path, "workers", 2)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    environments = [
        {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": number}})}
        for number in range(2)
    ]
    first, second = results(workshop().layout.root, tmp_path, environments)
    assert first == second
    assert first["replicas"] == 2
    agrees(first, alone)


@pytest.mark.slow
def test_two_devices_of_one_process_train_like_one(
    workshop: Callable[..., Context], alone: Any, tmp_path: Path
) -> None:
    (result,) = results(workshop().layout.root, tmp_path, [{"DEVICES": "2"}])
    assert result["strategy"] == "MirroredStrategy"
    assert result["replicas"] == 2
    agrees(result, alone)

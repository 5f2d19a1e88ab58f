"""The training stage shared out over devices and over processes, against one alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.local.processes import choose_ports
from tasks.model.files import read_weights
from tasks.project import Project
from tasks.stage import Context
from tasks.training.end_to_end import find_strategy, named_workers
from tests.fixtures.worker import plain_context

Checkout = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkout(
    workshop: Callable[..., Context], tmp_path_factory: pytest.TempPathFactory
) -> Checkout:
    """`checkout(name)` is a copy of the prepared photos and backbone."""
    folder = tmp_path_factory.mktemp("workers")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(workshop().project.root, folder / name))

    return copy


@pytest.fixture(scope="module")
def alone(checkout: Checkout) -> Path:
    """The stage's result on one device, by `keras.Model.fit`."""
    root = checkout("alone")
    run({root: {}})
    return root


def run(environments: dict[Path, dict[str, str]]) -> None:
    """Run one worker process for each checkout, all at once."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fixtures.worker", root],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for root, environment in environments.items()
    ]
    try:
        for process in started:
            _, said = process.communicate(timeout=500)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()


def weights_of(root: Path) -> dict[str, np.ndarray]:
    return read_weights(Project(root).weights("full") / "weights.safetensors")


def agree(root: Path, alone: Path) -> None:
    """The same curve and weights but for rounding, and weights that have moved."""
    curves = [
        json.loads((Project(one).weights("full") / "history.json").read_text())["epochs"]
        for one in (root, alone)
    ]
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-2)
    ours, theirs = weights_of(root), weights_of(alone)
    rate = plain_context(root).params.phases["full"].learning_rate
    far = [np.abs(ours[name] - theirs[name]).mean() for name in theirs]
    assert max(far) < rate, dict(zip(theirs, far, strict=True))


def test_one_device_needs_no_strategy() -> None:
    assert find_strategy().num_replicas_in_sync == 1


@pytest.mark.parametrize("broken", ["", "nonsense", "[]", '{"cluster": 5}', '{"cluster": {}}'])
def test_a_config_that_names_nobody_has_no_workers(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setenv("TF_CONFIG", broken)
    assert named_workers() == []


def config(addresses: list[str], number: int) -> str:
    task = {"type": "worker", "index": number}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


@pytest.mark.slow
def test_a_worker_whose_others_do_not_come_ends_and_says_for_whom_it_waited(
    checkout: Checkout, tmp_path: Path
) -> None:
    addresses = [f"127.0.0.1:{port}" for port in choose_ports(2)]
    command = [sys.executable, "-m", "tests.fixtures.worker", checkout("left")]
    environment = {**os.environ, "TF_CONFIG": config(addresses, 0), "WAIT": "5"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGALRM
    assert f"for the workers in TF_CONFIG ({', '.join(addresses)})" in done.stderr


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(
    checkout: Checkout, alone: Path, tmp_path: Path
) -> None:
    addresses = [f"127.0.0.1:{port}" for port in choose_ports(2)]
    roots = [checkout("first"), checkout("second")]
    run({root: {"TF_CONFIG": config(addresses, number)} for number, root in enumerate(roots)})
    files = [(Project(root).weights("full") / "weights.safetensors").read_bytes() for root in roots]
    assert files[0] == files[1]
    agree(roots[0], alone)


@pytest.mark.slow
def test_two_devices_of_one_process_train_like_one(checkout: Checkout, alone: Path) -> None:
    root = checkout("mirrored")
    run({root: {"DEVICES": "2"}})
    agree(root, alone)

"""The training stage shared out over devices and over processes, against one alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flows.local.processes import choose_ports
from tasks.model.files import read_weights
from tasks.project import Project
from tests.fixtures.models import Repo
from tests.fixtures.worker import plain_context


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

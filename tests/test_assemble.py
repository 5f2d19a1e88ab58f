"""The whole chain at 32 x 32: features, three phases, one model file."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from tasks.assemble import assemble
from tasks.data.dataset import open_dataset
from tasks.errors import ModelError, StageError
from tasks.features import extract
from tasks.model.augment import enlarge
from tasks.model.feature_store import open_features
from tasks.model.inference import load_classifier
from tasks.model.network import build_model, build_trunk, load_model
from tasks.model.weights import BACKBONE_FILE, read_phase
from tasks.project import Project
from tasks.stage import Context
from tasks.train import train
from tasks.training.tail import FULL, MIXED, Tail, put_tail
from tests.fixtures.models import SIZE
from tests.fixtures.photos import CHECKOUT

Workshop = Callable[..., Context]
PHASES = ["base", "fine_tune", "full"]


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """All phases trained on stored features, the last one calibrated."""
    shared = workshop()
    project = Project(tmp_path_factory.mktemp("trained"))
    shutil.copytree(shared.project.artifacts, project.artifacts)
    context = Context(project, shared.params)
    extract(context, SIZE)
    for phase in PHASES:
        train(context, phase, SIZE)
    assemble(context, SIZE)
    return context


def test_diverged_phase_writes_nothing(trained: Context, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(trained.project.artifacts, project.artifacts)
    shutil.rmtree(project.weights("full"))
    phases = trained.params.phases
    wild = phases | {"full": phases["full"].model_copy(update={"learning_rate": 1e30})}
    context = Context(project, trained.params.model_copy(update={"phases": wild}))
    with pytest.raises(StageError, match=r"full diverged in epoch 1\..*learning_rate"):
        train(context, "full", SIZE)
    assert not project.weights("full").exists()


def test_phase_says_which_weights_it_lacks(trained: Context, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(trained.project.artifacts, project.artifacts)
    shutil.rmtree(project.weights("fine_tune"))
    with pytest.raises(ModelError, match=r"fine_tune/weights\.safetensors'"):
        train(Context(project, trained.params), "full", SIZE)


def test_history_tells_each_epoch_and_no_times(trained: Context) -> None:
    for phase in PHASES:
        history = json.loads((trained.project.weights(phase) / "history.json").read_text())
        assert history["phase"] == phase
        assert history["images"] == 24
        assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
        assert set(history["epochs"][0]) == {
            "epoch",
            "loss",
            "accuracy",
            "val_loss",
            "val_accuracy",
        }


def test_a_phase_trains_in_float32_where_bfloat16_would_be_emulated(
    trained: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    runs = []
    for wanted in (MIXED, FULL):
        project = Project(tmp_path / wanted)
        shutil.copytree(trained.project.artifacts, project.artifacts)
        training = trained.params.training.model_copy(update={"precision": wanted})
        with caplog.at_level(logging.INFO, "tasks.train"):
            train(
                Context(project, trained.params.model_copy(update={"training": training})),
                "full",
                SIZE,
            )
        folder = project.weights("full")
        runs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert runs[0] == runs[1]
    assert json.loads(runs[0]["history.json"])["precision"] == FULL
    assert [record.getMessage() for record in caplog.records] == [
        "Phase full trains in float32: mixed_bfloat16 would be emulated here."
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_model_file_gives_the_tails_probabilities(
    trained: Context, tmp_path: Path, temperature: float
) -> None:
    project = Project(tmp_path)
    shutil.copytree(trained.project.artifacts, project.artifacts)
    weights = read_phase(project, "full")
    training = trained.params.training.model_copy(update={"temperature": temperature})
    params = trained.params.model_copy(update={"training": training})
    assemble(Context(project, params), SIZE)

    dataset, features = open_dataset(project.dataset), open_features(project.features)
    photos = enlarge(dataset.images, SIZE).astype(np.float32)
    given = np.asarray(load_model(project.model, SIZE)(photos, training=False))
    exact = build_trunk(project.weights("backbone") / BACKBONE_FILE, SIZE)(photos, training=False)
    halved = features.batch([features.row(name, 0) for name in dataset.names])
    model = build_model(size=SIZE)
    put_tail(model, weights)
    tail = Tail(model)
    # Stored activations are rounded to float16; over one place instead of 49 it shows.
    for activations, tolerance in ((exact, 1e-4), (halved.astype(np.float32), 2e-3)):
        logits = np.asarray(tail.logits(tail.pooled(activations)))
        expected = softmax(logits / temperature, axis=1)
        np.testing.assert_allclose(given, expected, atol=tolerance)
    assert given.max() > 0.3


def test_graph_gives_the_model_files_probabilities(trained: Context) -> None:
    images = open_dataset(trained.project.dataset).images
    detail = trained.params.preprocess.image_size
    model, graph = (
        load_classifier(path, detail, SIZE).probabilities(images)
        for path in (trained.project.model, trained.project.graph)
    )
    np.testing.assert_allclose(graph, model, atol=1e-4)
    assert np.ptp(graph, axis=0).max() > 0.1


def test_another_process_writes_the_same_files(trained: Context, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(trained.project.artifacts, project.artifacts)
    written = [path.relative_to(tmp_path) for path in (project.model, project.graph)]
    for path in written:
        (tmp_path / path).unlink()
    program = (
        "import sys; from pathlib import Path; from tasks.assemble import assemble; "
        "from tasks.project import Project; from tasks.params import load_params; "
        "from tasks.stage import Context; "
        "params = load_params(Path(sys.argv[2])); "
        f"assemble(Context(Project(Path(sys.argv[1])), params), {SIZE})"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(CHECKOUT.params)]
    subprocess.run(command, check=True, capture_output=True)
    for path in written:
        assert (tmp_path / path).read_bytes() == (trained.project.root / path).read_bytes(), path


def test_kept_val_loss_is_the_model_files(trained: Context) -> None:
    dataset = open_dataset(trained.project.dataset)
    rows = dataset.rows("val")
    photos = enlarge(dataset.images[rows], SIZE).astype(np.float32)
    given = np.log(np.asarray(load_model(trained.project.model, SIZE)(photos, training=False)))
    likely = log_softmax(given, axis=1)[np.arange(len(rows)), dataset.labels[rows]]
    history = json.loads((trained.project.weights("full") / "history.json").read_text())
    assert history["val_loss"] == pytest.approx(-likely.mean(), abs=1e-3)


def test_chain_twice_gives_the_same_bytes(trained: Context, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(trained.project.artifacts, project.artifacts)
    for phase in PHASES:
        shutil.rmtree(project.weights(phase))
        train(Context(project, trained.params), phase, SIZE)
    assemble(Context(project, trained.params), SIZE)
    for path in sorted(trained.project.artifacts.rglob("*")):
        if path.is_file():
            again = project.artifacts / path.relative_to(trained.project.artifacts)
            assert again.read_bytes() == path.read_bytes(), path

"""The functional model, its files, and the tail that trains in its place."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from tasks.data.dataset import open_dataset
from tasks.errors import ModelError
from tasks.model.augment import enlarge
from tasks.model.files import BACKBONE_FILE, load_model, read_phase
from tasks.model.inference import load_classifier
from tasks.model.network import (
    CUT,
    HEAD,
    LAYERS,
    Tail,
    backbone_of,
    build_model,
    build_trunk,
    freeze,
    set_tail,
)
from tasks.params import INPUT_SIZE, MAX_TRAINABLE_LAYERS, Params
from tasks.stage import Context
from tests.fixtures.models import SIZE, copied
from tests.fixtures.photos import CHECKOUT, LABELS, STILL


@pytest.fixture(scope="module")
def model(chain: Context) -> Any:
    return load_model(chain.project.model)


def test_model_is_the_documented_one(model: Any) -> None:
    assert isinstance(model, keras.Model)
    names = ["photo", "augmentation", "efficientnetb0", "pool", "dropout", "predictions"]
    assert [layer.name for layer in model.layers] == names
    head = model.get_layer(HEAD)
    assert (head.units, head.activation) == (6, keras.activations.softmax)
    large = build_model(6)
    assert large.input_shape == (None, INPUT_SIZE, INPUT_SIZE, 3)
    assert backbone_of(large).get_layer(CUT).output.shape == (None, 7, 7, 192)
    layers = [layer.name for layer in backbone_of(model).layers]
    assert tuple(layers[-MAX_TRAINABLE_LAYERS:]) == LAYERS
    assert layers[-MAX_TRAINABLE_LAYERS - 1] == CUT
    with pytest.raises(ModelError, match=r"'block7a_expand_conv/kernel' of shape .* are missing"):
        set_tail(model, {})


def test_augmentation_runs_only_while_training_and_turns_no_hand_over(model: Any) -> None:
    photos = np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype(np.float32)
    layer = model.get_layer("augmentation")
    assert np.array_equal(layer(photos, training=False), photos)
    moved = np.asarray(layer(photos, training=True))
    assert not np.array_equal(moved, photos)
    assert 0 <= moved.min() <= moved.max() <= 255
    mirror = build_model(6, STILL.model_copy(update={"horizontal_flip": True}), size=SIZE)
    pictures = np.stack([photos[0]] * 32)
    flipped = np.asarray(mirror.get_layer("augmentation")(pictures, training=True))
    straight = sum(np.allclose(one, photos[0], atol=1) for one in flipped)
    mirrored = sum(np.allclose(one, photos[0][:, ::-1], atol=1) for one in flipped)
    assert straight + mirrored == 32
    assert 0 < mirrored < 32


@pytest.mark.parametrize("opened", [0, 10, 16])
def test_freeze_opens_the_top_and_never_a_batch_norm(model: Any, opened: int) -> None:
    freeze(model, opened)
    layers = backbone_of(model).layers
    trained = [layer.name for layer in layers if layer.trainable_variables]
    weighted = [layer.name for layer in layers[len(layers) - opened :] if layer.weights]
    assert trained == [name for name in weighted if not name.endswith("bn")]
    assert model.get_layer(HEAD).trainable


def test_the_model_files_give_the_tails_probabilities(chain: Context, params: Params) -> None:
    project, temperature = chain.project, params.training.temperature
    assert temperature != 1
    dataset = open_dataset(project.dataset)
    photos = enlarge(dataset.images, SIZE).astype(np.float32)
    stock = keras.saving.load_model(project.model, safe_mode=True)  # needs nothing of ours
    found = np.asarray(stock(photos, training=False))
    trunk = build_trunk(project.weights("backbone") / BACKBONE_FILE, SIZE)
    tail = Tail(read_phase(project, "full"), 6)
    logits = np.asarray(tail.logits(tail.pooled(trunk(photos, training=False))))
    np.testing.assert_allclose(found, softmax(logits / temperature, axis=1), atol=1e-4)
    assert np.ptp(found, axis=0).max() > 0.1
    graph = load_classifier(project.graph, params.preprocess, LABELS, SIZE)
    np.testing.assert_allclose(graph.probabilities(dataset.images), found, atol=1e-4)
    rows = dataset.rows("val")
    likely = log_softmax(np.log(found[rows]), axis=1)[range(len(rows)), dataset.labels[rows]]
    history = json.loads(project.history("full").read_text())
    assert history["val_loss"] == pytest.approx(-likely.mean(), abs=1e-3)


@pytest.mark.slow
def test_another_process_writes_the_same_files(chain: Context, tmp_path: Path) -> None:
    project = copied(chain, tmp_path).project
    for path in (project.model, project.graph):
        path.unlink()
    program = (
        "import sys; from pathlib import Path; from tasks.assemble import run; "
        "from tasks.project import Project; from tasks.params import load_params; "
        "from tasks.stage import Context; "
        "params = load_params(Path(sys.argv[2])); "
        f"run(Context(Project(Path(sys.argv[1])), params), size={SIZE})"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(CHECKOUT.params)]
    subprocess.run(command, check=True, capture_output=True)
    assert project.model.read_bytes() == chain.project.model.read_bytes()
    assert project.graph.read_bytes() == chain.project.graph.read_bytes()

"""The functional model, its files, and the tail that trains in its place."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from tasks.assemble import assemble
from tasks.data.dataset import open_dataset
from tasks.errors import ModelError
from tasks.model.augment import INPUT_SIZE, enlarge
from tasks.model.export import load_model, save_model
from tasks.model.inference import load_classifier
from tasks.model.network import (
    CUT,
    HEAD,
    backbone_of,
    build_model,
    build_trunk,
    freeze,
    set_tail,
)
from tasks.model.tail import LAYERS, Tail
from tasks.model.weights import BACKBONE_FILE, read_phase
from tasks.params import MAX_TRAINABLE_LAYERS, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.models import SIZE
from tests.fixtures.photos import CHECKOUT

Workshop = Callable[..., Context]


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> Any:
    context = workshop()
    return build_model(
        context.params.augmentation,
        context.params.training.dropout,
        size=SIZE,
        backbone_weights=context.project.weights("backbone") / BACKBONE_FILE,
    )


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype(np.float32)


def test_model_is_the_documented_one(model: Any) -> None:
    assert isinstance(model, keras.Model)
    assert [layer.name for layer in model.layers] == [
        "photo",
        "augmentation",
        "efficientnetb0",
        "pool",
        "dropout",
        "predictions",
    ]
    head = model.get_layer(HEAD)
    assert (head.units, head.activation) == (6, keras.activations.softmax)
    whole = build_model()
    assert whole.input_shape == (None, INPUT_SIZE, INPUT_SIZE, 3)
    assert backbone_of(whole).get_layer(CUT).output.shape == (None, 7, 7, 192)


def test_augmentation_runs_only_while_training(model: Any, photos: np.ndarray) -> None:
    layer = model.get_layer("augmentation")
    assert np.array_equal(layer(photos, training=False), photos)
    changed = np.asarray(layer(photos, training=True))
    assert not np.array_equal(changed, photos)
    assert changed.min() >= 0
    assert changed.max() <= 255


def test_augmentation_never_turns_a_hand_upside_down(params: Params) -> None:
    strong = params.augmentation.model_copy(
        update=dict.fromkeys(
            ["rotation", "zoom", "shift", "brightness", "contrast", "color_jitter"], 0
        )
    )
    layer = build_model(strong, size=SIZE).get_layer("augmentation")
    ramp = np.linspace(0, 255, SIZE, dtype=np.float32)
    picture = np.broadcast_to(
        ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.5, (SIZE, SIZE, 3)
    )
    changed = np.asarray(layer(np.stack([picture] * 32), training=True))
    assert np.allclose(changed[:, 0].mean(axis=(1, 2)), picture[0].mean(), atol=1)
    mirrored = [np.allclose(one, picture[:, ::-1], atol=1) for one in changed]
    assert 0 < sum(mirrored) < len(mirrored)


@pytest.mark.parametrize("opened", [0, 10, 16])
def test_freeze_opens_the_top_and_never_a_batch_norm(model: Any, opened: int) -> None:
    freeze(model, opened)
    layers = backbone_of(model).layers
    trained = [layer.name for layer in layers if layer.trainable_variables]
    weighted = [layer.name for layer in layers[len(layers) - opened :] if layer.weights]
    assert trained == [name for name in weighted if not name.endswith("bn")]
    assert model.get_layer(HEAD).trainable


def test_the_tail_is_what_lies_above_the_cut(model: Any) -> None:
    names = [layer.name for layer in backbone_of(model).layers]
    assert tuple(names[-MAX_TRAINABLE_LAYERS:]) == LAYERS
    assert names[-MAX_TRAINABLE_LAYERS - 1] == CUT


def test_weights_that_do_not_fit_are_named(model: Any) -> None:
    with pytest.raises(ModelError, match=r"'block7a_expand_conv/kernel' of shape .* are missing"):
        set_tail(model, {})


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_model_file_gives_the_tails_probabilities(
    chain: Context, tmp_path: Path, temperature: float
) -> None:
    project = Project(tmp_path)
    shutil.copytree(chain.project.artifacts, project.artifacts)
    training = chain.params.training.model_copy(update={"temperature": temperature})
    params = chain.params.model_copy(update={"training": training})
    assemble(Context(project, params), SIZE)

    dataset = open_dataset(project.dataset)
    photos = enlarge(dataset.images, SIZE).astype(np.float32)
    found = np.asarray(load_model(project.model)(photos, training=False))
    trunk = build_trunk(project.weights("backbone") / BACKBONE_FILE, SIZE)
    tail = Tail(read_phase(project, "full"))
    logits = np.asarray(tail.logits(tail.pooled(trunk(photos, training=False))))
    np.testing.assert_allclose(found, softmax(logits / temperature, axis=1), atol=1e-4)
    assert found.max() > 0.3
    graph = load_classifier(project.graph, params.preprocess, SIZE, trusted=True)
    np.testing.assert_allclose(graph.probabilities(dataset.images), found, atol=1e-4)
    assert np.ptp(found, axis=0).max() > 0.1


def test_the_last_phases_val_loss_is_the_model_files(chain: Context) -> None:
    dataset = open_dataset(chain.project.dataset)
    rows = dataset.rows("val")
    photos = enlarge(dataset.images[rows], SIZE).astype(np.float32)
    logits = np.log(np.asarray(load_model(chain.project.model)(photos, training=False)))
    likely = log_softmax(logits, axis=1)[np.arange(len(rows)), dataset.labels[rows]]
    history = json.loads(chain.project.history("full").read_text())
    assert history["val_loss"] == pytest.approx(-likely.mean(), abs=1e-3)


def test_another_process_writes_the_same_files(chain: Context, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(chain.project.artifacts, project.artifacts)
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
        assert (tmp_path / path).read_bytes() == (chain.project.root / path).read_bytes(), path


def test_a_saved_model_needs_nothing_of_ours(model: Any, photos: Any, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model.keras")
    stock = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    expected = np.asarray(model(photos, training=False))
    np.testing.assert_allclose(stock(photos, training=False), expected, atol=1e-6)

"""The architecture, its cut, and what a model file may and may not do."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tasks.assemble import save_model
from tasks.errors import ModelError
from tasks.model.network import (
    CUT,
    FEATURE_SHAPE,
    HEAD,
    INPUT_SIZE,
    TAIL_LAYERS,
    backbone_of,
    build_model,
    build_tail,
    build_trunk,
    freeze,
    load_model,
)
from tasks.model.weights import BACKBONE_FILE, read_phase
from tasks.params import BACKBONE, MAX_TRAINABLE_LAYERS, Params
from tasks.stage import Context
from tasks.training.tail import Tail, put_tail, tail_weights
from tests.fixtures.models import SIZE

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


def test_model_is_the_missions(model: Any) -> None:
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


def test_tail_is_what_lies_above_the_cut(model: Any) -> None:
    names = [layer.name for layer in backbone_of(model).layers]
    assert tuple(names[-MAX_TRAINABLE_LAYERS:]) == TAIL_LAYERS
    assert names[-MAX_TRAINABLE_LAYERS - 1] == CUT


def test_trunk_then_tail_is_the_whole_model(
    workshop: Workshop, model: Any, photos: np.ndarray
) -> None:
    trunk = build_trunk(workshop().project.weights("backbone") / BACKBONE_FILE, SIZE)
    tail = Tail(model)
    logits = tail.logits(tail.pooled(trunk(photos, training=False)))
    expected = np.asarray(model(photos, training=False))
    np.testing.assert_allclose(keras.ops.softmax(logits), expected, atol=1e-5)
    assert expected.std() > 1e-3


def test_model_without_trunk_trains_the_same_layers_from_the_same_start(
    workshop: Workshop, model: Any
) -> None:
    without = build_tail(SIZE, seed=0)
    weights = read_phase(workshop().project, BACKBONE)
    for one in (model, without):
        put_tail(one, weights)
    whole, alone = tail_weights(model), tail_weights(without)
    assert whole.keys() == alone.keys()
    assert all(np.array_equal(whole[name], alone[name]) for name in whole)
    features = np.random.default_rng(0).normal(0, 1, (4, *without.input_shape[1:]))
    logits = [Tail(one).logits(Tail(one).pooled(features.astype("f4"))) for one in (model, without)]
    assert np.array_equal(*logits)
    for opened in (0, 10, 16):
        for one in (model, without):
            freeze(one, opened)
        names = [[variable.path for variable in Tail(one).variables] for one in (model, without)]
        assert names[0] == names[1]
    assert build_tail().input_shape == (None, *FEATURE_SHAPE)


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


def test_loaded_model_gives_the_same_probabilities(
    tmp_path: Path, model: Any, photos: np.ndarray
) -> None:
    save_model(model, tmp_path / "model.keras")
    expected = np.asarray(model(photos, training=False))
    ours = load_model(tmp_path / "model.keras", SIZE)
    np.testing.assert_allclose(ours(photos, training=False), expected, atol=1e-6)
    stock = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(stock(photos, training=False), expected, atol=1e-6)


def test_a_files_own_architecture_is_never_built(tmp_path: Path, model: Any) -> None:
    save_model(model, tmp_path / "model.keras")
    changed = tmp_path / "changed.keras"
    with (
        zipfile.ZipFile(tmp_path / "model.keras") as source,
        zipfile.ZipFile(changed, "w") as target,
    ):
        for name in source.namelist():
            content = b"not even JSON" if name == "config.json" else source.read(name)
            target.writestr(name, content)
    assert load_model(changed, SIZE).count_params() == model.count_params()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no zip", b"no zip at all"])
def test_broken_model_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.keras"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"Received: '.*model\.keras'"):
        load_model(path, SIZE)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    other = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    other.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match="architecture"):
        load_model(tmp_path / "model.keras", SIZE)

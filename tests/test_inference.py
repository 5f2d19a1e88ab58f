"""Classifying pictures: arrays, files from anywhere, and model files from anywhere."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.data.images import MAX_BYTES
from tasks.errors import ModelError
from tasks.model.inference import BATCH, Classifier, Prediction, classify_files, load_classifier
from tasks.model.untrusted import MAX_FILE
from tasks.params import LABELS, PreprocessParams
from tests.fixtures.photos import photo


def by_brightness(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A model in one line: the brighter the photo, the higher the sign."""
    level = photos.mean(axis=(1, 2, 3))[:, None] / 255 * 5
    closeness = np.exp(-4 * (level - np.arange(6)) ** 2)
    return (closeness / closeness.sum(axis=1, keepdims=True)).astype(np.float32)


RESIZE = PreprocessParams(image_size=16, blur_sigma=0.5)
BRIGHTNESS = Classifier(by_brightness, preprocess=RESIZE, size=32)


def grey(*signs: int, side: int = 16) -> NDArray[np.uint8]:
    return np.stack([np.full((side, side, 3), sign * 51, np.uint8) for sign in signs])


def test_probabilities_keep_the_order_over_batches_and_tell_how_far_they_are() -> None:
    signs = np.random.default_rng(0).integers(0, 6, 2 * BATCH + 5)
    told: list[tuple[str, int, int]] = []
    p = BRIGHTNESS.probabilities(grey(*signs), lambda *news: told.append(news))
    assert p.dtype == np.float32
    assert p.argmax(axis=1).tolist() == signs.tolist()
    assert [(done, total) for _, done, total in told] == [(32, 69), (64, 69), (69, 69)]


def test_what_is_no_probability_is_no_answer() -> None:
    def overflow(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.where(photos.mean(axis=(1, 2, 3))[:, None] > 100, np.nan, 1 / 6) + np.zeros(6)

    classifier = Classifier(overflow, preprocess=RESIZE, size=32)
    assert classifier.probabilities(grey(0, 1)).shape == (2, 6)
    with pytest.raises(ModelError, match="not finite"):
        classifier.probabilities(grey(0, 4))


def test_files_are_read_in_any_shape_and_bad_ones_say_why(tmp_path: Path) -> None:
    bright = tmp_path / "bright.jpg"
    Image.new("RGB", (300, 200), (255, 255, 255)).save(bright)
    dark = tmp_path / "dark.png"
    Image.new("L", (20, 90), 0).save(dark)
    (tmp_path / "note.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.jpg").write_bytes(bright.read_bytes()[:700])
    names = ["note.jpg", "bright.jpg", "missing.png", "empty.png", "dark.png", "half.jpg", "."]
    found = classify_files(BRIGHTNESS, [tmp_path / name for name in names])
    assert [prediction.path.name for prediction in found[:-1]] == names[:-1]
    assert [prediction.label for prediction in found] == [None, "5", None, None, "0", None, None]
    reasons = [prediction.error or "" for prediction in found]
    assert "not an image" in reasons[0]
    assert reasons[2] == "no such file"
    assert "zero bytes" in reasons[3]
    assert "truncated" in reasons[5] or "damaged" in reasons[5]
    assert reasons[6] == "not a file"


def test_only_bad_files_are_no_exception(tmp_path: Path) -> None:
    found = classify_files(BRIGHTNESS, [tmp_path / "a.png", tmp_path / "b.png"])
    assert [prediction.error for prediction in found] == ["no such file"] * 2
    assert classify_files(BRIGHTNESS, []) == []


def test_an_endless_file_is_refused_after_its_allowance(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES * 8)
    (prediction,) = classify_files(BRIGHTNESS, [tmp_path / "huge.png"])
    assert "too large" in str(prediction.error)


def test_a_file_and_the_same_pixels_in_the_dataset_get_the_same_probabilities(
    photos: Callable[..., Path],
) -> None:
    folder = photos(per_class=2, size=16)
    paths = sorted(folder.glob("*/*.png"))
    images = np.stack([photo(index, number, 16) for index in range(6) for number in range(2)])
    expected = BRIGHTNESS.probabilities(images)
    found = np.array([p.probabilities for p in classify_files(BRIGHTNESS, paths)], np.float32)
    assert np.array_equal(found, expected)


def test_a_prediction_in_json_has_probabilities_by_sign_or_a_reason() -> None:
    good = Prediction(Path("a.png"), (0.1, 0.5, 0.1, 0.1, 0.1, 0.1)).to_json()
    assert good["label"] == "1"
    assert list(good["probabilities"]) == list(LABELS)
    bad = Prediction(Path("b.png"), error="zero bytes").to_json()
    assert bad == {"file": "b.png", "error": "zero bytes"}
    odd = Prediction(Path(os.fsdecode(b"odd-\xff.png")), error="zero bytes").to_json()
    assert odd["file"].encode("utf-8").startswith(b"odd-")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen graph of a random model for 32 pixels."""
    from tasks.model.export import export_graph
    from tasks.model.network import build_model

    path = tmp_path_factory.mktemp("graph") / "model.pb"
    path.write_bytes(export_graph(build_model(size=32, seed=3)))
    return path


def test_a_graph_gives_rows_that_do_not_depend_on_their_neighbours(graph: Path) -> None:
    classifier = load_classifier(graph, preprocess=RESIZE, size=32)
    images = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 64, 64, 3), np.uint8)
    together = classifier.probabilities(images)
    alone = [classifier.probabilities(image[None])[0] for image in images]
    turned = classifier.probabilities(images[::-1])[::-1]
    assert together.dtype == np.float32
    assert np.array_equal(together, alone)
    assert np.array_equal(together, turned)
    assert len(np.unique(together, axis=0)) > 1
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)


def test_predicting_with_a_graph_imports_no_library_it_does_not_need(
    graph: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "photo.png")
    heavy = ("tensorflow", "keras", "mlflow", "matplotlib", "sklearn", "scipy", "pandas", "dvc")
    program = (
        "import sys; from pathlib import Path; "
        "import flows.cli, flows.output, flows.workspace; "
        "import tasks.releases.pointer, tasks.releases.release; "
        "from tasks.model.inference import classify_files, load_classifier; "
        "from tasks.params import PreprocessParams; "
        "graph, photo = map(Path, sys.argv[1:]); "
        "resize = PreprocessParams(image_size=64, blur_sigma=0.5); "
        "(found,) = classify_files(load_classifier(graph, resize, 32), [photo]); "
        f"print(found.label, [m for m in {heavy} if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(graph), str(tmp_path / "photo.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    label, _, loaded = done.stdout.strip().partition(" ")
    assert label in LABELS, done.stderr
    assert loaded == "[]"


@pytest.mark.parametrize("content", [None, b"", b"no graph at all", b"\x0a\x04\x0a\x02ab"])
def test_a_broken_graph_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.pb"
    if content is not None:
        path.write_bytes(content)
    for trusted in (False, True):
        with pytest.raises(ModelError, match=r"'.*model\.pb'") as caught:
            load_classifier(path, preprocess=RESIZE, size=32, trusted=trusted)
    assert "\n" not in str(caught.value)


def test_a_graph_for_another_size_is_refused(graph: Path) -> None:
    with pytest.raises(ModelError, match=r"\(6,\) for photos of 32 pixels, not 6 prob"):
        load_classifier(graph, preprocess=RESIZE, size=64, trusted=True)
    with pytest.raises(ModelError, match=r"takes photos of 32 pixels, not of 64"):
        load_classifier(graph, preprocess=RESIZE, size=64)


def _with_op(graph: bytes, marker: Path) -> bytes:
    """The network, whose output also goes through an operation that writes a file."""
    from tensorflow.core.framework.graph_pb2 import GraphDef

    parsed = GraphDef.FromString(graph)
    name = parsed.node.add(name="name", op="Const")
    name.attr["dtype"].type = 7
    name.attr["value"].tensor.dtype = 7
    name.attr["value"].tensor.string_val.append(str(marker).encode())
    parsed.node.add(name="harm", op="WriteFile", input=["name", "name"])
    parsed.node.add(name="more_harm", op="PyFunc", input=[parsed.node[-3].name])
    return bytes(parsed.SerializeToString())


def _with_shape(graph: bytes, side: int) -> bytes:
    """The network with one constant of `side` times `side` numbers, told in four bytes."""
    from tensorflow.core.framework.graph_pb2 import GraphDef

    parsed = GraphDef.FromString(graph)
    kernel = next(
        node
        for node in parsed.node
        if node.op == "Const" and len(node.attr["value"].tensor.tensor_shape.dim) == 2
    )
    tensor = kernel.attr["value"].tensor
    tensor.tensor_content = b""
    tensor.float_val.append(0.5)
    tensor.tensor_shape.dim[1].size = side
    tensor.tensor_shape.dim[0].size = side
    return bytes(parsed.SerializeToString())


def _with_nan(graph: bytes) -> bytes:
    from tensorflow.core.framework.graph_pb2 import GraphDef

    parsed = GraphDef.FromString(graph)
    bias = next(
        node
        for node in parsed.node
        if node.op == "Const" and len(node.attr["value"].tensor.tensor_content) == 24
    )
    bias.attr["value"].tensor.tensor_content = np.full(6, np.nan, "f4").tobytes()
    return bytes(parsed.SerializeToString())


def test_a_harmful_graph_is_refused_within_its_memory(graph: Path, tmp_path: Path) -> None:
    path, marker = tmp_path / "bad.pb", tmp_path / "written"
    content = graph.read_bytes()
    cases = {
        "operation": (_with_op(content, marker), "."),
        "huge": (_with_shape(content, 1 << 20), "."),
        "nan": (_with_nan(content), "not finite"),
        "half": (content[: len(content) // 2], "."),
    }
    for bad, words in cases.values():
        path.write_bytes(bad)
        with pytest.raises(ModelError, match=words) as caught:
            load_classifier(path, preprocess=RESIZE, size=32)
        assert f"'{path}'" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


def test_only_small_pb_files_are_opened(tmp_path: Path) -> None:
    for name, words in (("model.keras", "is not a .pb file"), ("model.pb", "larger than 256 MiB")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(MAX_FILE + 1)
        with pytest.raises(ModelError, match=words):
            load_classifier(tmp_path / name, preprocess=RESIZE, size=32)

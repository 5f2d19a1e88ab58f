"""Scoring pictures through a model, from arrays and from files nobody vouches for."""

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
from tasks.errors import DataError, ModelError
from tasks.model.inference import BATCH, Classifier, Prediction, classify_files, load_classifier
from tasks.params import LABELS, Params
from tests.fixtures.photos import photo


def by_brightness(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A model in one line: the brighter the photo, the higher the sign."""
    level = photos.mean(axis=(1, 2, 3))[:, None] / 255 * 5
    closeness = np.exp(-4 * (level - np.arange(6)) ** 2)
    return (closeness / closeness.sum(axis=1, keepdims=True)).astype(np.float32)


BRIGHTNESS = Classifier(by_brightness, detail=16, size=32)


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

    classifier = Classifier(overflow, detail=16, size=32)
    assert classifier.probabilities(grey(0, 1)).shape == (2, 6)
    with pytest.raises(ModelError, match="not finite"):
        classifier.probabilities(grey(0, 4))


def test_no_images_give_no_rows() -> None:
    assert BRIGHTNESS.probabilities(np.empty((0, 16, 16, 3), np.uint8)).shape == (0, 6)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (grey(1)[0], r"\(n, d, d, 3\)\. Received: \(16, 16, 3\)"),
        (grey(1)[:, :, :8], r"Received: \(1, 16, 8, 3\)"),
        (grey(1)[..., :1], r"Received: \(1, 16, 16, 1\)"),
        (grey(1) / np.float32(255), "uint8 .* not scaled. Received: float32"),
    ],
)
def test_images_of_another_shape_or_scale_are_refused(images: np.ndarray, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        BRIGHTNESS.probabilities(images)


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


def test_a_missing_model_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.keras"):
        load_classifier(tmp_path / "model.keras", detail=64, size=32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen graph of a random model for 32 pixels."""
    from tasks.model.export import frozen_graph
    from tasks.model.network import build_model

    path = tmp_path_factory.mktemp("graph") / "model.pb"
    path.write_bytes(frozen_graph(build_model(size=32, seed=3)))
    return path


def test_a_graph_gives_rows_that_do_not_depend_on_their_neighbours(graph: Path) -> None:
    classifier = load_classifier(graph, detail=64, size=32)
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
        "graph, photo = map(Path, sys.argv[1:]); "
        "(found,) = classify_files(load_classifier(graph, 64, 32), [photo]); "
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
    with pytest.raises(ModelError, match=r"Received: '.*model\.pb'") as caught:
        load_classifier(path, detail=64, size=32)
    assert "\n" not in str(caught.value)


def test_a_graph_for_another_size_is_refused(graph: Path) -> None:
    with pytest.raises(ModelError, match=r"of 64 pixels\. Received: \(6,\) for 32 pixels"):
        load_classifier(graph, detail=64, size=64, vouched=True)
    with pytest.raises(ModelError, match=r"takes photos of 32 pixels, not of 64"):
        load_classifier(graph, detail=64, size=64)


def test_a_saved_model_gives_the_probabilities_keras_gives(tmp_path: Path, params: Params) -> None:
    from tasks.model.augment import enlarge
    from tasks.model.network import build_model

    # With the layers that only training uses, as the assemble stage saves it.
    model = build_model(params.augmentation, 0.3, size=32, seed=3)
    model.save(tmp_path / "model.keras")
    images = np.stack([photo(index % 6, index) for index in range(BATCH + 3)])
    classifier = load_classifier(tmp_path / "model.keras", detail=64, size=32)
    expected = model.predict(enlarge(images, 32).astype(np.float32), verbose=0)
    found = classifier.probabilities(images)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 0

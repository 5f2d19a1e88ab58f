"""Scoring pictures through a model, from arrays and from files nobody vouches for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.classifier import BATCH, Classifier, Prediction, classify_files, load_classifier
from tasks.errors import DataError, ModelError
from tasks.images import MAX_BYTES
from tasks.labels import LABELS
from tasks.params import Params
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


def test_a_missing_model_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.keras"):
        load_classifier(tmp_path / "model.keras", detail=64, size=32)


@pytest.mark.slow
def test_a_saved_model_gives_the_probabilities_keras_gives(tmp_path: Path, params: Params) -> None:
    from tasks.augment import enlarge
    from tasks.model import build_model

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

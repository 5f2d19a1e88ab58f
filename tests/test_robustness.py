"""Disturbed test photos: the same numbers every time, and what disturbs is seen."""

import numpy as np
import pytest

from tasks.gate import DISTURBANCES
from tasks.scoring.robustness import CORRUPTIONS, MOST_PHOTOS, evenly, robustness
from tests.fixtures.photos import photo
from tests.test_classifier import BRIGHTNESS


def greys(per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Photos whose brightness is the sign, which `BRIGHTNESS` reads."""
    labels = np.repeat(np.arange(6), per_class)
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    images[:] = (labels * 51)[:, None, None, None]
    return images, labels


def test_the_gate_expects_what_evaluate_scores() -> None:
    assert tuple(CORRUPTIONS) == DISTURBANCES


def test_a_reader_of_brightness_fails_under_other_light_only() -> None:
    images, labels = greys(per_class=10)
    kept = images.copy()
    told: list[tuple[str, int, int]] = []
    found = robustness(BRIGHTNESS, images, labels, lambda *news: told.append(news))
    accuracy = dict(found["accuracy"])
    assert found["photos"] == 60
    assert accuracy.pop("brightness") < 0.7
    assert set(accuracy.values()) == {1.0}
    assert found["interval"]["jpeg"] == [0.939828, 1.0]  # 60 / (60 + 1.959964 ** 2)
    assert told[-1] == ("disturb photos", 5, 5)
    assert found == robustness(BRIGHTNESS, images, labels)
    assert (images == kept).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_changes_a_photo_a_little(kind: str) -> None:
    image = photo(3, seed=1)
    one, other = CORRUPTIONS[kind](image, 1), CORRUPTIONS[kind](image, -1)
    for disturbed in (one, other):
        assert (disturbed.shape, disturbed.dtype) == (image.shape, np.uint8)
        change = np.abs(disturbed.astype(float) - image).mean()
        assert 1 < change < 50
    if kind in ("rotation", "brightness", "scale"):
        assert (one != other).any()


def test_a_colour_stays_that_colour_under_jpeg() -> None:
    image = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    assert np.abs(CORRUPTIONS["jpeg"](image, 1).astype(int) - image).max() < 8


def test_of_many_photos_each_class_gives_alike() -> None:
    labels = np.repeat(np.arange(6), [500, 3, 200, 100, 400, 90])
    rows = evenly(labels, MOST_PHOTOS)
    counts = np.bincount(labels[rows], minlength=6)
    assert len(rows) == MOST_PHOTOS
    assert counts[1] == 3
    assert counts[[0, 2, 3, 4, 5]].max() - counts[[0, 2, 3, 4, 5]].min() <= 1
    assert (np.diff(rows) > 0).all()
    assert evenly(labels[:7], 10).tolist() == list(range(7))

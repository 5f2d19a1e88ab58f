from pathlib import Path

import numpy as np
from PIL import Image

from tasks.data.dataset import Dataset
from tasks.model.augment import view
from tasks.params import load_params
from tasks.scoring.plots import GAP, HEAD, MARGIN, PHOTOS, SIDE, VIEWS, draw_views
from tests.fixtures.photos import CHECKOUT, photo

PARAMS = load_params(CHECKOUT.params).augmentation


def _dataset(of_each: int) -> Dataset:
    labels = np.repeat(np.arange(6), of_each)
    return Dataset(
        images=np.stack([photo(int(label), number) for number, label in enumerate(labels)]),
        names=tuple(f"{number:02d}.png" for number in range(len(labels))),
        labels=labels,
        splits=("train",) * len(labels),
    )


def test_each_sign_shows_its_first_photos_with_all_their_views(tmp_path: Path) -> None:
    dataset, path = _dataset(3), tmp_path / "plots" / "views.png"
    draw_views(path, dataset, 3, 20, PARAMS)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == MARGIN + PHOTOS * (4 * SIDE + GAP)
    for label in range(6):
        for place in range(PHOTOS):
            row, top = label * 3 + place, HEAD + label * (SIDE + GAP)
            for number in range(4):
                left = MARGIN + place * (4 * SIDE + GAP) + number * SIDE
                expected = view(dataset.images[row], dataset.names[row], number, 20, PARAMS, SIDE)
                assert np.array_equal(sheet[top : top + SIDE, left : left + SIDE], expected)


def test_few_photos_and_many_views_fit(tmp_path: Path) -> None:
    draw_views(tmp_path / "views.png", _dataset(1), 40, 20, PARAMS)
    sheet = np.asarray(Image.open(tmp_path / "views.png"))
    assert sheet.shape[1] == MARGIN + PHOTOS * ((VIEWS + 1) * SIDE + GAP)
    assert (sheet[HEAD : HEAD + SIDE, -SIDE:] == 255).all()


def test_the_same_photos_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw_views(tmp_path / name, _dataset(2), 2, 20, PARAMS)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()

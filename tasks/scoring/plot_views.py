"""Some photos and their views as one picture: what augmentation makes of hands."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tasks.labels import LABELS
from tasks.params import AugmentationParams
from tasks.pictures.augment import view
from tasks.pictures.dataset import Dataset
from tasks.whole import whole_file

PHOTOS, VIEWS = 2, 5
"""Photos of each sign, and augmented views of each, that are shown at most."""
SIDE, MARGIN, HEAD, GAP = 96, 34, 34, 10


def draw_views(
    path: Path, dataset: Dataset, views: int, seed: int, params: AugmentationParams
) -> None:
    """Draw the first training photos of each sign, each with its views to the right.

    Args:
        path: the PNG file to write.
        dataset: the preprocessed photos.
        views: augmented views of each photo.
        seed: `seed` of params.yaml.
        params: strength of each variation.
    """
    numbers = range(min(views, VIEWS) + 1)
    strip = len(numbers) * SIDE + GAP
    size = (MARGIN + PHOTOS * strip, HEAD + len(LABELS) * (SIDE + GAP))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((10, 8), "Photos as they are, and views of them to the right", "black", font)
    train = dataset.rows("train")
    for label, name in enumerate(LABELS):
        top = HEAD + label * (SIDE + GAP)
        pen.text((10, top + SIDE // 2 - 10), name, "black", font)
        for place, row in enumerate(train[dataset.labels[train] == label][:PHOTOS]):
            photo: NDArray[np.uint8] = np.asarray(dataset.images[row])
            for number in numbers:
                picture = view(photo, dataset.names[row], number, seed, params, SIDE)
                at = (MARGIN + place * strip + number * SIDE, top)
                sheet.paste(Image.fromarray(picture), at)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")

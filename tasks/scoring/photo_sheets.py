"""Overviews of photos: what the audit found, and what augmentation does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from tasks.data.dataset import Dataset
from tasks.data.photos import Photo
from tasks.io import atomic_write
from tasks.model.augment import augment
from tasks.params import LABELS, AugmentationParams

Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]

SAMPLES = 12
"""Photos of each class that the audit shows."""
PAIRS = 12
"""Near-duplicate pairs that the audit shows."""
PHOTOS, COPIES = 2, 5
"""Photos of each class, and augmented copies of each, that are shown at most."""
SIDE = 96


def tile(pictures: Pictures, columns: int, gap: int = 3) -> NDArray[np.uint8]:
    """Lay out pictures of one size row by row on white."""
    side = pictures[0].shape[0]
    rows = -(-len(pictures) // columns)
    height, width = (count * (side + gap) - gap for count in (rows, columns))
    sheet = np.full((height, width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (place * (side + gap) for place in divmod(number, columns))
        sheet[top : top + side, left : left + side] = picture
    return sheet


def draw_augmentation(
    path: Path, dataset: Dataset, copies: int, seed: int, params: AugmentationParams
) -> None:
    """Draw the first training photos of each class, one class a row, each with its copies.

    Args:
        path: the PNG file to write.
        copies: augmented copies of each photo.
    """
    numbers = range(min(copies, COPIES) + 1)
    train = dataset.rows("train")
    blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pictures = []
    for label in range(len(LABELS)):
        rows = train[dataset.labels[train] == label][:PHOTOS]
        pictures += [
            augment(np.asarray(dataset.images[row]), dataset.names[row], n, seed, params, SIDE)
            for row in rows
            for n in numbers
        ]
        pictures += [blank] * ((PHOTOS - len(rows)) * len(numbers))
    with atomic_write(path) as temporary:
        Image.fromarray(tile(pictures, PHOTOS * len(numbers))).save(temporary, format="PNG")


def draw_audit(
    path: Path,
    report: dict[str, Any],
    photos: Sequence[Photo],
    pictures: NDArray[np.uint8],
    sizes: NDArray[np.int64],
) -> None:
    """Draw the audit; the same input gives the same bytes.

    Args:
        path: the PNG file to write.
        report: content of `audit.json`.
        photos: as `tasks.data.photos.find_photos` lists them.
        pictures: uint8, (n, side, side, 3); one for each photo.
        sizes: int64, (n, 2); height and width of each photo in pixels.
    """
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["counts", "samples"], ["sizes", "samples"], ["pairs", "pairs"]],
        width_ratios=(1, 1.9),
        height_ratios=(2, 2, 1.6),
    )
    _draw_counts(axes["counts"], report["counts"])
    axes["sizes"].hist(sizes.min(axis=1), bins=24)
    axes["sizes"].set(title="Sizes", xlabel="shorter side in pixels", ylabel="photos")
    samples = [
        pictures[row]
        for label in LABELS
        for row in _spread([row for row, photo in enumerate(photos) if photo.label == label])
    ]
    _show(axes["samples"], tile(samples, SAMPLES), "Samples of each class")
    rows = {photo.key: row for row, photo in enumerate(photos)}
    pairs = _most_relevant(report)
    shown = [pictures[rows[key]] for pair in pairs for key in pair["photos"]]
    title = f"{len(report['pairs']):,} near-duplicate pairs"
    _show(axes["pairs"], tile(shown, PAIRS) if shown else pictures[:0], title)
    figure.savefig(path, metadata={"Software": None})


def _draw_counts(axes: Axes, counts: dict[str, dict[str, int]]) -> None:
    width = 0.8 / len(counts)
    for number, (folder, by_label) in enumerate(counts.items()):
        left = np.arange(len(LABELS)) + (number - (len(counts) - 1) / 2) * width
        bars = axes.bar(left, [by_label[label] for label in LABELS], width, label=folder)
        axes.bar_label(bars, size=8)
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set(title="Photos in data/", xlabel="class")
    axes.legend()


def _spread(rows: list[int]) -> list[int]:
    """`SAMPLES` rows evenly spread; the first one again where there are too few."""
    return [rows[number * len(rows) // SAMPLES] for number in range(SAMPLES)]


def _most_relevant(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Label conflicts first, then pairs across train and test, then the rest."""
    first = [tuple(pair["photos"]) for pair in (*report["conflicts"], *report["across"])]
    rank = {key: number for number, key in enumerate(dict.fromkeys(first))}
    pairs = sorted(
        report["pairs"],
        key=lambda pair: (rank.get(tuple(pair["photos"]), len(rank)), pair["rms"], pair["photos"]),
    )
    return pairs[:PAIRS]


def _show(axes: Axes, picture: NDArray[np.uint8], title: str) -> None:
    axes.set_axis_off()
    axes.set_title(title)
    if len(picture):
        axes.imshow(picture, interpolation="lanczos")

"""The audit as one picture: counts, samples, twins, sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from tasks.labels import LABELS
from tasks.pictures.photos import Photo

SAMPLES = 12
SHOWN_TWINS = 12
TWINS_A_ROW = 6

INK = "#22303c"
QUIET = "#8a97a3"
COLOURS = {"train": "#3b6ea5", "test": "#e0a03c"}
ALARM = "#c0392b"

Pictures = NDArray[np.uint8]


def draw_audit(
    path: Path,
    report: dict[str, Any],
    photos: Sequence[Photo],
    pictures: Pictures,
    sizes: NDArray[np.int64],
) -> None:
    """Draw the audit; the same input gives the same bytes.

    Args:
        path: the PNG file to write.
        report: content of `audit.json`.
        photos: as `tasks.pictures.photos.find_photos` lists them.
        pictures: uint8, (n, side, side, 3); one for each photo.
        sizes: int64, (n, 2); height and width of each photo in pixels.
    """
    rows = -(-min(SHOWN_TWINS, len(report["twins"])) // TWINS_A_ROW)
    heights = [6.2] + ([0.6 + 1.3 * rows] if rows else [])
    figure = Figure(figsize=(13.0, sum(heights)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if rows:
        _draw_twins(parts[1], rows, report, photos, pictures)
    parts[0].text(0.025, 0.945, _title(report), size=15, color=INK, weight="bold")
    left, right = parts[0].subfigures(1, 2, squeeze=False, width_ratios=[1.0, 1.9])[0]
    varied = report["sizes"]["distinct"] > 1
    axes = left.subplots(2 if varied else 1, 1, squeeze=False)[:, 0]
    left.subplots_adjust(left=0.1, right=0.96, top=0.86, bottom=0.08, hspace=0.5)
    _draw_counts(axes[0], report["counts"])
    if varied:
        _draw_sizes(axes[1], sizes)
    _draw_samples(right, photos, pictures)
    figure.savefig(path, metadata={"Software": None})


def _title(report: dict[str, Any]) -> str:
    return (
        f"{report['photos']:,} photos: {report['duplicates']} near-duplicates, "
        f"{len(report['excluded'])} kept out of training"
    )


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=9, length=0)


def _draw_counts(axes: Axes, counts: dict[str, dict[str, int]]) -> None:
    width = 0.8 / len(counts)
    for place, (folder, by_label) in enumerate(counts.items()):
        left = np.arange(len(LABELS)) + (place - (len(counts) - 1) / 2) * width
        heights = [by_label[label] for label in LABELS]
        bars = axes.bar(left, heights, width * 0.94, color=COLOURS[folder], label=folder)
        axes.bar_label(bars, size=8, color=INK, padding=2)
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_xlabel("sign", size=9, color=INK)
    axes.margins(y=0.12)
    _plain(axes, "Photos of each sign in data/")
    if len(counts) > 1:
        axes.legend(
            frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.97)
        )


def _draw_sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    axes.hist(sizes.min(axis=1), bins=24, color=COLOURS["train"], rwidth=0.94)
    axes.set_xlabel("shorter side, pixels", size=9, color=INK)
    _plain(axes, "Sizes of the stored photos")


def _draw_samples(place: SubFigure, photos: Sequence[Photo], pictures: Pictures) -> None:
    axes = place.subplots(len(LABELS), 1)
    place.subplots_adjust(left=0.05, right=0.985, top=0.86, bottom=0.01, hspace=0.04)
    side = pictures.shape[1]
    for axis, label in zip(axes, LABELS, strict=True):
        rows = [row for row, photo in enumerate(photos) if photo.label == label]
        chosen = [rows[k * len(rows) // SAMPLES] for k in range(min(SAMPLES, len(rows)))]
        strip = np.full((side, SAMPLES * (side + 3) - 3, 3), 255, np.uint8)
        for k, row in enumerate(chosen):
            strip[:, k * (side + 3) : k * (side + 3) + side] = pictures[row]
        axis.imshow(strip, interpolation="lanczos")
        axis.set_anchor("NW")
        axis.set_axis_off()
        axis.text(-12, side / 2, label, ha="right", va="center", size=13, color=INK)
    axes[0].set_title("Samples of each sign", loc="left", size=11, color=INK)


def _draw_twins(
    place: SubFigure,
    rows: int,
    report: dict[str, Any],
    photos: Sequence[Photo],
    pictures: Pictures,
) -> None:
    axes = place.subplots(rows, TWINS_A_ROW, squeeze=False)
    top = 1.0 - 0.55 / (0.6 + 1.3 * rows)
    place.subplots_adjust(left=0.025, right=0.985, top=top, bottom=0.03, wspace=0.08, hspace=0.22)
    row_of = {photo.key: row for row, photo in enumerate(photos)}
    shown = _most_telling(report)
    title = f"Twins: {len(shown)} of {report['pairs']:,} pairs, by root-mean-square difference"
    place.text(0.025, 1.0 - 0.2 / (0.6 + 1.3 * rows), title, size=11, color=INK)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, pair in zip(axes.flat, shown, strict=False):
        left, right = (pictures[row_of[key]] for key in pair["photos"])
        gap = np.full((left.shape[0], 3, 3), 255, np.uint8)
        axis.imshow(np.concatenate([left, gap, right], axis=1), interpolation="lanczos")
        text, colour = _caption(pair)
        axis.set_title(text, size=8, color=colour, pad=3)


def _most_telling(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Two labels first, then across train and test, then a spread; shown by difference."""
    pairs = {tuple(pair["photos"]): pair for pair in report["twins"]}
    first = [pairs.pop(key) for key in _keys([*report["conflicts"], *report["across"]])]
    rest = sorted(pairs.values(), key=lambda pair: pair["rms"])
    free = max(0, SHOWN_TWINS - len(first))
    spread = np.linspace(0, len(rest) - 1, min(free, len(rest))).round().astype(int)
    shown = first[:SHOWN_TWINS] + [rest[k] for k in spread]
    return sorted(shown, key=lambda pair: (pair["rms"], pair["photos"]))


def _keys(pairs: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(pair["photos"]) for pair in pairs))


def _caption(pair: dict[str, Any]) -> tuple[str, str]:
    (folder, label, _), (other_folder, other_label, _) = (k.split("/") for k in pair["photos"])
    text = f"sign {label}, RMS {pair['rms']:.1f}"
    if label != other_label:
        return f"sign {label} and {other_label}, RMS {pair['rms']:.1f}", ALARM
    if folder != other_folder:
        return f"{text}, {folder} and {other_folder}", ALARM
    return text, INK

"""Plots of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn import metrics as sk

from tasks.data.dataset import Dataset
from tasks.data.photos import Photo
from tasks.io import atomic_write
from tasks.model.augment import view
from tasks.params import LABELS, AugmentationParams
from tasks.scoring.metrics import CALIBRATION_BINS, Scores, calibration_error, reliability

DPI = 120
INK, FAINT, PALE = "#24292f", "#8c959f", "#eef2f6"
BLUE, ORANGE = "#0072b2", "#d55e00"
CLASS_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00")
"""Okabe and Ito's palette, told apart by all common kinds of colour vision."""
CLASS_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MOST_MISTAKES = 24
LEAST_CERTAIN = 12
COLUMNS = 6
FEWEST_COLUMNS = 3  # as wide as the title


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole; the same figure gives the same bytes."""
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, dpi=DPI, facecolor="white", metadata={"Software": None})


def curves(histories: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy of all phases, one after the other.

    Args:
        histories: contents of the phases' `history.json`, in order.

    Returns:
        Two axes, loss and accuracy over epochs; phases shaded and named.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    epochs = [epoch for history in histories for epoch in history["epochs"]]
    x = np.arange(1, len(epochs) + 1)
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        _clean(axes)
        for key, name, colour, mark in (
            (measure, "train", BLUE, "o"),
            (f"val_{measure}", "validation", ORANGE, "s"),
        ):
            values = [epoch[key] for epoch in epochs]
            axes.plot(x, values, color=colour, marker=mark, markersize=3.5, lw=1.6, label=name)
        _shade_phases(axes, histories)
        axes.set(xlabel="epoch", ylabel=measure, xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="upper right" if measure == "loss" else "lower right")
    loss, accuracy = figure.axes
    loss.set_ylim(bottom=0)
    accuracy.set_ylim(top=1.005)
    return figure


def confusion(scores: Scores) -> Figure:
    """Draw the confusion matrix with counts, and recall by the row.

    Args:
        scores: as of `tasks.scoring.metrics.score`.

    Returns:
        The figure; the caller saves it.
    """
    matrix = np.array(scores.confusion_matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        text = str(matrix[row, column]) if matrix[row, column] else "·"
        colour = "white" if share[row, column] > 0.5 else INK if matrix[row, column] else FAINT
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=12)
    ticks = range(len(LABELS))
    axes.set_xticks(ticks, LABELS)
    axes.set_yticks(ticks, LABELS)
    axes.set(xlabel="sign that the model read", ylabel="sign that was shown")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(ticks, [_ratio(item.recall) for item in scores.per_class])
    beside.tick_params(length=0, colors=INK)
    beside.spines[:].set_visible(False)
    beside.set_ylabel("recall", color=INK)
    low, high = scores.accuracy_interval
    axes.set_title(
        f"{scores.accuracy:.1%} of {scores.n} test photos right (95%: {low:.1%} to {high:.1%})",
        fontsize=11,
        color=INK,
    )
    return figure


def roc_pr(p: np.ndarray, y: np.ndarray) -> Figure:
    """Draw each class against the rest: ROC and precision over recall.

    Args:
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        Two axes; a class without a photo has no curve, and the legend says so.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    for axes in (roc, pr):
        _clean(axes)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    roc.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    for index, label in enumerate(LABELS):
        own = y == index
        style: dict[str, Any] = {
            "color": CLASS_COLOURS[index],
            "ls": CLASS_DASHES[index],
            "lw": 1.8,
        }
        if not own.any() or own.all():
            for axes in (roc, pr):
                axes.plot([], [], label=f"{label}: not defined", **style)
            continue
        wrong, right, _ = sk.roc_curve(own, p[:, index])
        roc.plot(wrong, right, label=f"{label}: {sk.auc(wrong, right):.4f}", **style)
        precision, recall, _ = sk.precision_recall_curve(own, p[:, index])
        mean = sk.average_precision_score(own, p[:, index])
        pr.plot(recall, precision, label=f"{label}: {mean:.4f}", **style)
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    pr.set(xlabel="recall", ylabel="precision")
    roc.legend(title="area under ROC", frameon=False, loc="lower right", handlelength=3)
    pr.legend(title="average precision", frameon=False, loc="lower left", handlelength=3)
    return figure


def reliability_diagram(p: np.ndarray, y: np.ndarray) -> Figure:
    """Draw accuracy over confidence, and how many photos stand behind each bar.

    Args:
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        The figure; the caller saves it.
    """
    count, confidence, accuracy = reliability(p, y)
    some = count > 0
    width = 1 / CALIBRATION_BINS
    middle = (np.arange(CALIBRATION_BINS) + 0.5) * width
    figure = Figure(figsize=(5.8, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes in (top, bottom):
        _clean(axes)
    top.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":", label="perfect calibration")
    top.bar(middle[some], accuracy[some], width * 0.92, color=BLUE, alpha=0.75, label="accuracy")
    top.hlines(
        confidence[some],
        middle[some] - width * 0.46,
        middle[some] + width * 0.46,
        color=ORANGE,
        lw=2.5,
        label="mean confidence",
    )
    top.set(ylim=(0, 1.03), ylabel="accuracy")
    top.legend(frameon=False, loc="upper left")
    top.set_title(f"Expected calibration error {calibration_error(p, y):.4f}", fontsize=11)
    bottom.bar(middle, count, width * 0.92, color=FAINT)
    for place, photos in zip(middle[some], count[some], strict=True):
        bottom.annotate(str(photos), (place, photos), ha="center", va="bottom", fontsize=8)
    bottom.set(xlim=(0, 1), xlabel="confidence", ylabel="photos", ylim=(0, count.max() * 1.25))
    return figure


def mistakes(images: np.ndarray, p: np.ndarray, y: np.ndarray) -> Figure:
    """Show the photos that were misread with their six probabilities.

    Args:
        images: uint8, (n, side, side, 3), RGB.
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        The most certain mistakes first; without any, the least certain photos.
    """
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    wrong = np.flatnonzero(predicted != y)
    if len(wrong):
        rows = wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST_MISTAKES]
        shown = "" if len(rows) == len(wrong) else f"; the {len(rows)} most certain"
        title = f"{len(wrong)} of {len(y)} test photos misread{shown}"
    else:
        rows = np.argsort(confidence, kind="stable")[:LEAST_CERTAIN]
        title = f"None of {len(y)} test photos misread; the {len(rows)} least certain"
    columns = max(FEWEST_COLUMNS, min(COLUMNS, len(rows)))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.0 * columns, 2.95 * lines + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=13, color=INK, x=0.01, ha="left")
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=(2.6, 1) * lines)
    for cell in range(lines * columns):
        picture = grid[2 * (cell // columns)][cell % columns]
        bars = grid[2 * (cell // columns) + 1][cell % columns]
        if cell < len(rows):
            row = rows[cell]
            _photo_with_bars(picture, bars, images[row], p[row], int(y[row]))
        else:
            picture.set_axis_off()
            bars.set_axis_off()
    return figure


def _photo_with_bars(
    picture: Axes, bars: Axes, image: np.ndarray, p: np.ndarray, truth: int
) -> None:
    read = int(p.argmax())
    words = f"{LABELS[truth]} read as {LABELS[read]}" if read != truth else f"{LABELS[read]}, right"
    picture.imshow(image, interpolation="bicubic")
    picture.set_title(words, fontsize=10, color=INK, pad=3)
    picture.set_axis_off()
    colours = [FAINT] * len(LABELS)
    colours[read], colours[truth] = ORANGE, BLUE
    bars.bar(LABELS, p, color=colours, width=0.75)
    for index in {read, truth}:
        bars.annotate(f"{p[index]:.0%}", (index, p[index]), ha="center", va="bottom", fontsize=7)
    bars.set_ylim(0, 1.25)
    bars.set_yticks([])
    bars.tick_params(length=0, labelsize=8, colors=INK)
    bars.spines[["top", "left", "right"]].set_visible(False)
    bars.spines["bottom"].set_color(FAINT)


def _shade_phases(axes: Axes, histories: Sequence[Mapping[str, Any]]) -> None:
    start = 0.5
    for number, history in enumerate(histories):
        end = start + len(history["epochs"])
        if number % 2 == 0:
            axes.axvspan(start, end, color=PALE, zorder=0)
        axes.annotate(
            f"{history['phase']}\n{history['images']:,} photos",
            ((start + end) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
        start = end


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color="#d8dee4", lw=0.6)
    axes.set_axisbelow(True)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


SAMPLES = 12
SHOWN_PAIRS = 12
PAIRS_A_ROW = 6

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
        photos: as `tasks.data.photos.find_photos` lists them.
        pictures: uint8, (n, side, side, 3); one for each photo.
        sizes: int64, (n, 2); height and width of each photo in pixels.
    """
    rows = -(-min(SHOWN_PAIRS, len(report["pairs"])) // PAIRS_A_ROW)
    heights = [6.2] + ([0.6 + 1.3 * rows] if rows else [])
    figure = Figure(figsize=(13.0, sum(heights)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if rows:
        _draw_near_duplicates(parts[1], rows, report, photos, pictures)
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


def _draw_near_duplicates(
    place: SubFigure,
    rows: int,
    report: dict[str, Any],
    photos: Sequence[Photo],
    pictures: Pictures,
) -> None:
    axes = place.subplots(rows, PAIRS_A_ROW, squeeze=False)
    top = 1.0 - 0.55 / (0.6 + 1.3 * rows)
    place.subplots_adjust(left=0.025, right=0.985, top=top, bottom=0.03, wspace=0.08, hspace=0.22)
    row_of = {photo.key: row for row, photo in enumerate(photos)}
    shown = _most_telling(report)
    count = len(report["pairs"])
    title = f"Near-duplicates: {len(shown)} of {count:,} pairs, by root-mean-square difference"
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
    pairs = {tuple(pair["photos"]): pair for pair in report["pairs"]}
    first = [pairs.pop(key) for key in _keys([*report["conflicts"], *report["across"]])]
    rest = sorted(pairs.values(), key=lambda pair: pair["rms"])
    free = max(0, SHOWN_PAIRS - len(first))
    spread = np.linspace(0, len(rest) - 1, min(free, len(rest))).round().astype(int)
    shown = first[:SHOWN_PAIRS] + [rest[k] for k in spread]
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
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")

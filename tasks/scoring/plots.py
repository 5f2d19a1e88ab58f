"""Pictures of how a model was trained and where it errs.

Each function returns a figure; `save` writes it as a PNG whose bytes depend on
nothing but the figure. The object-oriented interface of matplotlib is used, so
that no global state and no display is touched.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn import metrics as sk

from tasks.labels import LABELS
from tasks.scoring.metrics import CALIBRATION_BINS, Scores, calibration_error, reliability
from tasks.whole import whole_file

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
    with whole_file(path) as temporary:
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

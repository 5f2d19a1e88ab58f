"""Plots of training and of test scores."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

from tasks.io import atomic_write
from tasks.scoring.metrics import CALIBRATION_BINS, Scores, calibration_error

COLORS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00")
"""Okabe and Ito's palette, distinguishable with all common kinds of color vision."""
BLUE, ORANGE = COLORS[4:]
MAX_CURVES = 20  # classes with curves; of more, those that are read worst
MAX_NUMBERS = 25  # classes up to which the confusion matrix shows counts
MAX_MISTAKES, LEAST_CONFIDENT, COLUMNS = 24, 12, 6


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically; the same figure gives the same bytes."""
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, dpi=120, metadata={"Software": None})


def curves(histories: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy over the epochs of all phases, from their `history.json`."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    epochs = [epoch for history in histories for epoch in history["epochs"]]
    x = range(1, len(epochs) + 1)
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, color, label in (("", BLUE, "train"), ("val_", ORANGE, "validation")):
            axes.plot(x, [one[prefix + measure] for one in epochs], "o-", color=color, label=label)
        start = 0.5
        for row, history in enumerate(histories):  # a phase may be one epoch, its name is wider
            name, height = f"{history['phase']}, {history['images']:,} images", 1.02 + 0.05 * row
            axes.text(start, height, name, transform=axes.get_xaxis_transform(), fontsize=9)
            axes.axvline(start, color="lightgrey", zorder=0)
            start += len(history["epochs"])
        axes.set(xlabel="epoch", ylabel=measure, xlim=(0.5, start))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def confusion(scores: Scores) -> Figure:
    names = [one.label for one in scores.per_class]
    count = len(names)
    side = min(max(0.0, 0.4 * (count - 6)), 16.0)
    figure = Figure(figsize=(6 + side, 5.6 + side), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay(np.array(scores.confusion_matrix), display_labels=names).plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        include_values=count <= MAX_NUMBERS,
        xticks_rotation="vertical" if max(map(len, names)) > 2 else "horizontal",
    )
    if count > 2 * MAX_NUMBERS:  # names would overlap
        axes.set(xticks=[], yticks=[])
    low, high = scores.accuracy_interval
    axes.set_title(
        f"{scores.accuracy:.1%} of {scores.n} test photos correct (95%: {low:.1%} to {high:.1%})",
        fontsize=11,
    )
    return figure


def roc_pr(p: np.ndarray, y: np.ndarray, names: Sequence[str]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    shown = [*range(len(names))]
    if len(names) > MAX_CURVES:
        found = np.bincount(y, p[np.arange(len(y)), y], minlength=len(names))
        mean = found / np.maximum(np.bincount(y, minlength=len(names)), 1)
        shown = sorted(np.argsort(mean, kind="stable")[:MAX_CURVES].tolist())
    few = len(names) <= len(COLORS)
    for place, index in enumerate(shown):
        label, positive = names[index], y == index
        if not positive.any() or positive.all():
            continue  # no curve is defined
        style = {"color": COLORS[place] if few else colormaps["tab20"](place)}
        for display, axes in ((RocCurveDisplay, roc), (PrecisionRecallDisplay, pr)):
            display.from_predictions(positive, p[:, index], name=label, ax=axes, curve_kwargs=style)
    for axes in (roc, pr):
        axes.legend(loc="lower right" if axes is roc else "lower left")
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    pr.set(xlabel="recall", ylabel="precision")
    return figure


def reliability_diagram(p: np.ndarray, y: np.ndarray) -> Figure:
    """Draw accuracy over confidence, and how the photos are spread over confidence."""
    confidence, correct = p.max(axis=1), (p.argmax(axis=1) == y).astype(int)
    figure = Figure(figsize=(5.8, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    CalibrationDisplay.from_predictions(
        correct, confidence, n_bins=CALIBRATION_BINS, ax=top, color=BLUE, name="model"
    )
    error = f"Expected calibration error {calibration_error(p, y):.4f}"
    top.set(title=error, xlabel="", ylabel="accuracy")
    bottom.hist(confidence, CALIBRATION_BINS, range=(0, 1), color=BLUE)
    bottom.set(xlabel="confidence", ylabel="photos", xlim=(0, 1))
    return figure


def mistakes(images: np.ndarray, p: np.ndarray, y: np.ndarray, names: Sequence[str]) -> Figure:
    """Show misclassified photos, the most confident first; without any, the least confident."""
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    wrong = np.flatnonzero(predicted != y)
    title = f"{len(wrong) or 'None'} of {len(y)} test photos misclassified"
    if len(wrong):
        rows = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_MISTAKES]
        title += "" if len(rows) == len(wrong) else f"; the {len(rows)} most confident"
    else:
        rows = np.argsort(confidence, kind="stable")[:LEAST_CONFIDENT]
        title += f"; the {len(rows)} least confident"
    verdicts = [f" as {names[predicted[row]]}" if len(wrong) else ", correct" for row in rows]
    captions = [
        f"{names[y[row]]}{verdict} ({confidence[row]:.0%})"
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    return grid(images[rows], captions, title)


def grid(
    pictures: Iterable[np.ndarray], captions: Sequence[str], title: str, fontsize: int = 10
) -> Figure:
    """Show pictures in rows of `COLUMNS`, each below its caption."""
    lines = -(-len(captions) // COLUMNS)
    figure = Figure(figsize=(2.0 * COLUMNS, 2.4 * lines + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    places: list[Axes] = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axes in places:
        axes.set_axis_off()
    for axes, picture, caption in zip(places, pictures, captions, strict=False):
        axes.imshow(picture, interpolation="bicubic")
        axes.set_title(caption, fontsize=fontsize)
    return figure

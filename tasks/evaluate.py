"""Stage: score the assembled model on the test split, once.

No earlier stage reads the test split. The model is `model.pb`, the file that a release
serves. Scores come from the rounded probabilities in `predictions.json`, so that anybody
can recompute them.
"""

from typing import Any

import numpy as np

from tasks.data.dataset import open_dataset
from tasks.errors import DataError, StageError
from tasks.io import read_json, write_json
from tasks.model.inference import load_classifier
from tasks.params import LABELS, PHASES
from tasks.scoring import plots
from tasks.scoring.metrics import checked, score, standard_errors
from tasks.scoring.robustness import robustness
from tasks.stage import Context, stage_main

DIGITS = 7
"""Decimals of a stored probability: as fine as the clip of the loss."""


def run(context: Context, item: str | None = None) -> None:
    """Write metrics, predictions and plots."""
    project = context.project
    dataset = open_dataset(project.dataset)
    rows = dataset.rows("test")
    if not len(rows):
        raise DataError(
            "The test split holds no photos. Raise split.test in params.yaml, or import an "
            "official test set."
        )
    histories = [_history(context, phase) for phase in PHASES]
    images = dataset.images[rows]
    classifier = load_classifier(project.graph, context.params.preprocess, trusted=True)
    raw = classifier.probabilities(images, context.progress)
    rounded = raw.astype(np.float64).round(DIGITS)
    probabilities, labels = checked(rounded, dataset.labels[rows])
    scores = score(rounded, labels)
    photos = [
        {
            "name": dataset.names[row],
            "label": LABELS[dataset.labels[row]],
            "probabilities": values.tolist(),
        }
        for row, values in zip(rows, rounded, strict=True)
    ]
    write_json(project.predictions, {"labels": list(LABELS), "photos": photos})
    figures = {
        "curves": plots.curves(histories),
        "confusion": plots.confusion(scores),
        "roc_pr": plots.roc_pr(probabilities, labels),
        "reliability": plots.reliability_diagram(probabilities, labels),
        "mistakes": plots.mistakes(images, probabilities, labels),
    }
    for number, (name, figure) in enumerate(figures.items(), start=1):
        plots.save(figure, project.plots / f"{name}.png")
        context.progress("draw plots", number, len(figures))
    metrics = {
        **scores.to_json(),
        "standard_errors": standard_errors(probabilities, labels),
        "robustness": robustness(classifier, images, labels, context.progress),
    }
    write_json(project.metrics, metrics)


def _history(context: Context, phase: str) -> dict[str, Any]:
    path = context.project.history(phase)
    history = read_json(path)
    if not isinstance(history, dict):
        raise StageError(
            f"The history of phase {phase!r} cannot be read ({path}). "
            "Run the training stages again."
        )
    return history


if __name__ == "__main__":
    stage_main(run)

"""Stage: score the assembled model on the test split, once.

The test split is looked at here and nowhere before, so its numbers are not
chosen by; a part of it is scored once more, slightly disturbed. What is scored is
`model.pb`, the file that predicts wherever the release goes. Scores are
computed from the rounded probabilities that `predictions.json` keeps, so anybody
can compute them again from that file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import Dataset, open_dataset
from tasks.data.sources import arrange, folder_files
from tasks.errors import DataError, StageError
from tasks.io import write_json
from tasks.model.inference import Classifier, Prediction, classify, load_classifier
from tasks.params import LABELS, PHASES
from tasks.project import Project
from tasks.scoring.metrics import Scores, checked, score, standard_errors
from tasks.scoring.robustness import robustness
from tasks.stage import Context, Progress, silent, stage_main

DIGITS = 7
"""Decimals of a stored probability: as fine as the clip of the loss."""


@dataclass(frozen=True)
class FolderReport:
    """Scores of a model on a class folder.

    Args:
        scores: over the files that could be read.
        truths: label of each file in a class folder, by that folder.
        predictions: one for each of these files, readable or not.
        unplaced: files outside of class folders, which are not scored.
    """

    scores: Scores
    truths: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    unplaced: tuple[Prediction, ...] = ()

    @property
    def unreadable(self) -> tuple[Prediction, ...]:
        """The files that were not scored, with the reason."""
        found = (*self.predictions, *self.unplaced)
        return tuple(prediction for prediction in found if prediction.error)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the scores, the misread files and the unreadable ones."""
        told = zip(self.truths, self.predictions, strict=True)
        return {
            **self.scores.to_json(),
            "misread": [
                {"truth": truth, **prediction.to_json()}
                for truth, prediction in told
                if prediction.error is None and prediction.label != truth
            ],
            "unreadable": [prediction.to_json() for prediction in self.unreadable],
        }


def run(context: Context, item: str | None = None) -> None:
    """Write the metrics, the probabilities behind them, and the pictures.

    Raises:
        DataError: there is no dataset or no test photo.
        ModelError: there is no model, or it does not fit the architecture.
        StageError: a phase's history is missing or broken.
    """
    from tasks.scoring import plots

    project = context.project
    dataset = open_dataset(project.dataset)
    rows = dataset.rows("test")
    if not len(rows):
        raise DataError(
            "The test split must hold photos. Received: 0. Raise split.test in params.yaml, "
            "or import an official test set."
        )
    histories = [_history(project, phase) for phase in PHASES]
    classifier = load_classifier(project.graph, dataset.images.shape[1], vouched=True)
    raw = classifier.probabilities(dataset.images[rows], context.progress)
    rounded = raw.astype(np.float64).round(DIGITS)
    probabilities, labels = checked(rounded, dataset.labels[rows])
    scores = score(rounded, labels)
    write_json(project.predictions, _predictions(dataset, rows, rounded))
    figures = {
        "curves": plots.curves(histories),
        "confusion": plots.confusion(scores),
        "roc_pr": plots.roc_pr(probabilities, labels),
        "reliability": plots.reliability_diagram(probabilities, labels),
        "mistakes": plots.mistakes(dataset.images[rows], probabilities, labels),
    }
    for number, (name, figure) in enumerate(figures.items(), start=1):
        plots.save(figure, project.plots / f"{name}.png")
        context.progress("draw pictures", number, len(figures))
    found = {
        **scores.to_json(),
        "standard_errors": standard_errors(probabilities, labels),
        "robustness": robustness(classifier, dataset.images[rows], labels, context.progress),
    }
    write_json(project.metrics, found)


def evaluate_folder(
    classifier: Classifier, folder: Path, progress: Progress = silent
) -> FolderReport:
    """Score a model on photos in folders named after their label.

    Args:
        classifier: the model.
        folder: what import takes as a folder, with any of the labels; of
            `train/` and `test/` only one.
        progress: told for each file read and each batch scored.

    Returns:
        The scores, and which files could not be used and why.

    Raises:
        DataError: no such folder, no class folder in it, or no usable photo.
    """
    if not folder.is_dir():
        raise DataError(
            f"There must be a folder of class folders 0 to 5. Received: '{folder}', which is "
            f"{'a file' if folder.exists() else 'not there'}. Check the path."
        )
    items = arrange(folder_files(folder), str(folder)).files
    if len({item.split for item in items if item.label}) > 1:
        raise DataError(
            f"Only one set of photos is scored at a time. Received: '{folder}' with photos inside "
            "and outside of test/. Name the folder that holds the class folders."
        )
    labelled = [(item, item.label, item.read) for item in items if item.label and item.read]
    sources = [(Path(item.origin), read) for item, _, read in labelled]
    predictions = classify(classifier, sources, progress)
    truths = [label for _, label, _ in labelled]
    unplaced = [Prediction(Path(item.origin), error=item.fault) for item in items if not item.label]
    return FolderReport(
        _score_usable(predictions, truths, folder),
        tuple(truths),
        tuple(predictions),
        tuple(unplaced),
    )


def _score_usable(predictions: Sequence[Prediction], truths: Sequence[str], folder: Path) -> Scores:
    known = [
        (prediction.probabilities, LABELS.index(truth))
        for prediction, truth in zip(predictions, truths, strict=True)
        if prediction.probabilities is not None
    ]
    if not known:
        raise DataError(
            f"No file below '{folder}' is a usable photo. Received: {len(predictions)} files, the "
            f"first '{predictions[0].path}': {predictions[0].error}. Add photos, or mend them."
        )
    probabilities, labels = (np.array(column) for column in zip(*known, strict=True))
    return score(probabilities, labels)


def _predictions(
    dataset: Dataset, rows: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, Any]:
    return {
        "labels": list(LABELS),
        "photos": [
            {
                "name": dataset.names[row],
                "label": LABELS[dataset.labels[row]],
                "probabilities": values.tolist(),
            }
            for row, values in zip(rows, probabilities, strict=True)
        ],
    }


def _history(project: Project, phase: str) -> dict[str, Any]:
    path = project.history(phase)
    try:
        history: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(
            f"The history of phase {phase!r} cannot be read ({error}). Received: '{path}'. "
            "Run the training stages again."
        ) from error
    return history


if __name__ == "__main__":
    stage_main(run)

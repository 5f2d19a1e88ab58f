"""Score a model on a folder of labelled photos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.sources import arrange, folder_files
from tasks.errors import DataError
from tasks.model.inference import Classifier, Prediction, classify
from tasks.params import LABELS
from tasks.scoring.metrics import Scores, score
from tasks.stage import Progress, silent


@dataclass(frozen=True)
class FolderReport:
    """Scores of a model on class folders.

    Args:
        scores: over the readable files.
        labels: label of each prediction's file, by its folder.
        predictions: one for each file in a class folder.
        unlabelled: files outside of class folders, which are not scored.
    """

    scores: Scores
    labels: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    unlabelled: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: the scores, the misclassified files and the unreadable ones."""
        labelled = zip(self.labels, self.predictions, strict=True)
        every = (*self.predictions, *self.unlabelled)
        return {
            **self.scores.to_json(),
            "misread": [
                {"truth": label, **one.to_json()}
                for label, one in labelled
                if one.error is None and one.label != label
            ],
            "unreadable": [one.to_json() for one in every if one.error],
        }


def evaluate_folder(
    classifier: Classifier, folder: Path, progress: Progress = silent
) -> FolderReport:
    """Score a model on photos in folders named after their label, as `import` takes them."""
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"'{folder}' {fault}. Name a folder of class folders 0 to 5.")
    items = arrange(folder_files(folder), str(folder)).files
    if len({item.split for item in items if item.label}) > 1:
        raise DataError(
            f"'{folder}' holds photos inside and outside of test/, but only one set of photos is "
            "scored at a time. Name the folder that holds the class folders."
        )
    labelled = [(item, item.label, item.read) for item in items if item.label and item.read]
    sources = [(Path(item.origin), read) for item, _, read in labelled]
    labels = tuple(label for _, label, _ in labelled)
    predictions = tuple(classify(classifier, sources, progress))
    known = [
        (prediction.probabilities, LABELS.index(label))
        for prediction, label in zip(predictions, labels, strict=True)
        if prediction.probabilities is not None
    ]
    if not known:
        raise DataError(
            f"None of the {len(predictions)} files below '{folder}' is a usable photo; the first, "
            f"'{predictions[0].path}', is refused: {predictions[0].error}."
        )
    probabilities, classes = (np.array(column) for column in zip(*known, strict=True))
    return FolderReport(
        scores=score(probabilities, classes),
        labels=labels,
        predictions=predictions,
        unlabelled=tuple(
            Prediction(Path(item.origin), error=item.fault) for item in items if not item.label
        ),
    )

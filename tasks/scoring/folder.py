"""Score a model on a folder of labelled photos."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.sources import arrange, folder_files
from tasks.errors import DataError
from tasks.model.inference import Classifier, Prediction, classify
from tasks.scoring.metrics import score
from tasks.stage import Progress, silent


def evaluate_folder(
    classifier: Classifier, folder: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Scores over photos in class folders, with the `misread` and the `unreadable` ones."""
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"'{folder}' {fault}. Name a folder of class folders.")
    items = arrange(folder_files(folder), str(folder), classifier.labels).files
    if len({item.split for item in items if item.label}) > 1:
        raise DataError(
            f"'{folder}' holds photos inside and outside of test/, but only one set of photos is "
            "scored at a time. Name the folder that holds the class folders."
        )
    labelled = [(item.label, Path(item.origin), item.read) for item in items if item.label]
    sources = [(origin, read) for _, origin, read in labelled if read]
    found = classify(classifier, sources, progress)
    truths = [label for label, _, read in labelled if read]
    read = [(one, label) for one, label in zip(found, truths, strict=True) if not one.error]
    if not read:
        raise DataError(
            f"None of the {len(found)} files below '{folder}' is a usable photo; the first, "
            f"'{found[0].path}', is refused: {found[0].error}."
        )
    labels = classifier.labels
    rows = np.array([one.probabilities for one, _ in read])
    scores = score(rows, np.array([labels.index(label) for _, label in read]), labels)
    outside = [Prediction(Path(one.origin), error=one.fault) for one in items if not one.label]
    return {
        **scores.to_json(),
        "misread": [{"truth": label, **one.to_json()} for one, label in read if one.label != label],
        "unreadable": [one.to_json() for one in (*found, *outside) if one.error],
    }

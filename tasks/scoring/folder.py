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
    """Score a model on photos in folders named after their label, as `import` takes them.

    Returns the scores over the readable files, the `misread` ones, and the `unreadable` ones
    with those outside of class folders.
    """
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"'{folder}' {fault}. Name a folder of class folders.")
    items = arrange(folder_files(folder), str(folder), classifier.labels).files
    if len({item.split for item in items if item.label}) > 1:
        raise DataError(
            f"'{folder}' holds photos inside and outside of test/, but only one set of photos is "
            "scored at a time. Name the folder that holds the class folders."
        )
    labelled = [(item, item.label, item.read) for item in items if item.label and item.read]
    sources = [(Path(item.origin), read) for item, _, read in labelled]
    found = classify(classifier, sources, progress)
    pairs = [(one, label) for one, (_, label, _) in zip(found, labelled, strict=True)]
    labels = classifier.labels
    known = [(one.probabilities, labels.index(label)) for one, label in pairs if not one.error]
    if not known:
        raise DataError(
            f"None of the {len(found)} files below '{folder}' is a usable photo; the first, "
            f"'{found[0].path}', is refused: {found[0].error}."
        )
    probabilities, classes = (np.array(column) for column in zip(*known, strict=True))
    outside = [Prediction(Path(one.origin), error=one.fault) for one in items if not one.label]
    return {
        **score(probabilities, classes, labels).to_json(),
        "misread": [
            {"truth": label, **one.to_json()}
            for one, label in pairs
            if not one.error and one.label != label
        ],
        "unreadable": [one.to_json() for one in (*found, *outside) if one.error],
    }

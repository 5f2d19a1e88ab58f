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
    good = [(str(one.label), Path(one.origin), one.read) for one in items if not one.fault]
    sources = [(origin, read) for _, origin, read in good if read]
    found = classify(classifier, sources, progress)
    read = [(one, label) for one, (label, *_) in zip(found, good, strict=True) if not one.error]
    faulty = [Prediction(Path(one.origin), error=one.fault) for one in items if one.fault]
    refused = [*(one for one in found if one.error), *faulty]
    if not read:
        raise DataError(
            f"None of the {len(items)} files below '{folder}' is a usable photo; the first, "
            f"'{refused[0].path}', is refused: {refused[0].error}."
        )
    labels = classifier.labels
    rows = np.array([one.probabilities for one, _ in read])
    scores = score(rows, np.array([labels.index(label) for _, label in read]), labels)
    return {
        **scores.to_json(),
        "misread": [{"truth": label, **one.to_json()} for one, label in read if one.label != label],
        "unreadable": [one.to_json() for one in refused],
    }

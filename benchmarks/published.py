"""The published notebook's scores beside ours, on exactly its 60 test photos.

    python -m benchmarks.published TRAIN.h5 TEST.h5

Trains the committed parameters on TRAIN.h5, in a folder of its own. The notebook halves
the 120 photos of TEST.h5 and scores the second half.
"""

import tempfile
from pathlib import Path

import h5py
import numpy as np
import typer
from numpy.typing import NDArray
from sklearn.metrics import classification_report
from sklearn.model_selection import train_test_split

from benchmarks.training import prepare
from tasks import assemble, features, preprocess, synthetic, train
from tasks.data.images import resize
from tasks.model.inference import load_classifier
from tasks.params import load_params
from tasks.project import Project
from tasks.scoring.metrics import score
from tasks.stage import Context

PUBLISHED = {"accuracy": 0.9333, "loss": 0.2821, "auc": 0.96}


def main(train_file: Path, test_file: Path) -> None:
    """Train on TRAIN_FILE, and score the published half of TEST_FILE."""
    photos, labels = published_half(test_file)
    with tempfile.TemporaryDirectory() as temporary:
        project = Project(Path(temporary) / "project")
        prepare(project, train_file, test_file)
        context = Context(project, load_params(project.params))
        for stage in (synthetic, preprocess, features):
            stage.run(context)
        for phase in context.params.phases:
            train.run(context, phase)
        assemble.run(context)
        params, names = context.params.preprocess, context.params.labels
        resized = np.stack([resize(photo, params) for photo in photos])
        classifier = load_classifier(project.graph, params, names)
        found = classifier.probabilities(resized).astype(np.float64)
    ours = score(found, labels, names)
    print(f"{len(labels)} photos  published  ours")
    for name, value in PUBLISHED.items():
        print(f"{name:10} {value:9.4f}  {getattr(ours, name):.4f}")
    print(classification_report(labels, found.argmax(axis=1), target_names=names, digits=3))


def published_half(test_file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Photos and labels that the notebook scores."""
    with h5py.File(test_file) as file:
        photos = np.asarray(file["test_set_x"], np.uint8)
        labels = np.asarray(file["test_set_y"], np.int64).ravel()
    rows = np.arange(len(labels))
    _, second = train_test_split(rows, test_size=0.5, stratify=labels, random_state=42)
    return photos[second], labels[second]


if __name__ == "__main__":
    typer.run(main)

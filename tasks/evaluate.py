"""Stage: score the assembled model on the test split, which no earlier stage reads, once.

The model is `model.pb`, the file that a release serves. Scores come from the rounded
probabilities in `predictions.json`, so that anybody can recompute them.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import open_dataset
from tasks.data.images import resize
from tasks.io import atomic_write, read_json, write_json
from tasks.model.augment import enlarge as enlarge_photos
from tasks.model.inference import Classifier, Engine, load_classifier
from tasks.params import PHASES, PreprocessParams
from tasks.project import Project
from tasks.rendering.appearance import develop, enlarge, wall
from tasks.scoring import plots
from tasks.scoring.drift import BINS
from tasks.scoring.metrics import DIGITS, checked, score
from tasks.stage import Context, Progress, silent

PREDICTION_DIGITS = 7  # decimals of a stored probability: as fine as the clip of the loss
MAX_PHOTOS = 96  # that are corrupted, balanced over the classes
EMBEDDED = 500  # validation photos at most whose embeddings are part of the reference
HANDLESS = 200  # pictures without a hand that `certain_above` is set with
DOUBTED_PHOTOS = 0.01  # share of validation photos that may be called uncertain
DOUBTED_HANDLESS = 0.95  # share of the pictures without a hand that are to be called uncertain

Image = NDArray[np.uint8]


def run(context: Context, item: str | None = None) -> None:
    project = context.project
    dataset = open_dataset(project.dataset)
    rows, val = dataset.rows("test"), dataset.rows("val")
    images = dataset.images[rows]
    classifier = load_classifier(project.graph, context.params.preprocess, dataset.classes)
    raw = classifier.probabilities(images, context.progress)
    rounded = raw.astype(np.float64).round(PREDICTION_DIGITS)
    probabilities, labels = checked(rounded, dataset.labels[rows])
    scores = score(rounded, labels, dataset.classes)
    photos = [
        {"name": dataset.names[row], "label": dataset.classes[label], "probabilities": values}
        for row, label, values in zip(rows, labels, rounded.tolist(), strict=True)
    ]
    write_json(project.predictions, {"labels": dataset.classes, "photos": photos})
    figures = {
        "curves": plots.curves([read_json(project.history(phase)) for phase in PHASES]),
        "confusion": plots.confusion(scores),
        "roc_pr": plots.roc_pr(probabilities, labels, dataset.classes),
        "reliability": plots.reliability_diagram(probabilities, labels),
        "mistakes": plots.mistakes(images, probabilities, labels, dataset.classes),
    }
    for number, (name, figure) in enumerate(figures.items(), start=1):
        plots.save(figure, project.plots / f"{name}.png")
        context.progress("draw plots", number, len(figures))
    seen = classifier.probabilities(dataset.images[val])
    save_reference(project, seen, dataset.images[val])
    more = {
        "robustness": robustness(classifier, images, labels, context.progress),
        "certainty": {"certain_above": certain_above(classifier, seen.max(axis=1))},
    }
    write_json(project.metrics, scores.to_json() | more)


def save_reference(project: Project, probabilities: NDArray[np.float32], photos: Image) -> None:
    """Save what production is compared with, see `tasks.scoring.drift`: of validation photos."""
    engine = Engine(project.graph, embeddings=True)
    pictures = (enlarge_photos(photo[np.newaxis], engine.size)[0] for photo in photos[:EMBEDDED])
    with atomic_write(project.reference) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            labels=np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1]),
            confidences=np.histogram(probabilities.max(axis=1).astype(float), BINS, (0, 1))[0],
            embeddings=np.array([*engine.stream(pictures)], np.float16),
        )


def certain_above(classifier: Classifier, confidences: NDArray[np.float32]) -> float:
    """Choose the confidence below which an answer is uncertain, from those of validation photos."""
    handless = classifier.probabilities(draw_handless(HANDLESS, classifier.preprocess))
    limit = min(
        np.quantile(handless.max(axis=1).astype(float), DOUBTED_HANDLESS, method="higher"),
        np.quantile(confidences.astype(float), DOUBTED_PHOTOS, method="lower"),
    )
    return float(np.floor(limit * 10**DIGITS) / 10**DIGITS)


def draw_handless(count: int, preprocess: PreprocessParams, seed: int = 0) -> Image:
    """Draw walls, plain and cluttered, one colour, and noise; uint8, (count, d, d, 3)."""
    random = np.random.default_rng(seed)
    pictures = []
    for number in range(count):
        if number % 6 < 4:
            picture = develop(enlarge(random.uniform(0.3, 1.1) * wall(random)), random)
            for x, y, *axes, angle in random.uniform(0, 64, (number % 2 * 8, 5)):
                colour = random.integers(0, 256, 3).tolist()
                cv2.ellipse(picture, ((x, y), axes, angle), colour, -1)
        else:  # of one cell, then of more
            cells = 1 if number % 6 == 4 else 2 ** int(random.integers(1, 7))
            noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
            picture = cv2.resize(noise, (64, 64), interpolation=cv2.INTER_LINEAR)
        pictures.append(resize(picture, preprocess))
    return np.stack(pictures)


def robustness(
    classifier: Classifier, images: Image, labels: NDArray[np.int64], progress: Progress = silent
) -> dict[str, Any]:
    """Score a model on corrupted test photos, which alternate between two directions.

    The kinds are those of Hendrycks and Dietterich (2019) that a handheld phone causes.
    """
    rows = balanced_rows(labels, MAX_PHOTOS)
    accuracy: dict[str, float] = {}
    for number, (name, corrupt) in enumerate(CORRUPTIONS.items(), start=1):
        corrupted = [corrupt(images[row], 1 - 2 * (at % 2)) for at, row in enumerate(rows)]
        predicted = classifier.probabilities(np.stack(corrupted)).argmax(axis=1)
        accuracy[name] = round(float((predicted == labels[rows]).mean()), DIGITS)
        progress("score corrupted photos", number, len(CORRUPTIONS))
    return {"photos": len(rows), "accuracy": accuracy}


def balanced_rows(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Choose at most `most` rows, the first of each class; int64, ascending."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return np.sort(np.argsort(ranks, kind="stable")[:most]).astype(np.int64)


def _jpeg(image: Image, direction: int) -> Image:
    # The codec takes BGR and treats red and blue differently.
    content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    decoded: Image = cv2.imdecode(content, cv2.IMREAD_COLOR)  # type: ignore[assignment]
    return np.ascontiguousarray(decoded[..., ::-1])


def _transform(image: Image, degrees: float, scale: float) -> Image:
    side = len(image)
    matrix = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), degrees, scale)
    return cv2.warpAffine(  # type: ignore[no-any-return]
        image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


CORRUPTIONS: dict[str, Callable[[Image, int], Any]] = {
    "rotation": lambda image, sign: _transform(image, sign * 12.0, 1.0),
    "brightness": lambda image, sign: cv2.convertScaleAbs(image, alpha=1 + sign * 0.25),
    "blur": lambda image, sign: cv2.GaussianBlur(image, (0, 0), len(image) / 64),
    "scale": lambda image, sign: _transform(image, 0.0, 1 + sign * 0.15),
    "jpeg": _jpeg,
}

"""The classifier that a release holds."""

from pathlib import Path

import yaml

from tasks.errors import PromotionError
from tasks.labels import LABELS
from tasks.network.classifier import Classifier, load_classifier
from tasks.params import PreprocessParams
from tasks.whole import read_json


def open_release(folder: Path) -> Classifier:
    """Load the classifier of a verified release.

    Args:
        folder: what `tasks.releases.release.fetch` returned. It may hold no `model.pb`; then
            `model.keras` is loaded.

    Returns:
        The classifier, which reduces photos as the release's training photos were.

    Raises:
        PromotionError: its labels are not ours, in our order, or its parameters say
            nothing of photos.
        ModelError: its model does not fit.
    """
    labels = read_json(folder / "labels.json")
    if labels != list(LABELS):
        raise PromotionError(
            f"A release must have the labels {list(LABELS)} in this order. Received: {labels} "
            f"in release {folder.name}. Promote a release of this project."
        )
    detail = _detail(folder / "params.yaml")
    graph = folder / "model.pb"
    model = graph if graph.is_file() else folder / "model.keras"
    return load_classifier(model, detail, vouched=True)


def _detail(path: Path) -> int:
    """Read the one parameter that a prediction needs; the rest may be another version's."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return PreprocessParams(detail=content["preprocess"]["detail"]).detail
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise PromotionError(
            f"A release's params.yaml must say how photos are reduced, as preprocess.detail. "
            f"Received: {path} ({type(error).__name__}). Promote a release of this project."
        ) from error

"""The classifier that a release holds."""

from pathlib import Path

import yaml

from tasks.errors import PromotionError
from tasks.labels import LABELS
from tasks.network.classifier import Classifier, load_classifier
from tasks.whole import read_json


def open_release(folder: Path) -> Classifier:
    """Load the classifier of a verified release.

    Args:
        folder: what `tasks.releases.release.fetch` returned. It may hold no `model.pb`; then
            `model.keras` is loaded.

    Returns:
        The classifier, which reduces photos as the release's training photos were.

    Raises:
        PromotionError: its labels are not ours, in our order.
        ModelError: its model does not fit.
    """
    labels = read_json(folder / "labels.json")
    if labels != list(LABELS):
        raise PromotionError(
            f"A release must have the labels {list(LABELS)} in this order. Received: {labels} "
            f"in release {folder.name}. Promote a release of this project."
        )
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    graph = folder / "model.pb"
    model = graph if graph.is_file() else folder / "model.keras"
    return load_classifier(model, int(params["preprocess"]["detail"]), vouched=True)

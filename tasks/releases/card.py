"""The model card: what travels with a release for whoever finds it.

Its headings follow Mitchell et al., "Model Cards for Model Reporting", 2019. No
date and no machine is in it, so that the same model gives the same card.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.markdown import table
from tasks.pictures.shrink import SOFTNESS
from tasks.scoring.checks import shown, shown_interval

LICENCE = "Apache-2.0"

Content = Mapping[str, Any]


def model_card(
    *,
    metrics: Content,
    gate: Content,
    counts: Mapping[str, int],
    params: Content,
    histories: Sequence[Content],
    data_version: str,
    data_note: str = "",
) -> str:
    """Write the model card.

    Args:
        metrics: content of `metrics.json`.
        gate: content of `gate.json`.
        counts: photos in each split: `train`, `val`, `test`.
        params: content of `params.yaml`, say `Params.model_dump()`.
        histories: contents of the phases' `history.json`, in order.
        data_version: DVC's hash of the photos.
        data_note: one sentence on where the photos come from.

    Returns:
        Markdown.
    """
    sections = [
        _model(params),
        _use(params),
        _data(counts, data_version, data_note),
        _training(params, histories),
        _evaluation(metrics),
        _gate(gate),
        f"## Licence\n\n{LICENCE}. The backbone starts from EfficientNetB0's ImageNet weights.",
    ]
    return "\n\n".join(sections) + "\n"


def _model(params: Content) -> str:
    detail = params["preprocess"]["detail"]
    return (
        "# Hand signs\n\n"
        "Reads the digit, 0 to 5, that one hand shows in a photo. An EfficientNetB0 with global "
        "average pooling and a softmax over six classes, as one Keras functional model: float32 "
        "`(batch, 224, 224, 3)`, RGB in [0, 255], to probabilities `(batch, 6)`; column *i* is "
        f"the sign *i*.\n\nPhotos are cut to their central square, reduced to {detail} x {detail} "
        f"pixels (and then blurred by {SOFTNESS} of them, where they were larger), and enlarged to "
        "224 x 224 before they reach the model. Pixels are not scaled to [0, 1]: the model does "
        "that itself."
    )


def _use(params: Content) -> str:
    mirror = (
        "Left and right hands count alike: photos are mirrored at random while training."
        if params["augmentation"]["horizontal_flip"]
        else "Photos are not mirrored while training: a hand that is rare in them may read worse."
    )
    return (
        "## Intended use and limits\n\n"
        "For one upright hand that fills most of the picture, on a plain background, as in the "
        f"training photos. {mirror}\n\n"
        "- It always answers with one of six signs, also when there is no hand. A low highest "
        "probability is the only hint.\n"
        "- The scores below hold for photos like those it was tested on. Other people, cameras "
        "and rooms may score much lower: run `handsigns evaluate FOLDER` on your own photos "
        "first.\n"
        "- It does not read sign language, does not recognise people, and must not decide "
        "anything that can harm somebody."
    )


def _data(counts: Mapping[str, int], version: str, note: str) -> str:
    rows = [(split, counts[split]) for split in ("train", "val", "test")]
    told = f" {note}" if note else ""
    return (
        f"## Data\n\nVersion `{version}`.{told} Photos that are nearly the same are kept in one "
        f"split.\n\n{table(('split', 'photos'), rows)}"
    )


def _training(params: Content, histories: Sequence[Content]) -> str:
    heads = (
        "phase",
        "photos",
        "open layers",
        "learning rate",
        "epochs",
        "averaged",
        "val loss",
        "val acc.",
    )
    rows = []
    for history in histories:
        phase = params["phases"][history["phase"]]
        rows.append(
            (
                history["phase"],
                history["images"],
                phase["trainable_layers"],
                f"{phase['learning_rate']:g} {phase['schedule']}",
                len(history["epochs"]),
                f"{phase['averaging']:.0%}" if phase["averaging"] else "-",
                shown(history["val_loss"]),
                shown(history["val_accuracy"]),
            )
        )
    mode = params["training"]["mode"]
    views = f"{params['features']['views']} augmented views of each photo"
    seen = "each photo augmented anew in every epoch" if mode == "end_to_end" else views
    return f"## Training\n\nSeed {params['seed']}, {seen}, mode `{mode}`.\n\n{table(heads, rows)}"


def _evaluation(metrics: Content) -> str:
    low, high = metrics["accuracy_interval"]
    overall = [
        ("accuracy", f"{shown(metrics['accuracy'])} (95% Wilson: {low:.4f} to {high:.4f})"),
        ("loss (categorical cross-entropy)", shown(metrics["loss"])),
        ("AUC (one against the rest, macro)", shown(metrics["auc"])),
        ("expected calibration error", shown(metrics["ece"])),
    ]
    per_class = [
        (
            row["label"],
            shown(row["precision"]),
            shown(row["recall"]),
            shown(row["f1"]),
            row["support"],
        )
        for row in metrics["per_class"]
    ]
    return (
        f"## Evaluation\n\nOn {metrics['n']} test photos that training never saw.\n\n"
        f"{table(('measure', 'value'), overall)}\n\n"
        f"{table(('sign', 'precision', 'recall', 'F1', 'photos'), per_class)}"
    )


def _gate(gate: Content) -> str:
    rows = [
        (
            check["name"],
            shown(check["value"]),
            shown(check["limit"]),
            shown_interval(check.get("interval")) or "-",
            "passed" if check["passed"] else f"failed {check.get('detail', '')}".strip(),
        )
        for check in gate["checks"]
    ]
    verdict = "Passed" if gate["passed"] else "Failed"
    heads = ("check", "value", "limit", "interval", "verdict")
    return f"## Gate\n\n{verdict}.\n\n{table(heads, rows)}"

"""The model card of a release."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.data.dataset import SYNTHETIC
from tasks.gate import shown
from tasks.params import list_labels
from tasks.synthetic import SIGNS

Content = Mapping[str, Any]

HANDS = """\
# Hand signs

Reads the digit, 0 to 5, that one hand shows in a photo."""
HANDS_USE = """\
For one upright hand that fills most of the picture, on a plain background, as in the training \
photos. It does not read sign language and does not recognise people."""
OTHERS = """\
# Image classifier

Says which of {count} classes a photo shows: {labels}."""
OTHERS_USE = "For photos like those that it was trained on."
CARD = """\
{about} An EfficientNetB0 with global average pooling and a softmax over {count} classes, as one \
Keras functional model: float32 `(batch, 224, 224, 3)`, RGB in [0, 255], to probabilities \
`(batch, {count})`, in the order of `labels.json`.

Photos are cut to their central square, reduced to {size} x {size} pixels{blur}, and \
enlarged to 224 x 224 before they reach the model. Pixels are not scaled to [0, 1]: the model \
does that itself.

## Intended use and limits

{use} {mirror}

- It always answers with one of its classes, also when a photo shows none of them. A low highest \
probability is the only hint.
- The scores below hold for photos like those it was tested on. Others may score much lower: run \
`handsigns evaluate FOLDER` on your own photos first.
- It must not decide anything that can harm somebody.

## Data

Version `{version}`. {note} Photos that are nearly the same are kept in one split.{synthetic}

{counts}

## Training

Seed {seed}, {seen}, mode `{mode}`.

{phases}

## Evaluation

On {n} test photos that training never saw.

{overall}

{per_class}

## Gate

{verdict}. `gate.json` has every check with its value and limit.

## Licence

Apache-2.0. The backbone starts from EfficientNetB0's ImageNet weights.
"""


def model_card(
    *,
    metrics: Content,
    gate: Content,
    counts: Mapping[str, int],
    params: Content,
    histories: Sequence[Content],
    data_version: str,
    data_note: str,
) -> str:
    """Write the model card in Markdown, from the contents of the files of the same names.

    `counts` are photos by split, and `synthetic` hands.
    """
    labels, mode = params["labels"], params["training"]["mode"]
    blur, hands = params["preprocess"]["blur_sigma"], counts[SYNTHETIC]
    about, use = (HANDS, HANDS_USE) if tuple(labels) == SIGNS else (OTHERS, OTHERS_USE)
    mirror = (
        "Left and right count alike: photos are mirrored at random while training."
        if params["augmentation"]["horizontal_flip"]
        else "Photos are not mirrored while training: the rarer side may be read worse."
    )
    low, high = metrics["accuracy_interval"]
    overall = (
        ("accuracy", f"{shown(metrics['accuracy'])} (95% Wilson: {low:.4f} to {high:.4f})"),
        ("loss (categorical cross-entropy)", metrics["loss"]),
        ("AUC (one against the rest, macro)", metrics["auc"]),
        ("expected calibration error", metrics["ece"]),
    )
    scores = ("label", "precision", "recall", "f1", "support")
    per_class = [[row[name] for name in scores] for row in metrics["per_class"]]
    failed = [check["name"] for check in gate["checks"] if not check["passed"]]
    copies = f"{params['features']['augmented_copies']} augmented copies of each photo"
    return CARD.format(
        about=about.format(count=len(labels), labels=_cell(list_labels(labels))),
        use=use,
        mirror=mirror,
        count=len(labels),
        size=params["preprocess"]["image_size"],
        blur=f", blurred by up to {blur} of them where they were larger" if blur else "",
        version=data_version,
        note=data_note,
        counts=table(("split", "photos"), [(k, n) for k, n in counts.items() if k != SYNTHETIC]),
        synthetic=f" Training also used {hands} synthetic (rendered) hands." if hands else "",
        seed=params["seed"],
        seen="each photo augmented anew in every epoch" if mode == "end_to_end" else copies,
        mode=mode,
        phases=_phases(params, histories),
        n=metrics["n"],
        overall=table(("measure", "value"), overall),
        per_class=table(("label", "precision", "recall", "F1", "photos"), per_class),
        verdict="Passed" if gate["passed"] else f"Failed: {', '.join(failed)}",
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what a cell holds cannot break out of it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _phases(params: Content, histories: Sequence[Content]) -> str:
    heads = ("phase", "photos", "open layers", "learning rate", "epochs", "val loss", "val acc.")
    rows = []
    for one in histories:
        recipe = params["phases"][one["phase"]]
        chosen = (one["images"], recipe["trainable_layers"], f"{recipe['learning_rate']:g}")
        reached = (len(one["epochs"]), one["val_loss"], one["val_accuracy"])
        rows.append((one["phase"], *chosen, *reached))
    return table(heads, rows)


def _cell(value: Any) -> str:
    return " ".join(shown(value).replace("|", "\\|").split())

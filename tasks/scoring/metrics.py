"""Metrics of a set of predictions."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import binomtest
from sklearn import metrics as sk

from tasks.errors import DataError

DIGITS = 6  # decimals in JSON: far below one photo's weight, above float32 noise
KERAS_EPSILON = 1e-7  # the clip of `keras.losses.CategoricalCrossentropy`
CALIBRATION_BINS = 15  # as in Guo et al., On Calibration of Modern Neural Networks, 2017

Interval = tuple[float, float]


class FrozenModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with all floats rounded to `DIGITS` decimals."""
        text = self.model_dump_json()
        return dict(json.loads(text, parse_float=lambda number: round(float(number), DIGITS)))


class ClassScores(FrozenModel):
    """One class against the rest; a ratio is null where its denominator is 0."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class Scores(FrozenModel):
    """Scores of a model; `auc` and `worst_recall` are null if a class has no photo."""

    n: int
    loss: float  # clipped as Keras clips it
    log_loss: float  # not clipped
    accuracy: float
    accuracy_interval: Interval  # of Wilson, 95 %
    auc: float | None  # macro average of one against the rest
    auc_note: str | None = Field(default=None, exclude_if=lambda note: note is None)
    ece: float  # expected calibration error
    worst_recall: float | None
    per_class: tuple[ClassScores, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]  # rows are true classes


def score(probabilities: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> Scores:
    """Score probabilities, float (n, classes), against true classes, integer (n,)."""
    p, y = checked(probabilities, labels)
    classes, predicted = range(len(names)), p.argmax(axis=1)
    right = int((predicted == y).sum())
    clipped = np.clip(p[np.arange(len(y)), y], KERAS_EPSILON, 1 - KERAS_EPSILON)
    columns = sk.precision_recall_fscore_support(y, predicted, labels=classes, zero_division=np.nan)
    per_class = []
    for label, *ratios, support in zip(names, *columns, strict=True):
        precision, recall, f1 = (None if np.isnan(one) else float(one) for one in ratios)
        per_class.append(
            ClassScores(label=label, precision=precision, recall=recall, f1=f1, support=support)
        )
    missing = ", ".join(one.label for one in per_class if not one.support)
    auc = None if missing else sk.roc_auc_score(np.eye(len(names))[y], p, average="macro")
    return Scores(
        n=len(y),
        loss=float(-np.log(clipped).mean()),
        log_loss=float(sk.log_loss(y, p, labels=classes)),
        accuracy=right / len(y),
        accuracy_interval=wilson_interval(right, len(y)),
        auc=auc,
        auc_note=f"not defined: no photo of class {missing}" if missing else None,
        ece=calibration_error(p, y),
        worst_recall=None if missing else min(columns[1]),
        per_class=tuple(per_class),
        confusion_matrix=sk.confusion_matrix(y, predicted, labels=classes).tolist(),
    )


def checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Reject what cannot be scored; normalize rows. float64, (n, classes) and int64, (n,)."""
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64)
    if not len(p):
        raise DataError("There are no photos to score. Add photos to the split.")
    valid = (p >= 0).all(axis=1) & (np.abs(p.sum(axis=1) - 1) <= 1e-4)
    if not valid.all():
        row = int(valid.argmin())
        raise DataError(
            f"Probabilities must be between 0 and 1 and sum to one, but row {row} is "
            f"{p[row].tolist()}. Retrain, or pass the softmax output instead of logits."
        )
    return p / p.sum(axis=1, keepdims=True), y


def calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error: equation 3 of Guo et al., 2017, with bins of equal width."""
    confidence = p.max(axis=1)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1).astype(int)
    gaps = np.bincount(bins, weights=confidence - (p.argmax(axis=1) == y))
    return float(np.abs(gaps).sum() / len(y))


def wilson_interval(right: int, n: int, level: float = 0.95) -> Interval:
    bounds = binomtest(right, n).proportion_ci(level, method="wilson")
    return float(bounds.low), float(bounds.high)

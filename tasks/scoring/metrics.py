"""Metrics of a set of predictions."""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from sklearn import metrics as sk

from tasks.errors import DataError
from tasks.params import LABELS

CLASSES = len(LABELS)
DIGITS = 6
"""Decimals in JSON: far below one photo's worth, above the noise of float32."""
ROW_SUM_TOLERANCE = 1e-4
KERAS_EPSILON = 1e-7
"""`keras.config.epsilon()`, the clip of `keras.losses.CategoricalCrossentropy`."""
CALIBRATION_BINS = 15
"""As in Guo et al. 2017, "On Calibration of Modern Neural Networks"."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassScores(_Frozen):
    """One class against the rest; a ratio is null where its denominator is 0."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class Scores(_Frozen):
    """Everything that is said about a model on one set of photos.

    Args:
        n: number of photos.
        loss: mean categorical cross-entropy in nats, as Keras computes it.
        log_loss: the same quantity by scikit-learn. On soft probabilities the
            two differ only where a probability of the true class is below
            1e-7, which Keras clips and scikit-learn does not.
        accuracy: share of photos whose most probable class is the true one.
        accuracy_interval: its 95 % Wilson interval.
        auc: area under the ROC curve, one class against the rest, mean over
            classes; null when a class has no photo.
        auc_note: why `auc` is null.
        ece: expected calibration error.
        worst_recall: lowest recall of any class; null when a class has no photo.
        per_class: in the order of `LABELS`.
        confusion_matrix: counts, row is the true class, column the predicted.
    """

    n: int
    loss: float
    log_loss: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    auc: float | None
    auc_note: str | None = None
    ece: float
    worst_recall: float | None
    per_class: tuple[ClassScores, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values with floats rounded to `DIGITS` decimals."""
        content: dict[str, Any] = _rounded(self.model_dump(mode="json"))
        if self.auc_note is None:
            del content["auc_note"]
        return content


def score(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """Score a model's probabilities against the true labels.

    Args:
        probabilities: float, (n, 6); rows sum to one, column i is class i.
        labels: integer, (n,); 0 to 5.

    Returns:
        The scores, computed in float64.

    Raises:
        DataError: no photos, a wrong shape or dtype, a value that is not
            finite or not in [0, 1], a row that does not sum to one, or a label
            outside 0 to 5.
    """
    p, y = checked(probabilities, labels)
    predicted = p.argmax(axis=1)
    right = int((predicted == y).sum())
    interval = binomtest(right, len(y)).proportion_ci(method="wilson")
    matrix = sk.confusion_matrix(y, predicted, labels=range(CLASSES))
    per_class = tuple(_class_scores(matrix, index) for index in range(CLASSES))
    recalls = [item.recall for item in per_class if item.recall is not None]
    area, note = _auc(p, y)
    return Scores(
        n=len(y),
        loss=float(photo_losses(p, y).mean()),
        log_loss=float(sk.log_loss(y, p, labels=range(CLASSES))),
        accuracy=right / len(y),
        accuracy_interval=(float(interval.low), float(interval.high)),
        auc=area,
        auc_note=note,
        ece=calibration_error(p, y),
        worst_recall=min(recalls) if len(recalls) == CLASSES else None,
        per_class=per_class,
        confusion_matrix=tuple(tuple(int(count) for count in row) for row in matrix),
    )


def checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refuse what cannot be scored, and make rows sum to one in float64.

    Args:
        probabilities: float, (n, 6).
        labels: integer, (n,).

    Returns:
        float64 (n, 6) and int64 (n,).

    Raises:
        DataError: see `score`.
    """
    p, y = np.asarray(probabilities), np.asarray(labels)
    if p.ndim != 2 or p.shape[1] != CLASSES or not np.issubdtype(p.dtype, np.floating):
        raise DataError(
            f"Probabilities must be floats of shape (n, {CLASSES}), one row a photo. "
            f"Received: {p.dtype} {p.shape}. Pass the model's softmax output."
        )
    if y.shape != (len(p),) or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"Labels must be integers of shape ({len(p)},), one a photo. "
            f"Received: {y.dtype} {y.shape}. Pass class indices, not one-hot rows or a column."
        )
    if not len(p):
        raise DataError("There must be photos to score. Received: 0. Add photos to the split.")
    p = p.astype(np.float64)
    _check_values(p, y)
    return p / p.sum(axis=1, keepdims=True), y.astype(np.int64)


def _check_values(p: np.ndarray, y: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        outside = ~((p >= 0) & (p <= 1 + ROW_SUM_TOLERANCE)).all(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(
            f"Probabilities must be finite and between 0 and 1. Received: {p[row].tolist()} in "
            f"row {row}. Retrain, or pass the model's softmax output instead of logits."
        )
    off = np.abs(p.sum(axis=1) - 1) > ROW_SUM_TOLERANCE
    if off.any():
        row = int(off.argmax())
        raise DataError(
            f"Each row of probabilities must sum to one. Received: {p[row].sum():.6g} in row "
            f"{row}. Pass the model's softmax output."
        )
    wrong = (y < 0) | (y >= CLASSES)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"Labels must be 0 to {CLASSES - 1}. Received: {int(y[row])} in row {row}. "
            "Mend the label, or leave the photo out."
        )


def photo_losses(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cross-entropy of each photo, clipped as Keras does.

    Args:
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        float64, (n,); nats.
    """
    of_truth = p[np.arange(len(y)), y]
    return np.asarray(-np.log(np.clip(of_truth, KERAS_EPSILON, 1 - KERAS_EPSILON)))


def reliability(p: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence against accuracy in bins of equal width, right edge included.

    Args:
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        Photos, mean confidence and accuracy of each bin, each
        (CALIBRATION_BINS,); int64, float64, float64; zeros where a bin is empty.
    """
    confidence = p.max(axis=1)
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1
    bins = np.clip(bins, 0, CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    some = np.maximum(count, 1)
    mean = np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS) / some
    right = np.bincount(bins, weights=p.argmax(axis=1) == y, minlength=CALIBRATION_BINS) / some
    return count, mean, right


def calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error: mean gap between confidence and accuracy.

    15 bins of equal width over the top probability, weighted by their photos,
    equation 3 of Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern
    Neural Networks", ICML 2017.

    Args:
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        Between 0 and 1; 0 is perfect.
    """
    count, confidence, accuracy = reliability(p, y)
    return float((count * np.abs(confidence - accuracy)).sum() / len(y))


def _auc(p: np.ndarray, y: np.ndarray) -> tuple[float | None, str | None]:
    missing = sorted(set(range(CLASSES)) - set(y.tolist()))
    if missing:
        names = ", ".join(LABELS[index] for index in missing)
        return None, f"not defined: no photo of class {names}"
    return float(sk.roc_auc_score(y, p, multi_class="ovr", average="macro")), None


def _class_scores(matrix: np.ndarray, index: int) -> ClassScores:
    hits = int(matrix[index, index])
    support, predicted = int(matrix[index].sum()), int(matrix[:, index].sum())
    return ClassScores(
        label=LABELS[index],
        precision=hits / predicted if predicted else None,
        recall=hits / support if support else None,
        f1=2 * hits / (support + predicted) if support + predicted else None,
        support=support,
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


RESAMPLES = 300
"""Enough for a standard error that is right to 4 %: one in sqrt(2 * RESAMPLES)."""


def standard_errors(p: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """Standard errors of what is no plain share of the photos.

    The calibration error's is by the bootstrap, Efron 1979, with a fixed seed.

    Args:
        p: float64, (n, 6); rows sum to one.
        y: int64, (n,).

    Returns:
        `loss` in nats and `ece`; null for a single photo.
    """
    if len(y) < 2:
        return {"loss": None, "ece": None}
    loss = photo_losses(p, y).std(ddof=1) / np.sqrt(len(y))
    random = np.random.default_rng(0)
    draws = (random.integers(0, len(y), len(y)) for _ in range(RESAMPLES))
    found = [calibration_error(p[rows], y[rows]) for rows in draws]
    return {
        "loss": round(float(loss), DIGITS),
        "ece": round(float(np.std(found, ddof=1)), DIGITS),
    }

"""How sure a model may be: loss of its logits, and the one number that mends it."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

LIMITS = (1.2, 4.0)
"""Validation photos are of the same people as the training photos, and would have a
model made surer; other people's hands ask for 1.1 to 1.5 (docs/accuracy.md)."""

SPREAD = 0.5
"""Standard deviation of the temperature's logarithm, before any photo is seen."""


def score(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy.

    Args:
        logits: (n, 6); unnormalised log-probabilities.
        labels: int64, (n,).

    Returns:
        Loss in nats and share of right answers.
    """
    likely = log_softmax(logits.astype(np.float64), axis=1)
    loss = -likely[np.arange(len(labels)), labels].mean()
    return float(loss), float((likely.argmax(axis=1) == labels).mean())


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Find the number to divide logits by so that they are less sure than right.

    Guo et al., On Calibration of Modern Neural Networks, 2017, with a prior: a
    few photos say little, so the summed cross-entropy is joined by
    log(temperature)² / (2 `SPREAD`²). Answers stay the same, only how sure they
    are changes.

    Args:
        logits: (n, 6), of photos that were not trained on.
        labels: int64, (n,).

    Returns:
        The temperature, within `LIMITS`; exactly the lower one where more doubt
        does not help.
    """
    low, high = np.log(LIMITS)

    def doubt(power: float) -> float:
        loss, _ = score(logits / np.exp(power), labels)
        return len(labels) * loss + power**2 / (2 * SPREAD**2)

    # The search nears a limit but never reaches it.
    power = float(minimize_scalar(doubt, bounds=(low, high), method="bounded").x)
    return float(np.exp(power)) if doubt(power) < doubt(low) else LIMITS[0]

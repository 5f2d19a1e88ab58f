"""Loss and accuracy of logits."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax


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

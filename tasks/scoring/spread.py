"""How far loss and calibration error would move with other test photos of the same kind."""

import numpy as np

from tasks.scoring.metrics import DIGITS, calibration_error, photo_losses

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

"""MixStyle: photos of a batch trade light and colour, while shapes stay theirs.

Zhou et al., Domain Generalization with MixStyle, 2021. A feature map's mean and
deviation over places say mostly how a photo was taken; mixing them with another
photo's makes the tail rely less on them. Here it is done on the stored features,
where it takes half a millisecond an update.
"""

import numpy as np
from numpy.typing import NDArray

SHARES = 0.1
"""Both parameters of the beta distribution that the share a photo keeps of its own
style is drawn from; at 0.1, the paper's, it mostly keeps nearly all or nearly nothing."""

_SMALL = np.float32(1e-6)


def mix_styles(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Mix each photo's style with that of another photo of the batch.

    Args:
        features: float32, (batch, h, w, channels).
        random: draws whether, with whom and how much.
        probability: that this batch is mixed at all.

    Returns:
        float32, of the same shape; `features` itself where nothing is mixed.
    """
    if random.random() >= probability:
        return features
    count = len(features)
    partners = random.permutation(count)
    kept = random.beta(SHARES, SHARES, (count, 1, 1, 1)).astype(np.float32)
    mean = features.mean(axis=(1, 2), keepdims=True)
    deviation = features.std(axis=(1, 2), keepdims=True) + _SMALL
    plain = (features - mean) / deviation
    mixed: NDArray[np.float32] = plain * _mix(deviation, partners, kept)
    mixed += _mix(mean, partners, kept)
    return mixed


def _mix(
    values: NDArray[np.float32], partners: NDArray[np.int64], kept: NDArray[np.float32]
) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = kept * values + (1 - kept) * values[partners]
    return mixed

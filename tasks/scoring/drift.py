"""Drift: compare what a model sees in production with what its release was validated on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 10  # equal bins of the confidence histogram, from 0 to 1
MIN_SAMPLES = 50  # fewer samples on either side say nothing about drift
PSI_LIMIT = 0.2  # a larger population stability index is a shift by the usual rule of thumb
AUC_LIMIT = 0.7
"""A classifier that tells production from validation photos this well has found a shift.

Of 50 against 50 samples, chance alone reaches it in less than one of 1,000 windows.
"""
LEVEL = 0.999  # chance that noise alone exceeds no limit; windows are compared every hour
COMPONENTS = 32  # principal components of the embeddings that the two-sample test looks at


@dataclass(frozen=True)
class Drift:
    """A population stability index or an AUC; no `value` with too few samples."""

    name: str
    value: float | None
    limit: float
    samples: int

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "too few samples"
        return "drift" if self.value > self.limit else "no drift"

    def describe(self) -> str:
        if self.value is None:
            return f"{self.name}: too few samples ({self.samples} of {MIN_SAMPLES})"
        return f"{self.name}: {self.verdict}, {self.value:.3f} (limit {self.limit:.3f})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def compare_counts(name: str, reference: Sequence[int], window: Sequence[int]) -> Drift:
    """Compare two histograms by the population stability index.

    The limit is raised to what noise reaches: the index is distributed like (1/n + 1/m)
    chi-squared (Yurdakul, "Statistical properties of population stability index", 2018).
    """
    from scipy.stats import chi2

    first, second = np.asarray(reference, float), np.asarray(window, float)
    n, m = first.sum(), second.sum()
    if min(n, m) < MIN_SAMPLES:
        return Drift(name, None, PSI_LIMIT, int(m))
    # Half a sample in each bin, so that an empty one does not make the index infinite.
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (first, second))
    index = float(((q - p) * np.log(q / p)).sum())
    noise = (1 / n + 1 / m) * float(chi2.ppf(LEVEL, len(p) - 1))
    return Drift(name, index, max(PSI_LIMIT, noise), int(m))


def compare_embeddings(reference: ArrayLike, window: ArrayLike, seed: int = 0) -> Drift:
    """Train a classifier to tell window, (m, d), from reference, (n, d); report its AUC.

    A classifier two-sample test (Lopez-Paz and Oquab, "Revisiting classifier two-sample
    tests", 2017) with cross-validated logistic regression.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    first, second = np.asarray(reference, np.float32), np.asarray(window, np.float32)
    n, m = len(first), len(second)
    if min(n, m) < MIN_SAMPLES:
        return Drift("embeddings", None, AUC_LIMIT, m)
    rows, production = np.concatenate([first, second]), np.repeat([0, 1], [n, m])
    components = min(COMPONENTS, rows.shape[1], MIN_SAMPLES // 2)
    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    model = make_pipeline(PCA(components, random_state=seed), StandardScaler(), regression)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = cross_val_predict(model, rows, production, cv=folds, method="predict_proba")
    auc = float(roc_auc_score(production, scores[:, 1]))
    return Drift("embeddings", auc, AUC_LIMIT, m)

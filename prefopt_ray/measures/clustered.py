"""The mean of per-pair numbers, with an error that knows that pairs of one prompt are not independent.

Cluster-robust variance CR1 (Cameron & Miller 2015, "A practitioner's guide to cluster-robust inference",
Eq. 11) and Student's t with (clusters - 1) degrees of freedom. Knows nothing of losses or trials.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class ClusteredMean:
    """Mean over pairs. `se` is infinite for fewer than two clusters: their spread cannot be known."""

    mean: float
    se: float
    n: int
    clusters: int


def clustered_mean(values: np.ndarray, groups: np.ndarray | None) -> ClusteredMean:
    """Mean of values (N,) and its standard error, clustered by groups (N,); None = every pair on its own.

    Raises ValueError for no values, or groups of another length.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must be a vector of at least one pair, got shape {values.shape}")
    residuals = values - values.mean()
    sums = residuals if groups is None else _sums_by_group(residuals, np.asarray(groups))
    n, clusters = len(values), len(sums)
    # CR1's correction; with one pair per cluster it is the usual s / sqrt(n).
    se = math.sqrt(clusters / (clusters - 1) * float(sums @ sums)) / n if clusters > 1 else math.inf
    return ClusteredMean(float(values.mean()), se, n, clusters)


@lru_cache(maxsize=1024)  # an answer asks for the same few again and again, a simulation for thousands
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for 0 < probability < 1 and integer degrees >= 1, to better than 1e-8.

    Own code because scipy is no dependency: the exact finite series for the distribution function
    (Abramowitz & Stegun 26.7.3-4) inverted by bisection, and the expansion 26.7.5 for many degrees.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"needs 0 < probability < 1 and degrees >= 1, got {probability}, {degrees}")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    if degrees > 200:
        return _expanded_quantile(NormalDist().inv_cdf(probability), degrees)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _sums_by_group(residuals: np.ndarray, groups: np.ndarray) -> np.ndarray:
    if groups.shape != residuals.shape:
        raise ValueError(f"groups have shape {groups.shape}, values {residuals.shape}")
    _, cluster = np.unique(groups, return_inverse=True)
    return np.bincount(cluster, weights=residuals)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)), A&S 26.7.3 (odd) and 26.7.4 (even)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    term = total = cosine if degrees % 2 else 1.0
    for k in range(3 if degrees % 2 else 2, degrees, 2):  # k = exponent of the next term, and its divisor
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total


def _expanded_quantile(z: float, degrees: int) -> float:
    """A&S 26.7.5 up to the third order in 1 / degrees."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3

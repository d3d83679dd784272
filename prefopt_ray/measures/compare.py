"""For the answer: how far apart two trials are on the same pairs, and which cannot be told apart.

Works on stored per-pair numbers only. All errors are clustered by prompt and use Student's t; they are
errors over pairs, for the training seeds at hand: nothing here knows how another seed would have done.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prefopt_ray.measures.clustered import clustered_mean, student_quantile
from prefopt_ray.measures.gain import LN2, calibrated_gain, calibrated_losses

@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its interval. With one cluster se, low and high are infinite."""

    mean: float
    se: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class GainInterval:
    """A gain in bits per pair with its interval inside [0, 1]; [0, 1] itself when nothing is known."""

    gain: float
    se: float
    low: float
    high: float
    n: int
    clusters: int


def paired_difference(
    losses_a: np.ndarray, losses_b: np.ndarray, groups: np.ndarray | None, *, confidence: float = 0.95
) -> Difference:
    """Mean of losses_a - losses_b, both (N,) over the same pairs in the same order, in their own unit.

    The interval is mean -+ t(clusters - 1) x CR1 error. Raises ValueError for unequal lengths or no pairs.
    """
    losses_a, losses_b = np.asarray(losses_a, dtype=np.float64), np.asarray(losses_b, dtype=np.float64)
    if losses_a.shape != losses_b.shape:
        raise ValueError(f"paired losses must cover the same pairs, got shapes {losses_a.shape} and {losses_b.shape}")
    difference = clustered_mean(losses_a - losses_b, groups)
    half = _half_width(difference.se, difference.clusters, confidence=confidence)
    mean = difference.mean
    return Difference(mean, difference.se, mean - half, mean + half, difference.n, difference.clusters)


def gain_difference(
    margins_a: np.ndarray, margins_b: np.ndarray, groups: np.ndarray | None, *, confidence: float = 0.95
) -> Difference:
    """Gain of a minus gain of b in bits per pair, each at its own calibration; positive = a is better.

    Raises ValueError when margins are not finite: such a trial has no gain to compare.
    """
    return paired_difference(_loss_bits(margins_b), _loss_bits(margins_a), groups, confidence=confidence)


def gain_interval(margins: np.ndarray, groups: np.ndarray | None, *, confidence: float = 0.95) -> GainInterval:
    """The gain of margins (N,) with its confidence interval. Raises ValueError for margins that are not finite."""
    loss = clustered_mean(_loss_bits(margins), groups)
    half = _half_width(loss.se, loss.clusters, confidence=confidence)
    gain = max(0.0, 1.0 - loss.mean)
    return GainInterval(gain, loss.se, max(0.0, gain - half), min(1.0, gain + half), loss.n, loss.clusters)


def indistinguishable(
    best: np.ndarray, others: Mapping[str, np.ndarray], groups: np.ndarray | None, *, confidence: float = 0.95
) -> dict[str, Difference]:
    """Those of `others` that cannot be told apart from `best`, each as gain(best) - gain(other).

    `best` and the others are margins (N,) over the same pairs. An other is told apart when its one-sided
    interval at error (1 - confidence) / len(others) lies above zero. This is Gupta's subset selection with
    Bonferroni's bound: with probability `confidence` the truly best configuration is `best` or among those
    returned, even when `best` was picked on these very pairs. (Holm's sharper steps lose that guarantee.)
    The intervals returned are the ones the decision was made with: an other stays while its interval reaches zero.
    """
    if not others:
        return {}
    error = (1 - confidence) / len(others)
    compared = {
        name: gain_difference(best, margins, groups, confidence=1 - 2 * error) for name, margins in others.items()
    }
    return {name: difference for name, difference in compared.items() if not difference.low > 0}


def _loss_bits(margins: np.ndarray) -> np.ndarray:
    """Calibrated losses in bits, (N,): their mean is 1 - gain."""
    gain = calibrated_gain(margins, None)
    if not gain.valid:
        raise ValueError("margins must be finite")
    return calibrated_losses(margins, gain.scale) / LN2


def _half_width(se: float, clusters: int, *, confidence: float) -> float:
    if clusters < 2:
        return math.inf
    return student_quantile((1 + confidence) / 2, clusters - 1) * se

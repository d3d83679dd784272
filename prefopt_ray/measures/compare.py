"""For the answer: how far apart two trials are on the same pairs, and which cannot be told apart.

Works on stored per-pair numbers only. All errors are clustered by prompt and use Student's t. Errors over pairs
alone are for the adapters at hand: another seed would have made another adapter. Where configurations were trained
with several seeds, a SeedSpread adds what that does to the gain.

The gain of seed k on pair i is mu + u_i + v_k + e_ik: the configuration's own, how hard the pair is, how lucky the
seed, and what only the two have together. Averaged over K seeds and N pairs its variance is

    (var(u) + var(e)/K) / N     estimated by the clustered variance of the per-pair means over seeds
  + var(v) / K                  estimated by s^2 / K, s^2 the variance of the seeds' gains

s^2 holds var(e)/N once more, so the sum is never too small. With two or three seeds a configuration's own s^2 may be
near zero by chance: the larger of it and the one pooled over all configurations of the sweep is used, with the
pooled degrees of freedom. Both errors are independent, so their half-widths add in squares, each with its own t.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class SeedSpread:
    """Variance of one seed's gain around its configuration's, bits^2, with the degrees of freedom behind it."""

    variance: float
    degrees: int


def losses_by_seed(margins: Sequence[np.ndarray]) -> np.ndarray:
    """(K, N) calibrated losses in bits of a configuration's seeds, from each one's margins (N,) over the same pairs.

    Every seed is at its own temperature; 1 - the mean of a row is that seed's gain. Raises ValueError for margins
    that are not finite.
    """
    return np.stack([_loss_bits(of_seed) for of_seed in margins])


def pooled_spread(losses: Iterable[np.ndarray]) -> SeedSpread | None:
    """The spread within configurations, from each one's losses (K, N); None where none has two seeds."""
    gains = [by_seed.mean(axis=1) for by_seed in losses if len(by_seed) > 1]
    degrees = sum(len(seeds) - 1 for seeds in gains)
    if not degrees:
        return None
    return SeedSpread(float(sum(((seeds - seeds.mean()) ** 2).sum() for seeds in gains) / degrees), degrees)


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


def seeds_difference(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray | None, *, spread: SeedSpread | None, confidence: float = 0.95,
    candidates: int = 1,
) -> Difference:
    """Mean gain of a minus mean gain of b, bits per pair, from their losses (K, N) by seed over the same pairs.

    `candidates`: how many configurations `a` was picked from by the gains of these very seeds; the best of many is
    partly the luckiest, so the seeds' part of the interval allows for each of them (Bonferroni). The pairs need
    nothing: nobody was picked on them. Without a `spread` this is the difference of the adapters at hand.
    """
    difference = paired_difference(b.mean(axis=0), a.mean(axis=0), groups, confidence=confidence)
    se, half = _with_seeds(difference, [a, b], spread=spread, confidence=1 - (1 - confidence) / candidates)
    return replace(difference, se=se, low=difference.mean - half, high=difference.mean + half)


def seeds_interval(
    losses: np.ndarray, groups: np.ndarray | None, *, spread: SeedSpread | None, confidence: float = 0.95,
    candidates: int = 1,
) -> GainInterval:
    """The mean gain over seeds, from losses (K, N), with its interval; see seeds_difference."""
    over_pairs = paired_difference(losses.mean(axis=0), np.zeros(losses.shape[1]), groups, confidence=confidence)
    se, half = _with_seeds(over_pairs, [losses], spread=spread, confidence=1 - (1 - confidence) / candidates)
    gain = max(0.0, 1.0 - over_pairs.mean)
    return GainInterval(gain, se, max(0.0, gain - half), min(1.0, gain + half), over_pairs.n, over_pairs.clusters)


def indistinguishable(
    best: np.ndarray, others: Mapping[str, np.ndarray], groups: np.ndarray | None, *,
    spread: SeedSpread | None = None, confidence: float = 0.95,
) -> dict[str, Difference]:
    """Those of `others` that cannot be told apart from `best`, each as gain(best) - gain(other).

    `best` and each other: losses (K, N) by seed, all over the same pairs. An other is told apart when its one-sided
    interval at error (1 - confidence) / len(others) lies above zero. This is Gupta's subset selection with
    Bonferroni's bound: with probability `confidence` the truly best configuration is `best` or among those
    returned, even when `best` was picked on these very pairs and seeds. (Holm's sharper steps lose that guarantee.)
    The intervals returned are the ones the decision was made with: an other stays while its interval reaches zero.
    """
    if not others:
        return {}
    error = (1 - confidence) / len(others)
    compared = {
        name: seeds_difference(best, losses, groups, spread=spread, confidence=1 - 2 * error)
        for name, losses in others.items()
    }
    return {name: difference for name, difference in compared.items() if not difference.low > 0}


def _with_seeds(
    over_pairs: Difference, losses: Sequence[np.ndarray], *, spread: SeedSpread | None, confidence: float
) -> tuple[float, float]:
    """(se, half-width) of a mean over seeds: the pairs' part as given, the seeds' part at its own `confidence`.

    `losses`: (K, N) of each configuration that takes part in it.
    """
    half = over_pairs.high - over_pairs.mean
    if spread is None:
        return over_pairs.se, half
    own = [by_seed.mean(axis=1).var(ddof=1) if len(by_seed) > 1 else 0.0 for by_seed in losses]
    variance = sum(max(s2, spread.variance) / len(by_seed) for s2, by_seed in zip(own, losses, strict=True))
    of_seeds = student_quantile((1 + confidence) / 2, spread.degrees) * math.sqrt(variance)
    return math.hypot(over_pairs.se, math.sqrt(variance)), math.hypot(half, of_seeds)


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

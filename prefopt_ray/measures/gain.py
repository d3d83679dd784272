"""The objective: calibrated gain G, the share of a bit per pair that margins tell about the preference.

G(h) = 1 - min over a >= 0 of mean softplus(-a h) / ln 2: what a Bradley-Terry reader gains over a coin
toss once it may choose the temperature. It is unchanged by h -> c h, so betas, units and losses compare.
G is 0 when h carries no information and 1 when it separates every pair. Knows no loss and no trial.
"""

from dataclasses import dataclass

import numpy as np

from prefopt_ray.measures.clustered import clustered_mean

LN2 = float(np.log(2.0))
INVALID_GAIN = -1.0  # of margins that are not all finite: below every real gain, and still a finite number
UNKNOWN_SE = 1.0  # the whole range of G: from fewer than two clusters nothing may be claimed

# Separated margins would send a to infinity; at 20 the median pair's loss is 2e-9 nats, which is none.
_LARGEST_SCALE = 20.0


@dataclass(frozen=True)
class Gain:
    """`gain` and `se` in bits per pair, `scale` = a* per unit of margin, from `n` pairs."""

    gain: float
    se: float
    scale: float
    n: int

    @property
    def valid(self) -> bool:
        return self.gain >= 0.0


def calibrated_gain(margins: np.ndarray, groups: np.ndarray | None) -> Gain:
    """G of margins (N,), any unit, with its standard error clustered by groups (N,); None = no clusters.

    a* is at most 20 / median |margin| (over non-zero margins). Its in-sample optimism is about 1/(2n) nats,
    little from n = 256 on. SE = sd(softplus(-a* h)) / (ln 2 sqrt(n)); that a* was fitted adds nothing to
    first order, since the derivative there is zero. A NaN or infinite margin gives gain INVALID_GAIN.
    Raises ValueError for no margins.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if margins.ndim != 1 or len(margins) == 0:
        raise ValueError(f"margins must be a vector of at least one pair, got shape {margins.shape}")
    if not np.isfinite(margins).all():
        return Gain(INVALID_GAIN, UNKNOWN_SE, 0.0, len(margins))
    scale = _best_scale(margins)
    loss = clustered_mean(calibrated_losses(margins, scale), groups)
    se = loss.se / LN2 if loss.clusters > 1 else UNKNOWN_SE
    return Gain(max(0.0, 1.0 - loss.mean / LN2), se, scale, loss.n)


def calibrated_losses(margins: np.ndarray, scale: float) -> np.ndarray:
    """softplus(-scale x margin), nats per pair: (N,) float64."""
    return np.logaddexp(0.0, -scale * np.asarray(margins, dtype=np.float64))


def _best_scale(margins: np.ndarray) -> float:
    """argmin over 0 <= a <= 20 / median |h| of the convex mean softplus(-a h); 0 when the mean margin is <= 0."""
    if not margins.mean() > 0:  # the slope at a = 0 is -mean(h) / 2
        return 0.0
    unit = float(np.median(np.abs(margins[margins != 0])))
    return _root_of_slope(margins / unit) / unit


def _root_of_slope(x: np.ndarray) -> float:
    """Where the mean softplus(-a x) is flat, in (0, 20]: Newton, kept inside a bracket that halves.

    A root of the slope, not a golden-section search: that resolves a* only to the square root of the
    precision, and not at all when one outlier puts a* at 1e-20.
    """
    low, high = 0.0, _LARGEST_SCALE
    if _slope(x, high)[0] <= 0:
        return high
    a = 1.0
    for _ in range(400):  # 5 to 10 are usual; an outlier needs one halving per factor of two
        slope, curvature = _slope(x, a)
        low, high = (a, high) if slope < 0 else (low, a)
        newton = a - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - a) <= 1e-10 * a:
            break
        a = following
    return a


def _slope(x: np.ndarray, a: float) -> tuple[float, float]:
    """First and second derivative of mean softplus(-a x) in a."""
    weight = np.exp(-np.logaddexp(0.0, a * x))  # sigma(-a x)
    return float(-(x * weight).mean()), float((x * x * weight * (1 - weight)).mean())

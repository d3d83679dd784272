"""Strengths of players from pairwise comparisons: P(i beats j) = sigma(r_i - r_j) (Bradley & Terry 1952).

A tie is half a win for each. Davidson's (1970) model of ties has one parameter more, which every player shares and
nobody ranks by; in a round robin half wins order the players alike, and the interval that is clustered by prompt does
not rest on the model's variance. Knows no judge and no policy; its players are names.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from prefopt_ray.measures.clustered import student_quantile

# Standard deviation 2 per strength: a player without comparisons stays at 0, one that always won stays finite, and
# 95 % of gaps lie within 5.5, a win rate of .996. Ten comparisons between even players already outweigh it.
PRIOR_VARIANCE = 4.0


class NoFiniteStrengths(ValueError):
    """Without a prior the likelihood grows for ever: who it drives apart is in the message."""


@dataclass(frozen=True, eq=False)
class Comparisons:
    """N comparisons. Raises ValueError when the arrays do not fit each other or the players.

    first, second (N,) indices into `players`; scores (N,) 1 = first won, 0 = second won, 0.5 = tie (any share of a
    win between them counts as that); clusters (N,) such as prompt ids, None = every comparison on its own.
    """

    players: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    clusters: np.ndarray | None = None

    def __post_init__(self) -> None:
        columns = [self.first, self.second, self.scores] + ([] if self.clusters is None else [self.clusters])
        shapes = {np.shape(column) for column in columns}
        if len(shapes) != 1 or len(shapes.pop()) != 1:
            raise ValueError(f"comparisons need vectors of one length, got {[np.shape(c) for c in columns]}")
        ends = np.concatenate([self.first, self.second])
        if len(ends) and not (0 <= ends.min() and ends.max() < len(self.players)):
            raise ValueError(f"players are numbered 0 to {len(self.players) - 1}, got {ends.min()} to {ends.max()}")
        if (np.asarray(self.first) == self.second).any():
            raise ValueError("a player cannot be compared with itself")
        if not ((np.asarray(self.scores) >= 0) & (np.asarray(self.scores) <= 1)).all():
            raise ValueError("scores must be between 0 and 1")


@dataclass(frozen=True, eq=False)
class Strengths:
    """Strengths (K,) in logits with sum 0 and their covariance (K, K); `quantile` makes the intervals."""

    players: tuple[str, ...]
    values: np.ndarray
    covariance: np.ndarray
    quantile: float

    def interval(self, player: int) -> tuple[float, float]:
        """(low, high) of one strength: how far the player is above the mean of all."""
        half = self._half_width(np.eye(len(self.players))[player])
        return float(self.values[player] - half), float(self.values[player] + half)

    def gap(self, player: int, other: int) -> tuple[float, float, float]:
        """(gap, low, high) of player minus other: sigma of it is the chance to win against the other."""
        identity = np.eye(len(self.players))
        half = self._half_width(identity[player] - identity[other])
        gap = float(self.values[player] - self.values[other])
        return gap, gap - half, gap + half

    @property
    def order(self) -> tuple[int, ...]:
        """Players from the strongest to the weakest; equal ones as listed."""
        return tuple(int(player) for player in np.argsort(-self.values, kind="stable"))

    def _half_width(self, direction: np.ndarray) -> float:
        variance = float(direction @ self.covariance @ direction)
        return math.inf if math.isinf(self.quantile) else self.quantile * math.sqrt(max(0.0, variance))


def fit_strengths(
    comparisons: Comparisons, *, prior_variance: float | None = PRIOR_VARIANCE, confidence: float = 0.95
) -> Strengths:
    """The strengths of highest posterior under a Gaussian prior of mean 0; None = of highest likelihood.

    The covariance is the inverse Hessian on the space of sum 0; with clusters it is the sandwich around the
    clusters' scores (CR1) and the quantile is Student's t (clusters - 1), infinite for one cluster.
    Raises NoFiniteStrengths without a prior when the likelihood has no maximum, ValueError for a bad variance.
    """
    if prior_variance is None:
        _require_finite_maximum(comparisons)
    elif not prior_variance > 0:
        raise ValueError(f"prior_variance must be > 0 or None, got {prior_variance}")
    precision = 0.0 if prior_variance is None else 1 / prior_variance
    values = _maximise(comparisons, precision)
    hessian = _hessian(comparisons, values, precision)
    bread = _sum_zero_inverse(hessian)
    if comparisons.clusters is None:
        return Strengths(comparisons.players, values, bread, NormalDist().inv_cdf((1 + confidence) / 2))
    meat, clusters = _cluster_scores(comparisons, values)
    quantile = student_quantile((1 + confidence) / 2, clusters - 1) if clusters > 1 else math.inf
    return Strengths(comparisons.players, values, bread @ meat @ bread, quantile)


def gradient_path(
    comparisons: Comparisons, initial: Sequence[float], *, learning_rate: float, epochs: int
) -> Iterator[np.ndarray]:
    """Strengths (K,) before training and after each epoch of plain SGD, one comparison per step, in their order.

    The textbook way to fit a reward model, and the textbook overfit: where some player never lost there is no
    maximum, and the longer it runs the larger the gaps get, by ln 10 per tenfold of epochs once it is late.
    Each step moves winner and loser by the same amount, so the sum never changes.
    """
    strengths = [float(value) for value in initial]
    steps = list(zip(comparisons.first.tolist(), comparisons.second.tolist(), comparisons.scores.tolist(), strict=True))
    yield np.array(strengths)
    for _ in range(epochs):
        for first, second, score in steps:
            pull = learning_rate * (score - _chance(strengths[first] - strengths[second]))
            strengths[first] += pull
            strengths[second] -= pull
        yield np.array(strengths)


def negative_log_likelihood(comparisons: Comparisons, strengths: np.ndarray) -> float:
    """Sum over comparisons, in nats; a tie is half of either outcome."""
    gaps = strengths[comparisons.first] - strengths[comparisons.second]
    scores = comparisons.scores
    return float((scores * np.logaddexp(0, -gaps) + (1 - scores) * np.logaddexp(0, gaps)).sum())


def _require_finite_maximum(comparisons: Comparisons) -> None:
    """Ford (1957): there is a maximum if and only if, for every split of the players in two, each side took
    something from the other: the graph "took something from" is strongly connected."""
    count = len(comparisons.players)
    reach = np.eye(count, dtype=bool)
    reach[comparisons.first[comparisons.scores > 0], comparisons.second[comparisons.scores > 0]] = True
    reach[comparisons.second[comparisons.scores < 1], comparisons.first[comparisons.scores < 1]] = True
    for middle in range(count):  # Warshall
        reach |= reach[:, [middle]] & reach[[middle], :]
    if reach.all():
        return
    # Whoever reaches nobody outside their own group never took anything from the rest: they end lowest.
    smallest = min(range(count), key=lambda player: int(reach[player].sum()))
    low = [comparisons.players[i] for i in range(count) if reach[smallest, i]]
    rest = [comparisons.players[i] for i in range(count) if not reach[smallest, i]]
    met = reach[:, smallest].sum() > len(low)
    how = "never won against" if met else "never met"
    raise NoFiniteStrengths(
        f"{', '.join(low)} {how} {', '.join(rest)}: without a prior the gap between them has no finite best value"
    )


def _maximise(comparisons: Comparisons, precision: float) -> np.ndarray:
    """Newton's method on the space of sum 0, each step halved until the objective falls."""

    def objective(values: np.ndarray) -> float:
        return negative_log_likelihood(comparisons, values) + 0.5 * precision * float(values @ values)

    values = np.zeros(len(comparisons.players))
    for _ in range(200):  # 5 to 10 are usual
        gradient = _gradient(comparisons, values) + precision * values
        step = _sum_zero_inverse(_hessian(comparisons, values, precision)) @ gradient
        current, share = objective(values), 1.0
        while objective(values - share * step) > current and share > 1e-9:
            share /= 2
        values = values - share * step
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    return values - values.mean()


def _residuals(comparisons: Comparisons, values: np.ndarray) -> np.ndarray:
    """(N,) chance of a win of the first minus its score."""
    gaps = values[comparisons.first] - values[comparisons.second]
    return np.exp(-np.logaddexp(0, -gaps)) - comparisons.scores


def _gradient(comparisons: Comparisons, values: np.ndarray) -> np.ndarray:
    residuals, count = _residuals(comparisons, values), len(values)
    won = np.bincount(comparisons.first, weights=residuals, minlength=count)
    return won - np.bincount(comparisons.second, weights=residuals, minlength=count)


def _hessian(comparisons: Comparisons, values: np.ndarray, precision: float) -> np.ndarray:
    """(K, K): the Laplacian of the comparisons, each weighted by sigma (1 - sigma), plus the prior."""
    gaps = values[comparisons.first] - values[comparisons.second]
    weights = np.exp(-np.logaddexp(0, gaps) - np.logaddexp(0, -gaps))  # (N,)
    edges = np.zeros((len(values), len(values)))
    np.add.at(edges, (comparisons.first, comparisons.second), weights)
    edges = edges + edges.T
    return np.diag(edges.sum(axis=1) + precision) - edges


def _sum_zero_inverse(hessian: np.ndarray) -> np.ndarray:
    """The inverse on vectors of sum 0, where a connected Laplacian has one; 0 along the constant vector."""
    count = len(hessian)
    constant = np.full((count, count), 1 / count)
    return np.linalg.inv(hessian + constant) @ (np.eye(count) - constant)


def _cluster_scores(comparisons: Comparisons, values: np.ndarray) -> tuple[np.ndarray, int]:
    """(K, K) sum over clusters of the outer product of their gradients, with CR1's factor; and their number."""
    names, cluster = np.unique(comparisons.clusters, return_inverse=True)
    residuals, clusters = _residuals(comparisons, values), len(names)
    gradients = np.zeros((clusters, len(values)))
    np.add.at(gradients, (cluster, comparisons.first), residuals)
    np.add.at(gradients, (cluster, comparisons.second), -residuals)
    factor = clusters / (clusters - 1) if clusters > 1 else 1.0
    return factor * gradients.T @ gradients, clusters


def _chance(gap: float) -> float:
    """sigma(gap) that neither overflows nor loses digits."""
    return 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))

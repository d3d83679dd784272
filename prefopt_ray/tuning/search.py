"""Which configurations are tried, in which order: grid, random, or TPE through Optuna.

Points are pure functions of the spec's seed (TPE: and of the scores told), so a resumed sweep draws
the same ones. The baseline is always first; a grid's or random draw's rest is shuffled, because in
asynchronous halving the first arrivals at a rung survive. Knows nothing of Ray.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prefopt_ray.spec.space import Choices, Domain, Integer, LogUniform, Space, grid_points


@dataclass(frozen=True)
class Point:
    """One configuration: full loss name, its parameters and learning_rate."""

    loss: str
    values: dict[str, float]
    baseline: bool = False


class Proposer(Protocol):
    def propose(self) -> Point | None:
        """The next point; None when there is none left."""
        ...

    def tell(self, point: Point, score: float) -> None:
        """A point proposed before (in this session or, on resume, in an earlier one) ended with this score."""
        ...


class Listed:
    """Points known beforehand, in order. `done` of them were proposed in an earlier session."""

    def __init__(self, points: list[Point], *, done: int = 0) -> None:
        self._points = iter(points[done:])

    def propose(self) -> Point | None:
        return next(self._points, None)

    def tell(self, point: Point, score: float) -> None:
        return None  # a list does not learn


class Tpe:
    """Tree-structured Parzen estimator, one Optuna study per loss, losses in turn; the baseline first.

    Earlier proposals are handed in on resume, so that their scores inform the studies once told.
    """

    def __init__(
        self, spaces: dict[str, Space], *, trials_per_loss: int, seed: int, baseline: Point, earlier: list[Point],
        most: int | None = None,
    ) -> None:
        """`most`: points in all, earlier ones included; None = as many as `trials_per_loss` makes."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._spaces, self._baseline = spaces, baseline
        self._pending = [] if earlier else [baseline]
        self._left = {
            loss: trials_per_loss - sum(1 for p in earlier if p.loss == loss and not p.baseline) for loss in spaces
        }
        self._studies = {
            loss: optuna.create_study(
                direction="maximize",
                # Proposals already made shift the seed: a resumed study must not draw its start-up points again.
                sampler=optuna.samplers.TPESampler(
                    seed=seed + 1000 * index + (trials_per_loss - self._left[loss]),
                    # Optuna's 10 random points would be all of a usual budget; trials run side by side.
                    n_startup_trials=max(3, trials_per_loss // 3),
                    constant_liar=True,
                ),
            )
            for index, loss in enumerate(spaces)
        }
        self._asked: list[tuple[Point, Any]] = []
        self._affordable = (math.inf if most is None else most) - len(earlier)

    def propose(self) -> Point | None:
        if self._affordable <= 0:
            return None
        self._affordable -= 1
        if self._pending:
            return self._pending.pop()
        loss = max(self._left, key=lambda name: self._left[name], default=None)
        if loss is None or self._left[loss] <= 0:
            return None
        self._left[loss] -= 1
        asked = self._studies[loss].ask(_distributions(self._spaces[loss], self._optuna))
        point = Point(loss, _with_constants(asked.params, self._spaces[loss]))
        self._asked.append((point, asked))
        return point

    def tell(self, point: Point, score: float) -> None:
        if not math.isfinite(score):
            raise ValueError(f"a score must be finite, got {score}")
        for known, asked in self._asked:
            if known is point:
                self._studies[point.loss].tell(asked, score)
                return
        if point.loss in self._studies and _inside(point.values, self._spaces[point.loss]):
            distributions = _distributions(self._spaces[point.loss], self._optuna)
            params = {name: point.values[name] for name in distributions}
            self._studies[point.loss].add_trial(
                self._optuna.trial.create_trial(params=params, distributions=distributions, value=score)
            )


def listed_points(
    spaces: dict[str, Space], *, method: str, trials_per_loss: int, seed: int, baseline: Point | None
) -> list[Point]:
    """Baseline, then the grid or random draws of every loss, shuffled; the baseline's own point only once."""
    rest = [
        Point(loss, values)
        for index, (loss, space) in enumerate(spaces.items())
        for values in (
            grid_points(space) if method == "grid" else _draws(space, count=trials_per_loss, seed=[seed, index])
        )
    ]
    order = np.random.default_rng([seed, 7919]).permutation(len(rest))
    shuffled = [rest[i] for i in order]
    if baseline is None:
        return shuffled
    return [baseline, *(p for p in shuffled if (p.loss, p.values) != (baseline.loss, baseline.values))]


def _draws(space: Space, *, count: int, seed: list[int]) -> Iterator[dict[str, float]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {name: _draw(domain, rng) for name, domain in space.items()}


def _draw(domain: Domain, rng: np.random.Generator) -> float:
    if isinstance(domain, Choices):
        return domain.values[int(rng.integers(len(domain.values)))]
    if isinstance(domain, Integer):
        return int(rng.integers(domain.low, domain.high + 1))
    if isinstance(domain, LogUniform):
        return _readable(math.exp(rng.uniform(math.log(domain.low), math.log(domain.high))), domain.low, domain.high)
    return _readable(float(rng.uniform(domain.low, domain.high)), domain.low, domain.high)


def _readable(value: float, low: float, high: float) -> float:
    """Three significant digits: a table can show the whole value, and no response is that sharp."""
    return min(high, max(low, float(f"{value:.3g}")))


def _distributions(space: Space, optuna: Any) -> dict[str, Any]:
    out = {}
    for name, domain in space.items():
        if isinstance(domain, Choices):
            if len(domain.values) > 1:
                out[name] = optuna.distributions.CategoricalDistribution(domain.values)
        elif isinstance(domain, Integer):
            out[name] = optuna.distributions.IntDistribution(domain.low, domain.high)
        else:
            log = isinstance(domain, LogUniform)
            out[name] = optuna.distributions.FloatDistribution(domain.low, domain.high, log=log)
    return out


def _with_constants(params: dict[str, float], space: Space) -> dict[str, float]:
    return {
        name: domain.values[0] if isinstance(domain, Choices) and len(domain.values) == 1 else params[name]
        for name, domain in space.items()
    }


def _inside(values: dict[str, float], space: Space) -> bool:
    """The baseline may lie outside the searched space; it then teaches nothing."""
    for name, domain in space.items():
        value = values.get(name)
        if isinstance(domain, Choices):
            if value not in domain.values:
                return False
        elif value is None or not domain.low <= value <= domain.high:
            return False
    return True

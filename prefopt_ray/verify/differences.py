"""How far two arms' steps lie apart, and how far they may: pure arithmetic on what the steps computed.

In float32 another layout changes the last digits only, and the limits are fixed. In half precision the size of a
rounding depends on model and lengths: the limit is what the plain engine differs from itself when pairs are grouped
otherwise, SPREAD times, since a maximum over few steps is itself uncertain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from prefopt_ray.verify.arms import Arm

SPREAD = 3.0
MARGIN_AT_START = 1e-2  # nats, in half precision; float32 has the log-probs' limit


@dataclass(frozen=True)
class Limit:
    """A difference d of a value v is within it when d <= absolute + relative |v|."""

    absolute: float
    relative: float

    def share(self, difference: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Elementwise, of what is allowed: at most 1 is within."""
        return difference / (self.absolute + self.relative * np.abs(value))


# Log-probs are sums over a completion: beside 1e-4 nats, a few units in the last place of the sum.
FLOAT32 = {"loss": Limit(1e-5, 1e-5), "grad_norm": Limit(1e-6, 1e-4), "logps": Limit(1e-4, 2e-6)}


@dataclass(frozen=True)
class Difference:
    """The largest over all steps of one quantity between two arms."""

    quantity: str  # loss | grad_norm | logps
    absolute: float
    relative: float
    allowed: float  # share of the limit that the worst step uses; above 1 is beyond
    worst_step: int

    @property
    def within(self) -> bool:
        return self.allowed <= 1


@dataclass(frozen=True)
class Comparison:
    """Two arms, quantity by quantity."""

    first: str
    second: str
    differences: tuple[Difference, ...]

    @property
    def within(self) -> bool:
        return all(difference.within for difference in self.differences)


def compare_all(arms: Sequence[Arm], limits: dict[str, Limit]) -> tuple[Comparison, ...]:
    """Every arm with every later one."""
    return tuple(compare(first, second, limits) for first, second in combinations(arms, 2))


def compare(first: Arm, second: Arm, limits: dict[str, Limit]) -> Comparison:
    """Every step must be there in both and finite: an arm that ended early or broke is beyond every limit."""
    columns = {"loss": _losses, "grad_norm": _norms, "logps": _logps}
    made = min(len(first.steps), len(second.steps))
    if made < max(len(first.steps), len(second.steps)):
        missing = (Difference(name, math.inf, math.inf, math.inf, made + 1) for name in columns)
        return Comparison(first.name, second.name, tuple(missing))
    return Comparison(first.name, second.name, tuple(
        _largest(name, column(first, second), limits[name]) for name, column in columns.items()
    ))


def measured_limits(spread: Comparison, *, dtype: str) -> dict[str, Limit]:
    """What an arm may differ where `spread` is the plain engine's difference from itself in `dtype`."""
    limits = {
        found.quantity: replace(
            FLOAT32[found.quantity], absolute=max(FLOAT32[found.quantity].absolute, SPREAD * found.absolute)
        )
        for found in spread.differences
    }
    # A norm is one number, and its spread may be small by chance: half a unit of the precision is always allowed.
    unit = torch.finfo(getattr(torch, dtype)).eps
    return limits | {"grad_norm": replace(limits["grad_norm"], relative=unit / 2)}


def _losses(first: Arm, second: Arm) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array([a.loss]), np.array([b.loss])) for a, b in zip(first.steps, second.steps, strict=True)]


def _norms(first: Arm, second: Arm) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array([a.grad_norm]), np.array([b.grad_norm])) for a, b in zip(first.steps, second.steps, strict=True)]


def _logps(first: Arm, second: Arm) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pair by pair where both know them, else means over the step."""
    return [
        (a.logps, b.logps) if a.logps.shape == b.logps.shape else (a.means, b.means)
        for a, b in zip(first.steps, second.steps, strict=True)
    ]


def _largest(quantity: str, steps: list[tuple[np.ndarray, np.ndarray]], limit: Limit) -> Difference:
    absolute = [np.abs(a - b).max() for a, b in steps]
    relative = [(np.abs(a - b) / np.maximum(np.abs(a), 1e-12)).max() for a, b in steps]
    # A NaN is beyond every limit, and is carried by max() where np.nanmax would drop it.
    shares = np.array([limit.share(np.abs(a - b), a).max() for a, b in steps])
    worst = int(np.argmax(np.where(np.isnan(shares), np.inf, shares)))
    allowed = float(shares[worst]) if np.isfinite(shares[worst]) else float("inf")
    return Difference(quantity, float(np.max(absolute)), float(np.max(relative)), allowed, worst + 1)

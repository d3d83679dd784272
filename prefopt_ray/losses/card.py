"""What a loss card is: one loss's parameters, needs and promises, as plain data. No torch.

`cards` holds the built-in ones, `compositions` makes further ones of them, `registry` keeps a person's own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """A usual search range; `log` = drawn uniformly in the logarithm."""

    low: float
    high: float
    log: bool = True


@dataclass(frozen=True)
class Param:
    """One number a loss reads. `lower < value < upper`, or `<=` where the bound is inclusive."""

    name: str
    default: float
    usual: Range
    meaning: str
    lower: float = 0.0
    upper: float = math.inf
    lower_inclusive: bool = False
    upper_inclusive: bool = False
    searched: bool = True  # `{}` in a spec searches `usual`; otherwise the default is used

    def allows(self, value: float) -> bool:
        above = value >= self.lower if self.lower_inclusive else value > self.lower
        below = value <= self.upper if self.upper_inclusive else value < self.upper
        return math.isfinite(value) and above and below

    @property
    def rule(self) -> str:
        low = f"{self.name} must be {'>=' if self.lower_inclusive else '>'} {self.lower:g}"
        if math.isinf(self.upper):
            return low
        return f"{low} and {'<=' if self.upper_inclusive else '<'} {self.upper:g}"


@dataclass(frozen=True)
class LossCard:
    """What the rest of the program may know about a loss without computing it.

    `reward` is the implicit reward that gain, accuracy and `rewards/*` are measured on: `sum` (D), `per_token`
    (D / tokens), `policy_sum`, `policy_per_token` (log pi, without the reference) or `log_odds` (of the mean
    token probability). A loss that bends its log-ratios first (f-divergences, chipo) or adds what the policy
    cannot change (rdpo) keeps the log-ratio itself as its reward: it orders pairs alike and stays in nats.
    """

    name: str
    title: str
    formula: str  # per pair; h = Dc - Dr, u = beta h, D = summed log-ratio to the reference
    source: str
    params: tuple[Param, ...]
    needs: frozenset[str]  # of reference, lengths, per_token, token_sq, distribution, mismatched, scores
    reward: str
    beta_unit: str
    loss_at_start: Callable[[Mapping[str, float]], float] | None  # L0, policy == reference; None = measured
    learning_rate_lora: Range
    learning_rate_full: Range
    bradley_terry: bool  # -log sigma of the scaled reward: calibration is meaningful
    bounded_below: bool = True
    start_is_scale: bool = True  # twice the loss at the start is a lot; not for a steep penalty that starts at zero
    scope: str = "pair"  # pair: a row's loss depends on its own row (and the state); batch: on the whole batch
    stateful: bool = False
    experimental: bool = False  # not among the widely used ones, which stand first everywhere
    aliases: tuple[str, ...] = ()
    clamp: str = ""  # where the computed loss departs from the formula to stay finite
    trl: str = ""  # what TRL 1.16 calls it, and how it differs there
    note: str = ""

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    @property
    def param_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.params)

    @property
    def defaults(self) -> dict[str, float]:
        return {p.name: p.default for p in self.params}

    def learning_rate(self, adapter_kind: str) -> Range:
        return self.learning_rate_full if adapter_kind == "none" else self.learning_rate_lora

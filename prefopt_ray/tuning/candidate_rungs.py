"""Stop rules that `replay` offers to be measured beside the shipped ones: HyperBand and median stopping.

No spec builds them; docs/decisions/0004-schedulers.md has the numbers that kept them out. Sources: Li et al.,
arXiv:1603.06560 (HyperBand); Golovin et al., "Google Vizier", KDD 2017, section 3.2.2 (median stopping).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from prefopt_ray.results.ledger import Decision
from prefopt_ray.tuning.rungs import Arrival, LockstepHalving, Resolved, StopRule, SuccessiveHalving

FEWEST_OTHERS = 3  # below it, a median of others is one trial's luck


@dataclass
class Brackets(StopRule):
    """HyperBand: successive halvings side by side that begin at later and later rungs; the last one stops nobody.

    `shares` says how many configurations each bracket gets of every `sum(shares)`; which one is a matter of the
    configuration's number alone.
    """

    brackets: Sequence[StopRule] = ()
    shares: Sequence[int] = ()
    _cycle: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cycle = _spread(self.shares)

    def decide(self, arrival: Arrival) -> Decision | None:
        return self._bracket(arrival).decide(arrival)

    def resolve(self) -> Resolved | None:
        asked = (bracket.resolve() for bracket in self.brackets)
        return next((resolved for resolved in asked if resolved is not None), None)

    def exhausted(self) -> None:
        for bracket in self.brackets:
            bracket.exhausted()

    def replay(self, arrival: Arrival, decision: Decision) -> None:
        self._bracket(arrival).replay(arrival, decision)

    def _bracket(self, arrival: Arrival) -> StopRule:
        return self.brackets[self._cycle[arrival.number % len(self._cycle)]]


@dataclass
class MedianStops(StopRule):
    """Stop a trial whose best value is below the median, over the others, of their mean value up to the same step.

    Others that have not come as far say nothing. Values are best-so-far, as everywhere here.
    """

    _values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # group -> trial -> step -> value

    def decide(self, arrival: Arrival) -> Decision | None:
        if arrival.step not in self.rungs:
            return None
        trials = self._values.setdefault(arrival.group, {})
        trials.setdefault(arrival.trial_id, {})[arrival.step] = arrival.value
        means = [
            _mean_until(values, arrival.step) for trial_id, values in trials.items()
            if trial_id != arrival.trial_id and arrival.step in values
        ]
        if len(means) < FEWEST_OTHERS or arrival.protected:
            return None
        cutoff = median(means)
        keep = arrival.value >= cutoff
        reason = f"{'at or above' if keep else 'below'} the median"
        return Decision(arrival.step, arrival.value, cutoff, len(means) + 1, keep=keep, reason=reason)


def hyperband(rungs: Sequence[int], keep_one_in: int) -> Brackets:
    """HyperBand as published, each bracket in lockstep."""
    return _brackets(rungs, keep_one_in, LockstepHalving)


def async_hyperband(rungs: Sequence[int], keep_one_in: int) -> Brackets:
    """Brackets of ASHA that stops: what Ray Tune calls AsyncHyperBand with several brackets."""
    return _brackets(rungs, keep_one_in, SuccessiveHalving)


def _brackets(
    rungs: Sequence[int], keep_one_in: int, halving: type[LockstepHalving] | type[SuccessiveHalving]
) -> Brackets:
    starts = range(len(rungs) + 1)
    return Brackets(
        rungs=tuple(rungs), brackets=[halving(tuple(rungs[start:]), keep_one_in) for start in starts],
        shares=[_bracket_size(len(rungs) - start, len(rungs), keep_one_in) for start in starts],
    )


def _bracket_size(halvings: int, most: int, keep_one_in: int) -> int:
    """Configurations of a bracket with so many halvings; Algorithm 1, line 3, arXiv:1603.06560."""
    return math.ceil((most + 1) * keep_one_in**halvings / (halvings + 1))


def _spread(shares: Sequence[int]) -> list[int]:
    """0, 1, ... as often as their share, each as evenly spaced as possible."""
    cycle: list[int] = []
    for place in range(1, sum(shares) + 1):
        behind = [share * place / sum(shares) - cycle.count(index) for index, share in enumerate(shares)]
        cycle.append(behind.index(max(behind)))
    return cycle


def _mean_until(values: dict[int, float], step: int) -> float:
    known = [value for at, value in values.items() if at <= step]
    return sum(known) / len(known)

"""When a trial is stopped: asynchronous successive halving and its two plain relatives, as pure state.

A rule is told (trial, step, value) in the order of arrival and answers with a Decision or None. No
Ray here, so decisions can be replayed from a ledger. Source: Li et al., "A system for massively
parallel hyperparameter tuning", arXiv:1810.05934, in the stopping form that Ray Tune uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from prefopt_ray.results.ledger import Decision


@dataclass(frozen=True)
class Arrival:
    """A configuration at an evaluation. `value` is its best (mean) gain so far; higher is better and it is finite."""

    trial_id: str  # of its first seed
    number: int  # of the configuration, 0 = the baseline
    group: str  # configurations are compared within a group: the loss, or the whole sweep
    step: int
    value: float
    protected: bool  # the baseline is recorded and never stopped


class StopRule(Protocol):
    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps where a value decides: there, the seeds of a configuration wait for each other."""
        ...

    def decide(self, arrival: Arrival) -> Decision | None:
        """A decision if the step is a rung, otherwise None."""
        ...

    def replay(self, arrival: Arrival) -> None:
        """Take part in the rungs again, as the ledger tells, without deciding."""
        ...


@dataclass
class NoStops:
    """Every trial runs to its end."""

    rungs: tuple[int, ...] = ()

    def decide(self, arrival: Arrival) -> Decision | None:
        return None

    def replay(self, arrival: Arrival) -> None:
        return None


@dataclass
class FixedStops:
    """Given stop steps, for comparisons: configuration number -> step."""

    steps: Mapping[int, int]
    rungs: tuple[int, ...] = ()  # no value decides

    def decide(self, arrival: Arrival) -> Decision | None:
        stop = self.steps.get(arrival.number)
        if stop is None or arrival.step < stop:
            return None
        return Decision(arrival.step, arrival.value, None, 1, keep=False, reason=f"given stop step {stop}")

    def replay(self, arrival: Arrival) -> None:
        return None


@dataclass
class SuccessiveHalving:
    """Keep about one in `keep_one_in` at every rung, compared with those that were there before.

    The cutoff is the (1 - 1/keep_one_in) quantile of the values recorded earlier at the rung (linear
    interpolation, as Ray Tune computes it); a value below it is stopped. The first arrival passes
    unopposed and is marked so.
    """

    rungs: tuple[int, ...]
    keep_one_in: float
    _recorded: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def decide(self, arrival: Arrival) -> Decision | None:
        if arrival.step not in self.rungs:
            return None
        earlier = self._others(arrival)
        self.replay(arrival)
        recorded = len(earlier) + 1
        if not earlier:
            return Decision(arrival.step, arrival.value, None, recorded, keep=True, reason="first at the rung, unopposed")
        cutoff = float(np.quantile(earlier, 1.0 - 1.0 / self.keep_one_in))
        if arrival.protected:
            return Decision(arrival.step, arrival.value, cutoff, recorded, keep=True, reason="baseline, never stopped")
        keep = arrival.value >= cutoff
        relation = "at or above" if keep else "below"
        return Decision(arrival.step, arrival.value, cutoff, recorded, keep=keep, reason=f"{relation} the cutoff")

    def replay(self, arrival: Arrival) -> None:
        if arrival.step in self.rungs:
            self._recorded.setdefault((arrival.group, arrival.step), {})[arrival.trial_id] = arrival.value

    def _others(self, arrival: Arrival) -> list[float]:
        rung = self._recorded.get((arrival.group, arrival.step), {})
        return [value for trial_id, value in rung.items() if trial_id != arrival.trial_id]

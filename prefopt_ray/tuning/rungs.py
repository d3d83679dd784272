"""When a trial is stopped or paused: successive halving in three forms, and its plain relatives, as pure state.

A rule is told every evaluation in the order of arrival and answers keep, stop, pause or nothing; when a slot is free it
is asked who of the paused goes on. No Ray and no clock here: a sweep is resumed, and `replay` measures, by telling a
rule again. Source: Li et al., "A system for massively parallel hyperparameter tuning", arXiv:1810.05934.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from prefopt_ray.results.ledger import Decision
from prefopt_ray.spec.sections import SchedulerSpec


@dataclass(frozen=True)
class Arrival:
    """A configuration at an evaluation. `value` is its best (mean) gain so far; higher is better and it is finite."""

    trial_id: str  # of its first seed
    number: int  # of the configuration, 0 = the baseline
    group: str  # configurations are compared within a group: the loss, or the whole sweep
    step: int
    value: float
    protected: bool  # the baseline is recorded and never stopped


@dataclass(frozen=True)
class Resolved:
    """What became of a paused configuration: it goes on from the rung where it waits, or is stopped there."""

    trial_id: str
    decision: Decision


@dataclass
class StopRule:
    """Every trial runs to its end; other rules override what they need.

    `rungs` are the steps where a value decides: there, the seeds of a configuration wait for each other.
    """

    rungs: tuple[int, ...] = ()

    def decide(self, arrival: Arrival) -> Decision | None:
        """Keep, stop or pause; None where this step decides nothing. Never asked at a trial's last step."""
        return None

    def resolve(self) -> Resolved | None:
        """Who of the paused takes a free slot, or no longer waits for one; asked before anything new is started."""
        return None

    def exhausted(self) -> None:
        """Nothing runs and nothing new will start: no rung will get more values, unless somebody is promoted."""

    def replay(self, arrival: Arrival, decision: Decision) -> None:
        """Know again, on resume, what was decided. Configurations come in any order, each one's decisions in theirs."""


@dataclass
class FixedStops(StopRule):
    """Given stop steps, for comparisons: configuration number -> step. No value decides."""

    steps: Mapping[int, int] = field(default_factory=dict)

    def decide(self, arrival: Arrival) -> Decision | None:
        stop = self.steps.get(arrival.number)
        if stop is None or arrival.step < stop:
            return None
        return Decision(arrival.step, arrival.value, None, 1, keep=False, reason=f"given stop step {stop}")


@dataclass
class SuccessiveHalving(StopRule):
    """ASHA that stops. Keep about one in `keep_one_in` at every rung, compared with those that were there before.

    The cutoff is the (1 - 1/keep_one_in) quantile of the values recorded earlier at the rung (linear
    interpolation, as Ray Tune computes it); a value below it is stopped. The first arrival passes
    unopposed and is marked so.
    """

    keep_one_in: float = 3
    _recorded: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def decide(self, arrival: Arrival) -> Decision | None:
        if arrival.step not in self.rungs:
            return None
        earlier = self._others(arrival)
        self._record(arrival)
        recorded = len(earlier) + 1
        if not earlier:
            return Decision(arrival.step, arrival.value, None, recorded, keep=True, reason="first at the rung, unopposed")
        cutoff = float(np.quantile(earlier, 1.0 - 1.0 / self.keep_one_in))
        if arrival.protected:
            return Decision(arrival.step, arrival.value, cutoff, recorded, keep=True, reason="baseline, never stopped")
        keep = arrival.value >= cutoff
        relation = "at or above" if keep else "below"
        return Decision(arrival.step, arrival.value, cutoff, recorded, keep=keep, reason=f"{relation} the cutoff")

    def replay(self, arrival: Arrival, decision: Decision) -> None:
        self._record(arrival)

    def _record(self, arrival: Arrival) -> None:
        if arrival.step in self.rungs:
            self._recorded.setdefault((arrival.group, arrival.step), {})[arrival.trial_id] = arrival.value

    def _others(self, arrival: Arrival) -> list[float]:
        rung = self._recorded.get((arrival.group, arrival.step), {})
        return [value for trial_id, value in rung.items() if trial_id != arrival.trial_id]


@dataclass
class PromotionHalving(StopRule):
    """ASHA as published (Algorithm 2): whoever is not among the best 1 in `keep_one_in` of a rung pauses there.

    It goes on once later arrivals make it one of them: nobody passes for having come early, or is lost for having come
    at a bad time. Published ASHA leaves a rung of fewer than `keep_one_in` for ever; here, when nothing else is left to
    do, the best of it goes on.
    """

    keep_one_in: float = 3
    _rungs: dict["_Key", "_Rung"] = field(default_factory=dict)
    _final: set["_Key"] = field(default_factory=set)  # no other value can come, so at least one goes on
    _over: bool = False  # nobody else will go on anywhere

    def decide(self, arrival: Arrival) -> Decision | None:
        if arrival.step not in self.rungs:
            return None
        key = (arrival.group, arrival.step)
        rung = self._rungs.setdefault(key, _Rung())
        rung.values[arrival.trial_id] = arrival.value
        places = self._places(key)
        if arrival.protected or arrival.trial_id in rung.best(places):
            rung.gone.add(arrival.trial_id)
            reason = "baseline, never paused" if arrival.protected else "at or above the cutoff"
            return rung.decision(arrival.trial_id, arrival.step, places=places, reason=reason, keep=True)
        reason = "paused, behind the cutoff" if places else "paused, no place yet"
        waits = rung.decision(arrival.trial_id, arrival.step, places=places, reason=reason, keep=False)
        return replace(waits, pause=True)

    def resolve(self) -> Resolved | None:
        for key in sorted(self._rungs, key=lambda key: (-key[1], key[0])):  # the highest rung first
            rung, places = self._rungs[key], self._places(key)
            for trial_id in rung.waiting(places):
                rung.gone.add(trial_id)
                alone = len(rung.values) == 1
                reason = "alone at the rung, unopposed" if alone else "called back, at or above the cutoff"
                return Resolved(trial_id, rung.decision(trial_id, key[1], places=places, reason=reason, keep=True))
        return self._stopped() if self._over else None

    def exhausted(self) -> None:
        best_waits = {key for key, rung in self._rungs.items() if rung.waiting(1)}
        self._final |= best_waits
        self._over = not best_waits

    def replay(self, arrival: Arrival, decision: Decision) -> None:
        rung = self._rungs.setdefault((arrival.group, arrival.step), _Rung())
        rung.values[arrival.trial_id] = arrival.value
        if not decision.pause:
            rung.gone.add(arrival.trial_id)

    def _stopped(self) -> Resolved | None:
        """Of those whose search is over, the next one."""
        for key, rung in self._rungs.items():
            for trial_id in rung.waiting(len(rung.values)):
                rung.gone.add(trial_id)
                places = max(1, self._places(key))
                stopped = rung.decision(trial_id, key[1], places=places, reason="behind the cutoff", keep=False)
                return Resolved(trial_id, stopped)
        return None

    def _places(self, key: "_Key") -> int:
        """How many of a rung go on, as far as is known now."""
        share = int(len(self._rungs[key].values) // self.keep_one_in)
        return max(1, share) if key in self._final else share


@dataclass
class LockstepHalving(PromotionHalving):
    """Synchronous successive halving: everybody pauses at a rung until no other value can come to it; then the best
    1 in `keep_one_in` go on, at least one.
    """

    def exhausted(self) -> None:
        while not any(rung.waiting(self._places(key)) for key, rung in self._rungs.items()):
            opened = self._lowest_closed()
            self._final |= opened
            if not opened:
                self._over = True
                return

    def replay(self, arrival: Arrival, decision: Decision) -> None:
        super().replay(arrival, decision)
        if decision.keep and not arrival.protected:
            self._final.add((arrival.group, arrival.step))

    def _lowest_closed(self) -> set["_Key"]:
        """Of each group, the first rung where somebody still waits for others. (The baseline is ahead of them.)"""
        lowest: dict[str, _Key] = {}
        for key, rung in sorted(self._rungs.items()):
            if key not in self._final and rung.waiting(len(rung.values)):
                lowest.setdefault(key[0], key)
        return set(lowest.values())

    def _places(self, key: "_Key") -> int:
        return super()._places(key) if key in self._final else 0


def rule_of(scheduler: SchedulerSpec, rungs: Sequence[int]) -> StopRule:
    """The spec's rule, deciding at these steps."""
    if scheduler.kind == "asha":
        return SuccessiveHalving(tuple(rungs), scheduler.factor)
    if scheduler.kind == "asha_promotion":
        return PromotionHalving(tuple(rungs), scheduler.factor)
    if scheduler.kind == "lockstep":
        return LockstepHalving(tuple(rungs), scheduler.factor)
    if scheduler.kind == "fixed":
        return FixedStops(steps=scheduler.stop_steps or {})
    return StopRule()


_Key = tuple[str, int]  # group, step


@dataclass
class _Rung:
    """Who has come to a rung, and who of them no longer waits there."""

    values: dict[str, float] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def best(self, places: int) -> list[str]:
        """The first `places`, best first; equal values in the order of their ids, which a resume does not change."""
        return sorted(self.values, key=lambda trial_id: (-self.values[trial_id], trial_id))[:places]

    def waiting(self, places: int) -> list[str]:
        """Who of the best `places` still waits, best first."""
        return [trial_id for trial_id in self.best(places) if trial_id not in self.gone]

    def decision(self, trial_id: str, step: int, *, places: int, reason: str, keep: bool) -> Decision:
        """The cutoff is the last place's value; None where there are no places yet, or nobody else."""
        cutoff = self.values[self.best(places)[-1]] if places and len(self.values) > 1 else None
        return Decision(step, self.values[trial_id], cutoff, len(self.values), keep=keep, reason=reason)

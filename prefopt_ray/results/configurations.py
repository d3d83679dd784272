"""Trials that differ in their seed alone, as one configuration: one gain per step, one stop step, one score.

A configuration is ranked, stopped and reported by the mean over its seeds. It stops at one step for all of them,
since that step is part of the answer: the one with the best mean gain among those that every seed has reached.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from prefopt_ray.results.ledger import CONFIRM, SEARCH, Decision, SweepRecord, TrialRecord
from prefopt_ray.trial import EndState, TrialConfig

INVALID = -1.0  # the score of a configuration without a step that counts
# The machine's fault or the estimate of its memory, not the configuration's: such a seed is left out of the mean. A
# seed that diverged is not left out; it says how often this configuration does.
_LEFT_OUT = (EndState.FAILED, EndState.OUT_OF_MEMORY, EndState.STOPPED_BY_USER)


@dataclass(frozen=True)
class Configuration:
    """The trials of one configuration in the order of their creation: at least one, all with the same role."""

    trials: tuple[TrialRecord, ...]

    @property
    def first(self) -> TrialRecord:
        """The trial that stands for it: it gave the configuration its id."""
        return self.trials[0]

    @property
    def key(self) -> str:
        return self.first.configuration

    @property
    def trial_id(self) -> str:
        """Of the first trial: what tables call it by."""
        return self.first.trial_id

    @property
    def baseline(self) -> bool:
        return self.first.baseline

    @property
    def config(self) -> TrialConfig:
        """Of the first seed."""
        return self.first.config

    @property
    def seeds(self) -> tuple[TrialRecord, ...]:
        """The trials that the mean is over: all but those left out, unless nothing else is there."""
        return tuple(t for t in self.trials if t.end_state not in _LEFT_OUT) or self.trials

    @property
    def gains(self) -> dict[int, float]:
        """Mean gain by step, where every seed was validly evaluated; a confirmation counts at its length only."""
        curves = [_gains(trial) for trial in self.seeds]
        shared = set(curves[0]).intersection(*curves[1:])
        if self.first.role == CONFIRM:
            shared &= {self.config.training.stop_step}
        return {step: sum(curve[step] for curve in curves) / len(curves) for step in sorted(shared)}

    @property
    def score(self) -> float:
        """The best mean gain; -1 when no step counts."""
        return max(self.gains.values(), default=INVALID)

    @property
    def best_step(self) -> int:
        """Where it stops: the earliest step with the best mean gain; -1 when no step counts."""
        gains = self.gains
        return max(gains, key=lambda step: gains[step], default=-1)

    def score_until(self, step: int) -> float:
        """Its score as known at `step`."""
        return max((gain for at, gain in self.gains.items() if at <= step), default=INVALID)

    def gains_until(self, step: int) -> dict[str, float]:
        """What `score_until(step)` is the mean of: each seed's gain at the step it is taken at."""
        known = {at: gain for at, gain in self.gains.items() if at <= step}
        if not known:
            return {}
        best = max(known, key=lambda at: known[at])
        return {trial.trial_id: trial.reports[best].objective for trial in self.seeds}

    @property
    def decisions(self) -> list[Decision]:
        return self.first.decisions

    def decision(self, step: int) -> Decision | None:
        """What was decided about it at a rung, for all its seeds; the latest, where it was paused and called back."""
        return next((d for d in reversed(self.decisions) if d.rung == step), None)

    @property
    def live(self) -> tuple[TrialRecord, ...]:
        return tuple(t for t in self.trials if t.end_state is None)


def configurations(sweep: SweepRecord, *, role: str = SEARCH) -> list[Configuration]:
    """In the order of their first trials."""
    return group(trial for trial in list(sweep.trials.values()) if trial.role == role)


def configuration_of(sweep: SweepRecord, trial: TrialRecord) -> Configuration:
    """The trial's own configuration, with the trials of its role."""
    trials = (t for t in list(sweep.trials.values()) if t.role == trial.role)
    return Configuration(tuple(t for t in trials if t.configuration == trial.configuration))


def group(trials: Iterable[TrialRecord]) -> list[Configuration]:
    """Trials by their configuration."""
    found: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        found.setdefault(trial.configuration, []).append(trial)
    return [Configuration(tuple(members)) for members in found.values()]


def _gains(trial: TrialRecord) -> dict[int, float]:
    """Gain by step, of valid evaluations after a training step."""
    reports = list(trial.reports.items())  # a copy: the driver's thread may be adding one
    return {step: report.objective for step, report in reports if step > 0 and report.objective >= 0}

"""Verdicts: what went right or wrong in a trial, from its stored history alone.

Nine rules. All that fire are flags, the first in the order below is the headline; a trial that neither fails nor
shows learning is `inconclusive`. Linear in the history, so it can be asked again at every evaluation, and with other
thresholds years later. Knows neither models nor what is done about a verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from prefopt_ray.measures.verdicts import rules
from prefopt_ray.measures.verdicts.diverged import diverged
from prefopt_ray.measures.verdicts.history import (
    ChosenRecord,
    EvaluationRecord,
    SampleRecord,
    Scores,
    StepRecord,
    TrialHistory,
)
from prefopt_ray.measures.verdicts.reading import Check, Reading
from prefopt_ray.measures.verdicts.rules import drift_exceeded
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.trial import Verdict

__all__ = [
    "ChosenRecord", "Check", "EvaluationRecord", "Reading", "SampleRecord", "Scores", "StepRecord", "Thresholds",
    "TrialHistory", "conclude", "drift_exceeded", "judge", "read_rules",
]

_Rule = Callable[[TrialHistory, Thresholds], Reading]

# In order of precedence.
_FAILURES: tuple[_Rule, ...] = (
    diverged,
    rules.broken,
    rules.memorised,
    rules.overfit,
    rules.over_optimised,
    rules.collapsed_rejected,
    rules.likelihood_displaced,
    rules.underfit,
)
# Flags that never make a headline: a healthy trial may have them.
_REMARKS: tuple[_Rule, ...] = (rules.mild_overfit, rules.overconfident, rules.mild_displacement, rules.drift_limit)


def judge(history: TrialHistory, thresholds: Thresholds = Thresholds()) -> Verdict:
    """The verdict on a history: the failure of highest precedence, else healthy or inconclusive.

    `flags` holds every rule that fired; `onset_step` and `evidence` are the headline's.
    Raises ValueError when two evaluations cover different numbers of pairs.
    """
    return conclude(read_rules(history, thresholds), history, thresholds)


def read_rules(history: TrialHistory, thresholds: Thresholds = Thresholds()) -> tuple[Reading, ...]:
    """Every rule with the numbers behind it: failures by precedence, healthy, then the remarks.

    Raises ValueError as `judge` does.
    """
    failures = tuple(rule(history, thresholds) for rule in _FAILURES)
    healthy = rules.learned(history, thresholds)
    if any(failure.fired for failure in failures):
        healthy = replace(healthy, fired=False)
    return (*failures, healthy, *(rule(history, thresholds) for rule in _REMARKS))


def conclude(readings: Sequence[Reading], history: TrialHistory, thresholds: Thresholds) -> Verdict:
    """Headline, flags, onset and evidence of `read_rules`."""
    failures, healthy, remarks = readings[: len(_FAILURES)], readings[len(_FAILURES)], readings[len(_FAILURES) + 1 :]
    flags = tuple(found.rule for found in (*failures, *remarks) if found.fired)
    first = next((failure for failure in failures if failure.fired), None)
    if first is not None:
        return Verdict(first.rule, flags, first.onset_step, first.evidence)
    if healthy.fired:
        return Verdict("healthy", flags, evidence=healthy.evidence)
    return Verdict("inconclusive", flags, evidence=_why_nothing_is_known(history, thresholds))


def _why_nothing_is_known(history: TrialHistory, thresholds: Thresholds) -> str:
    if not history.trained:
        return "not evaluated after an optimizer step yet"
    last = history.trained[-1]
    numbers = f"gain {last.gain.gain:.4f} with standard error {last.gain.se:.4f} at step {last.step}"
    return f"no evidence of learning yet: {numbers}, not over {thresholds.learned_z:g} of them"

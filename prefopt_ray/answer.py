"""The answer of a sweep: the best configuration, where it stops, how sure that is, and what is as good.

Computed from the ledger and the stored per-pair files alone, so anyone can recompute it. Trials are
ranked on the select part; the winner's number is quoted from the test part, on which nobody selected.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefopt_ray.ledger import SweepRecord, TrialRecord, drift_per_token
from prefopt_ray.losses.cards import find_card
from prefopt_ray.measures.compare import (
    Difference, GainInterval, gain_difference, gain_interval, indistinguishable,
)
from prefopt_ray.measures.metrics import margins
from prefopt_ray.train.evaluations import EvaluationLog

EVALUATIONS_FILE, TEST_FILE = "evaluations.safetensors", "test.safetensors"
MAX_FINALISTS = 16  # trials scored on the test part, baseline not counted
# Two looks, at select to find the finalists and at test: 2.5 % each keeps the whole within 5 %.
LOOK_CONFIDENCE = 0.975
# A difference of (z(.975) + z(.8)) standard errors is seen four times in five.
RESOLVED_ERRORS = 2.8


@dataclass(frozen=True)
class Standing:
    """One trial in the order of the answer."""

    rank: int  # from 1
    trial: TrialRecord
    drift: float  # mean |log-ratio| per token at the best step, select part, nats; inf when never evaluated


@dataclass(frozen=True)
class Alike:
    """A configuration that is not shown to be worse than the winner: gain(winner) - gain(it), bits per pair."""

    trial: TrialRecord
    difference: Difference
    part: str  # test, or select where it was not scored on test

    @property
    def better(self) -> bool:
        """It did better than the winner on pairs that did not choose the winner."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Answer:
    """None of the optional fields is there before the finalists are scored on the test part."""

    standings: tuple[Standing, ...]
    winner: TrialRecord | None  # None: no trial has a valid score
    baseline: TrialRecord | None
    test_gain: GainInterval | None = None
    baseline_gain: GainInterval | None = None
    over_baseline: Difference | None = None  # winner - baseline on test; None when the winner is the baseline
    alike: tuple[Alike, ...] = ()
    resolvable: float | None = None  # a difference these pairs would show four times in five, bits per pair
    warnings: tuple[str, ...] = ()

    @property
    def beats_baseline(self) -> bool:
        return self.over_baseline is not None and self.over_baseline.low > 0


def find_answer(sweep: SweepRecord) -> Answer:
    """The answer as far as the sweep has come."""
    standings = ranking(sweep)
    winner = next((s.trial for s in standings if s.trial.score >= 0), None)
    if winner is None:
        return Answer(standings, None, sweep.baseline)
    warnings = _warnings(sweep, standings, winner)
    if winner.trial_id not in sweep.tested:
        return Answer(standings, winner, sweep.baseline, warnings=warnings)
    return _tested_answer(sweep, winner, standings=standings, warnings=warnings)


def _tested_answer(
    sweep: SweepRecord, winner: TrialRecord, *, standings: tuple[Standing, ...], warnings: tuple[str, ...]
) -> Answer:
    """The answer with what the test part says. The baseline is one comparison, planned beforehand; the others share
    the risk of being many."""
    won, groups = _margins(sweep, winner, "test")
    baseline, baseline_gain, over = sweep.baseline, None, None
    if baseline is not None and baseline.trial_id in sweep.tested:
        lost, _ = _margins(sweep, baseline, "test")
        baseline_gain = gain_interval(lost, groups)
        over = gain_difference(won, lost, groups) if baseline is not winner else None
    others = [s.trial for s in standings if s.trial.score >= 0 and s.trial not in (winner, baseline)]
    alike = _alike(sweep, winner, others)
    if over is not None and not over.low > 0:
        alike = (Alike(baseline, over, "test"), *alike)
    errors = [d.se for d in _test_differences(sweep, winner, others) if np.isfinite(d.se)]
    return Answer(
        standings, winner, baseline, test_gain=gain_interval(won, groups), baseline_gain=baseline_gain,
        over_baseline=over, alike=alike, resolvable=RESOLVED_ERRORS * float(np.median(errors)) if errors else None,
        warnings=warnings,
    )


def ranking(sweep: SweepRecord) -> tuple[Standing, ...]:
    """By score, then lower drift at the best step, then trial id."""
    order = sorted(sweep.trials.values(), key=lambda t: (-t.score, _drift(t), t.trial_id))
    return tuple(Standing(rank, trial, _drift(trial)) for rank, trial in enumerate(order, start=1))


def finalists(sweep: SweepRecord) -> list[TrialRecord]:
    """Whom to score on the test part: the winner, those the select part cannot tell from it, and the baseline."""
    valid = [s.trial for s in ranking(sweep) if s.trial.score >= 0]
    if not valid:
        return []
    alike = _indistinguishable(sweep, valid[0], valid[1:], part="select")
    chosen = [valid[0], *(t for t in valid[1:] if t.trial_id in alike)][:MAX_FINALISTS]
    baseline = sweep.baseline
    if baseline in valid and baseline not in chosen:
        chosen.append(baseline)
    return chosen


def trial_folder(sweep: SweepRecord, trial: TrialRecord) -> Path:
    return sweep.folder / "trials" / trial.trial_id


def _alike(sweep: SweepRecord, winner: TrialRecord, others: list[TrialRecord]) -> tuple[Alike, ...]:
    tested = [t for t in others if t.trial_id in sweep.tested]
    found = {name: (d, "test") for name, d in _indistinguishable(sweep, winner, tested, part="test").items()}
    untested = [t for t in others if t.trial_id not in sweep.tested]
    on_select = _indistinguishable(sweep, winner, untested, part="select")
    found |= {name: (difference, "select") for name, difference in on_select.items()}
    return tuple(Alike(t, *found[t.trial_id]) for t in others if t.trial_id in found)


def _indistinguishable(
    sweep: SweepRecord, winner: TrialRecord, others: list[TrialRecord], *, part: str
) -> dict[str, Difference]:
    won, groups = _margins(sweep, winner, part)
    margins_of = {t.trial_id: _margins(sweep, t, part)[0] for t in others}
    return indistinguishable(won, margins_of, groups, confidence=LOOK_CONFIDENCE)


def _test_differences(sweep: SweepRecord, winner: TrialRecord, others: list[TrialRecord]) -> list[Difference]:
    won, groups = _margins(sweep, winner, "test")
    tested = [trial for trial in others if trial.trial_id in sweep.tested]
    return [gain_difference(won, _margins(sweep, trial, "test")[0], groups) for trial in tested]


def _margins(sweep: SweepRecord, trial: TrialRecord, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) implicit margins at the trial's best step, and the groups that cluster their errors."""
    file = TEST_FILE if part == "test" else EVALUATIONS_FILE
    stored = EvaluationLog.load(trial_folder(sweep, trial) / file)
    step = sweep.tested[trial.trial_id] if part == "test" else trial.best_step
    return margins(stored.stats(part, step), find_card(trial.config.loss)), stored.groups(part)


def _drift(trial: TrialRecord) -> float:
    best = trial.reports.get(trial.best_step)
    return float("inf") if best is None else drift_per_token(best.metrics)


def _warnings(sweep: SweepRecord, standings: tuple[Standing, ...], winner: TrialRecord) -> tuple[str, ...]:
    out = []
    valid = [s.trial for s in standings if s.trial.score >= 0]
    for key, name in (("eval/gain_sum", "summed log-ratios"), ("eval/gain_per_token", "per-token log-ratios")):
        best = max(valid, key=lambda t: t.reports[t.best_step].metrics[key])
        if best is not winner and best.config.loss != winner.config.loss:
            out.append(f"judged by {name}, trial {best.trial_id} ({best.config.label}) would be first")
    if "drift_limit" in winner.last.verdict_at_best.flags:
        out.append("the best trial is beyond the drift limit at its best step; look at its samples before using it")
    for trial_id, reason in sweep.untested.items():
        out.append(f"trial {trial_id} could not be scored on test: {reason}")
    if winner.unopposed:
        out.append("the best trial passed a rung before any other trial was there")
    return tuple(out)

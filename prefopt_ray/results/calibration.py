"""How well gain, accuracy and drift rank a person's own trials: their rank correlation with a judge or the gold reward.

From stored reports and the sweep's `judge/` folder alone, of searched trials: a confirmed run is of a configuration
that is here already. Over several steps, trials are ranked within each step: that later steps are better is true of
most measures and says nothing about trials. Intervals are bootstrapped over trials, since evaluations of one trial are
no independent evidence. Knows no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.results.judgement import Judgement, stored_judgements
from prefopt_ray.results.ledger import SEARCH, SweepRecord, TrialRecord, drift_per_token

RESAMPLES = 1000
# Two unrelated measures correlate above .58 one time in twenty with 12 trials, and above .8 with 6.
FEW_TRIALS = 12
FEWEST_TRIALS = 4  # below it a rank correlation is hardly a number
MEASURES = ("gain", "accuracy", "less drift")
_TRUTHS = {"gold/reward": "the gold reward", "judge/win_rate": "the judge at rungs"}


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho and what it is of; its 95 % interval is None with fewer than FEW_TRIALS trials."""

    rho: float
    low: float | None
    high: float | None
    trials: int
    evaluations: int


@dataclass(frozen=True)
class CalibrationRow:
    """One measure against the truth; None where too few points or no differences are known."""

    measure: str
    at_best: Correlation | None  # one point per trial, at its best step
    within_steps: Correlation | None  # every evaluation after step 0 where the truth was measured, step by step


@dataclass(frozen=True)
class Calibration:
    """One truth, and how the measures follow it over the sweep's trials."""

    truth: str
    trials: int
    rows: tuple[CalibrationRow, ...]
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Points:
    """Per point: its trial's number, the measures (N, 3) in the order of MEASURES, the truth (N,).

    Points are ranked among those of the same `groups` (N,).
    """

    trials: np.ndarray
    groups: np.ndarray
    measures: np.ndarray
    truth: np.ndarray


def calibrate_sweep(sweep: SweepRecord, *, seed: int = 0) -> tuple[Calibration, ...]:
    """One calibration per truth that the sweep holds of searched trials. Raises SweepError when it holds none."""
    found = []
    for key, name in _TRUTHS.items():
        at_best, every = _reported(sweep, key, best_only=True), _reported(sweep, key, best_only=False)
        if len(every.truth):
            found.append(_calibration(name, at_best, every, seed=seed))
    for judgement in stored_judgements(sweep.folder):
        points = _judged(sweep, judgement)
        if len(points.truth):
            found.append(_calibration(f"the judge {judgement.judge}", points, None, seed=seed))
    if not found:
        raise SweepError(Problem(
            str(sweep.folder), "", "neither a judge's verdicts on searched trials nor gold rewards",
            "there is nothing to compare gain with",
            "run `prefopt judge SWEEP --top 16 --with reward_model=org/model` first",
        ))
    return tuple(found)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation of average ranks; NaN when one side has no differences."""
    ranks = [_average_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    a, b = (r - r.mean() for r in ranks)
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def _calibration(truth: str, at_best: _Points, every: _Points | None, *, seed: int) -> Calibration:
    rows = tuple(
        CalibrationRow(
            measure, _correlation(at_best, column, seed=seed),
            None if every is None else _correlation(every, column, seed=seed),
        ) for column, measure in enumerate(MEASURES)
    )
    trials = len(np.unique((every or at_best).trials))
    return Calibration(truth, trials, rows, _conclusion(rows, trials))


def _conclusion(rows: Sequence[CalibrationRow], trials: int) -> str:
    gain = rows[0].at_best or rows[0].within_steps  # evaluations of one trial say less about others
    if trials < FEW_TRIALS or (gain is not None and gain.low is None):
        return (f"{gain.trials if gain else trials} trials are too few to say: with less than {FEW_TRIALS}, unrelated "
                "measures often correlate above .58 by chance.")
    if gain is None:
        return "there are no differences between these trials to rank."
    if gain.low > 0:
        return "higher gain goes with it on these trials."
    if gain.high < 0:
        return ("higher gain goes against it on these trials: rank them by completions, "
                "`objective: {metric: judge}`.")
    return "gain is not shown to follow it on these trials."


def _reported(sweep: SweepRecord, key: str, *, best_only: bool) -> _Points:
    rows = []
    for trial in sweep.trials.values():
        if trial.role != SEARCH:
            continue
        for step, report in trial.reports.items():
            wanted = step == trial.best_step if best_only else step > 0
            if wanted and key in report.metrics and "eval/gain" in report.metrics:
                group = 0 if best_only else step
                rows.append((trial.number, group, _measures(report.metrics), report.metrics[key]))
    return _points(rows)


def _judged(sweep: SweepRecord, judgement: Judgement) -> _Points:
    """Searched finalists at the step that was judged, by their strength."""
    rows = []
    for row in judgement.tournament.competitors if judgement.tournament else ():
        trial: TrialRecord | None = sweep.trials.get(row.competitor)
        searched = trial is not None and trial.role == SEARCH
        report = trial.reports.get(judgement.finalist(row.competitor).step) if searched else None
        if report is not None and "eval/gain" in report.metrics:
            rows.append((trial.number, 0, _measures(report.metrics), row.strength))
    return _points(rows)


def _measures(metrics: Mapping[str, float]) -> tuple[float, float, float]:
    return metrics["eval/gain"], metrics["eval/rewards/accuracy"], -drift_per_token(metrics)


def _points(rows: Sequence[tuple[int, int, tuple[float, float, float], float]]) -> _Points:
    return _Points(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.float64).reshape(len(rows), len(MEASURES)),
        np.array([row[3] for row in rows], dtype=np.float64),
    )


def _correlation(points: _Points, column: int, *, seed: int) -> Correlation | None:
    """Spearman's rho within each group, averaged with the groups' numbers of trials as weights.

    Groups with fewer than FEWEST_TRIALS trials are left out, and those without differences; None when all are. The
    interval draws whole trials, with all their points.
    """
    groups, sizes = np.unique(points.groups, return_counts=True)  # a trial has one point in a group
    rows = np.flatnonzero(np.isin(points.groups, groups[sizes >= FEWEST_TRIALS]))
    rho = _mean_within_groups(points, column, rows)
    if np.isnan(rho):
        return None
    trials = np.unique(points.trials[rows])
    if len(trials) < FEW_TRIALS:
        return Correlation(rho, None, None, len(trials), len(rows))
    rng = np.random.default_rng([seed, column])
    members = [rows[points.trials[rows] == trial] for trial in trials]
    drawn = []
    for _ in range(RESAMPLES):
        again = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn.append(_mean_within_groups(points, column, again))
    low, high = np.nanquantile(drawn, [0.025, 0.975])  # a resample of one trial alone may have no differences
    return Correlation(rho, float(low), float(high), len(trials), len(rows))


def _mean_within_groups(points: _Points, column: int, rows: np.ndarray) -> float:
    """NaN when no group has differences on both sides."""
    total, weight = 0.0, 0
    for group in np.unique(points.groups[rows]):
        chosen = rows[points.groups[rows] == group]
        rho = spearman(points.measures[chosen, column], points.truth[chosen])
        if not np.isnan(rho):
            total, weight = total + len(chosen) * rho, weight + len(chosen)
    return total / weight if weight else float("nan")


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    ordered = np.sort(values)
    below, up_to = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (below + up_to - 1) / 2

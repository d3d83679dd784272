"""How well gain, accuracy and drift rank a person's own trials: their rank correlation with a judge or the gold reward.

From stored reports and the sweep's `judge/` folder alone. Intervals are bootstrapped over trials, since evaluations of
one trial are no independent evidence. Knows no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.judgement import Judgement, stored_judgements
from prefopt_ray.ledger import SEARCH, SweepRecord, TrialRecord, drift_per_token

RESAMPLES = 1000
# Two unrelated measures correlate above .58 one time in twenty with 12 trials, and above .8 with 6.
FEW_TRIALS = 12
FEWEST_TRIALS = 4  # below it a rank correlation is hardly a number
MEASURES = ("gain", "accuracy", "less drift")
_TRUTHS = {"gold/reward": "the gold reward", "judge/win_rate": "the judge at rungs"}


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho with a 95 % interval over `n` points."""

    rho: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class CalibrationRow:
    """One measure against the truth; None where too few points or no differences are known."""

    measure: str
    at_best: Correlation | None  # one point per trial, at its best step
    pooled: Correlation | None  # every evaluation after the first step where the truth was measured


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
    """Per point: its trial's number, the measures (N, 3) in the order of MEASURES, the truth (N,)."""

    trials: np.ndarray
    measures: np.ndarray
    truth: np.ndarray


def calibrate_sweep(sweep: SweepRecord, *, seed: int = 0) -> tuple[Calibration, ...]:
    """One calibration per truth that the sweep holds. Raises SweepError when it holds none."""
    found = []
    for key, name in _TRUTHS.items():
        at_best, pooled = _reported(sweep, key, best_only=True), _reported(sweep, key, best_only=False)
        if len(pooled.truth):
            found.append(_calibration(name, at_best, pooled, seed=seed))
    for judgement in stored_judgements(sweep.folder):
        if judgement.tournament is not None:
            points = _judged(sweep, judgement)
            found.append(_calibration(f"the judge {judgement.judge}", points, None, seed=seed))
    if not found:
        raise SweepError(Problem(
            str(sweep.folder), "", "neither a judge's verdicts nor gold rewards",
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


def _calibration(truth: str, at_best: _Points, pooled: _Points | None, *, seed: int) -> Calibration:
    rows = tuple(
        CalibrationRow(
            measure, _correlation(at_best, column, seed=seed),
            None if pooled is None else _correlation(pooled, column, seed=seed),
        ) for column, measure in enumerate(MEASURES)
    )
    trials = len(np.unique((pooled or at_best).trials))
    return Calibration(truth, trials, rows, _conclusion(rows, trials))


def _conclusion(rows: Sequence[CalibrationRow], trials: int) -> str:
    if trials < FEW_TRIALS:
        return (f"{trials} trials are too few to say: with less than {FEW_TRIALS}, unrelated measures often "
                "correlate above .58 by chance.")
    gain = rows[0].at_best or rows[0].pooled  # evaluations of one trial say less about others
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
                rows.append((trial.number, _measures(report.metrics), report.metrics[key]))
    return _points(rows)


def _judged(sweep: SweepRecord, judgement: Judgement) -> _Points:
    """Finalists at the step that was judged, by their strength."""
    rows = []
    for row in judgement.tournament.competitors:
        trial: TrialRecord | None = sweep.trials.get(row.competitor)
        report = trial.reports.get(judgement.finalist(row.competitor).step) if trial else None
        if report is not None and "eval/gain" in report.metrics:
            rows.append((trial.number, _measures(report.metrics), row.strength))
    return _points(rows)


def _measures(metrics: Mapping[str, float]) -> tuple[float, float, float]:
    return metrics["eval/gain"], metrics["eval/rewards/accuracy"], -drift_per_token(metrics)


def _points(rows: Sequence[tuple[int, tuple[float, float, float], float]]) -> _Points:
    return _Points(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.float64).reshape(len(rows), len(MEASURES)),
        np.array([row[2] for row in rows], dtype=np.float64),
    )


def _correlation(points: _Points, column: int, *, seed: int) -> Correlation | None:
    trials = np.unique(points.trials)
    rho = spearman(points.measures[:, column], points.truth) if len(trials) >= FEWEST_TRIALS else float("nan")
    if np.isnan(rho):
        return None
    rng = np.random.default_rng([seed, column])
    members = [np.flatnonzero(points.trials == trial) for trial in trials]
    drawn = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn.append(spearman(points.measures[rows, column], points.truth[rows]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])  # a resample of one trial alone may have no differences
    return Correlation(rho, float(low), float(high), len(points.truth))


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]

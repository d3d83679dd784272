"""Which number that needs no gold reward ranks trials as the gold reward does, and what picking by it would cost.

Ranks are compared within a seed, as within a sweep, and averaged over seeds. Intervals are percentiles of a bootstrap
over configurations. Knows nothing of verdicts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.gold_trials import RecordedTrial

from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.measures.metrics import margins

BUDGET_STEPS = {12: 40, 25: 80, 50: 160, 100: 320}  # percent of the budget -> optimizer step
KL_LIMIT = 0.5  # nats per token, the guard that was calibrated on this task
BOOTSTRAPS = 2000
OBJECTIVE = "gain (the default objective)"

Metrics = Mapping[str, float]
Score = Callable[[RecordedTrial, int], float]  # trial, step -> higher is better


def scores() -> dict[str, Score]:
    """Everything that could rank trials, higher first. The first row knows the truth."""
    return {
        "gold win rate (256 of the prompts)": _win_rate,
        "gain, KL per token <= .5": lambda t, s: _guarded(t, s, _metric(t, s, "eval/gain")),
        OBJECTIVE: lambda t, s: _metric(t, s, "eval/gain"),
        "gain, drift per token <= .5": _drift_guarded,
        "gain of summed log-ratios": lambda t, s: _metric(t, s, "eval/gain_sum"),
        "accuracy, KL per token <= .5": lambda t, s: _guarded(t, s, _metric(t, s, "eval/rewards/accuracy")),
        "accuracy": lambda t, s: _metric(t, s, "eval/rewards/accuracy"),
        "raw log sigma(beta h)": _own_likelihood,
        "-own eval loss": _own_loss,
        "rewards/margin": lambda t, s: _metric(t, s, "eval/rewards/margin"),
        "mean h": lambda t, s: _metric(t, s, "eval/h/mean"),
        "-KL": lambda t, s: -_metric(t, s, "samples/kl"),
        "-ECE": lambda t, s: -_metric(t, s, "eval/ece"),
        "train probe accuracy": lambda t, s: _metric(t, s, "probe/rewards/accuracy"),
    }


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its 95 % bootstrap interval, and of its lead over the default objective."""

    rho: float
    low: float
    high: float
    lead: float
    lead_low: float
    lead_high: float


def rank_table(trials: Sequence[RecordedTrial], *, step: int) -> dict[str, Correlation]:
    """Every score's correlation with the gold reward at one step, trials of each seed ranked among themselves."""
    by_seed = _by_seed(trials, step)
    truth = [np.array([t.gold[step].mean() for t in group]) for group in by_seed]
    values = {name: [np.array([f(t, step) for t in group]) for group in by_seed] for name, f in scores().items()}
    rng = np.random.default_rng(0)
    draws = [[rng.integers(len(group), size=len(group)) for group in by_seed] for _ in range(BOOTSTRAPS)]
    point = {name: _mean_rho(v, truth) for name, v in values.items()}
    booted = {name: np.array([_mean_rho(v, truth, draw) for draw in draws]) for name, v in values.items()}
    return {name: _correlation(point, booted, name) for name in values}


def regrets(trials: Sequence[RecordedTrial]) -> dict[str, float]:
    """Gold reward lost by taking the (trial, evaluation) that each score likes best, mean over seeds."""
    out = {}
    for name, score in scores().items():
        lost = []
        for group in _by_seed(trials, None):
            points = [(t, step) for t in group for step in sorted(t.gold) if step > 0]
            gold = np.array([t.gold[step].mean() for t, step in points])
            lost.append(gold.max() - gold[int(np.argmax([score(t, step) for t, step in points]))])
        out[name] = float(np.mean(lost))
    return out


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / norm if norm > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _mean_rho(values: list[np.ndarray], truth: list[np.ndarray], draw: list[np.ndarray] | None = None) -> float:
    draw = draw or [np.arange(len(v)) for v in values]
    return float(np.mean([spearman(v[d], t[d]) for v, t, d in zip(values, truth, draw, strict=True)]))


def _correlation(point: Mapping[str, float], booted: Mapping[str, np.ndarray], name: str) -> Correlation:
    low, high = np.percentile(booted[name], [2.5, 97.5])
    lead_low, lead_high = np.percentile(booted[name] - booted[OBJECTIVE], [2.5, 97.5])
    return Correlation(
        point[name], float(low), float(high), point[name] - point[OBJECTIVE], float(lead_low), float(lead_high)
    )


def _by_seed(trials: Sequence[RecordedTrial], step: int | None) -> list[list[RecordedTrial]]:
    """Trials by seed, those that were evaluated at the step."""
    seeds = sorted({t.seed for t in trials})
    there = [t for t in trials if step is None or step in t.gold]
    return [[t for t in there if t.seed == seed] for seed in seeds]


def _metric(trial: RecordedTrial, step: int, name: str) -> float:
    return next(report for report in trial.reports if report.step == step).metrics[name]


def _margin(trial: RecordedTrial, step: int) -> np.ndarray:
    return margins(trial.evaluations.stats("select", step), find_card(trial.config.loss))


def _win_rate(trial: RecordedTrial, step: int) -> float:
    """On half of the prompts, so that the row is not the truth itself."""
    mine, rival = trial.gold[step][::2], trial.reference_gold[::2]
    return float(((mine > rival) + 0.5 * (mine == rival)).mean())


def _guarded(trial: RecordedTrial, step: int, value: float) -> float:
    return value - float(_metric(trial, step, "samples/kl_per_token") > KL_LIMIT)


def _drift_guarded(trial: RecordedTrial, step: int) -> float:
    """Without samples: mean |log-ratio| per token over both sides of the select pairs."""
    stats = trial.evaluations.stats("select", step)
    sides = ((stats.drift_chosen / stats.chosen_tokens), (stats.drift_rejected / stats.rejected_tokens))
    drift = float(sum(side.abs().double().mean() for side in sides) / 2)
    return _metric(trial, step, "eval/gain") - float(drift > KL_LIMIT)


def _own_likelihood(trial: RecordedTrial, step: int) -> float:
    """Bradley-Terry's, at the trial's own beta."""
    return -float(np.logaddexp(0, -trial.config.loss_params["beta"] * _margin(trial, step)).mean())


def _own_loss(trial: RecordedTrial, step: int) -> float:
    formula = loss_function(trial.config.loss)
    loss, _ = formula(trial.evaluations.stats("select", step), trial.config.loss_params, None)
    return -float(loss.double().mean())

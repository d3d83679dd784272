"""Which number that needs no gold reward ranks trials as the gold reward does, and what picking by it would cost.

Ranks are compared within a seed, as within a sweep, and averaged over seeds. Intervals are percentiles of a bootstrap
over trials. Knows no file layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.gold_trials import RecordedTrial
from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.measures.metrics import margins
from prefopt_ray.measures.verdicts import diverged, rules
from prefopt_ray.thresholds import Thresholds

BUDGET_STEPS = {12: 40, 25: 80, 50: 160, 100: 320}  # percent of the budget -> optimizer step
KL_LIMIT = 0.5  # nats per token, the guard that was calibrated on this task
BOOTSTRAPS = 1000
OBJECTIVE = "gain, -1 if diverged or broken (the objective)"

Score = Callable[[RecordedTrial, int], float]  # trial, step -> higher is better


def scores() -> dict[str, Score]:
    """Everything that could rank trials, higher first. The first row knows the truth."""
    return {
        "gold win rate (half of the prompts)": _win_rate,
        "gain, -1 if KL per token > .5": lambda t, s: _guarded(t, s, _metric(t, s, "eval/gain")),
        OBJECTIVE: _objective,
        "gain": lambda t, s: _metric(t, s, "eval/gain"),
        "gain, -1 if drift per token > .5": _drift_guarded,
        "gain of summed log-ratios": lambda t, s: _metric(t, s, "eval/gain_sum"),
        "accuracy, -1 if KL per token > .5": lambda t, s: _guarded(t, s, _metric(t, s, "eval/rewards/accuracy")),
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
    """Spearman's rank correlation with its 95 % bootstrap interval, and of its lead over the objective."""

    rho: float
    low: float
    high: float
    lead: float
    lead_low: float
    lead_high: float


@dataclass(frozen=True, eq=False)
class Curves:
    """Every score and the gold reward of some trials, by evaluation after the first step. Computed once."""

    seeds: np.ndarray  # (N,)
    steps: tuple[int, ...]
    gold: np.ndarray  # (N, steps)
    scores: Mapping[str, np.ndarray]  # name -> (N, steps)


def read_curves(trials: Sequence[RecordedTrial]) -> Curves:
    """Of trials that were evaluated at the same steps; one that ended before its last evaluation is left out."""
    steps = tuple(step for step in max((t.gold for t in trials), key=len) if step > 0)
    whole = [trial for trial in trials if set(steps) <= set(trial.gold)]
    return Curves(
        np.array([trial.seed for trial in whole]), steps,
        np.array([[trial.gold[step].mean() for step in steps] for trial in whole]),
        {name: np.array([[score(t, step) for step in steps] for t in whole]) for name, score in scores().items()},
    )


def rank_table(curves: Curves, *, step: int) -> dict[str, Correlation]:
    """Each score with the gold reward, both at one step."""
    at = curves.steps.index(step)
    return _table(curves, {name: values[:, at] for name, values in curves.scores.items()}, curves.gold[:, at])


def best_so_far_table(curves: Curves, *, step: int) -> dict[str, Correlation]:
    """Each score's highest value up to a step, with the highest gold reward up to it: what a rung decides on."""
    until = curves.steps.index(step) + 1
    best = {name: values[:, :until].max(axis=1) for name, values in curves.scores.items()}
    return _table(curves, best, curves.gold[:, :until].max(axis=1))


def regrets(curves: Curves) -> dict[str, float]:
    """Gold reward lost by taking the (trial, evaluation) that each score likes best, mean over seeds."""
    lost: dict[str, float] = {}
    for name, values in curves.scores.items():
        by_seed = [(values[curves.seeds == seed], curves.gold[curves.seeds == seed]) for seed in set(curves.seeds)]
        lost[name] = float(np.mean([gold.max() - gold.flat[int(score.argmax())] for score, gold in by_seed]))
    return lost


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / norm if norm > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _table(curves: Curves, values: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, Correlation]:
    members = [np.flatnonzero(curves.seeds == seed) for seed in sorted(set(curves.seeds.tolist()))]
    rng = np.random.default_rng(0)
    draws = [[rng.choice(rows, size=len(rows)) for rows in members] for _ in range(BOOTSTRAPS)]
    point = {name: _mean_rho(score, truth, members) for name, score in values.items()}
    booted = {name: np.array([_mean_rho(score, truth, draw) for draw in draws]) for name, score in values.items()}
    return {name: _correlation(point, booted, name) for name in values}


def _mean_rho(score: np.ndarray, truth: np.ndarray, members: Sequence[np.ndarray]) -> float:
    return float(np.mean([spearman(score[rows], truth[rows]) for rows in members]))


def _correlation(point: Mapping[str, float], booted: Mapping[str, np.ndarray], name: str) -> Correlation:
    low, high = np.percentile(booted[name], [2.5, 97.5])
    lead_low, lead_high = np.percentile(booted[name] - booted[OBJECTIVE], [2.5, 97.5])
    return Correlation(
        point[name], float(low), float(high), point[name] - point[OBJECTIVE], float(lead_low), float(lead_high)
    )


def _metric(trial: RecordedTrial, step: int, name: str) -> float:
    return next(report for report in trial.reports if report.step == step).metrics[name]


def _margin(trial: RecordedTrial, step: int) -> np.ndarray:
    return margins(trial.evaluations.stats("select", step), find_card(trial.config.loss))


def _objective(trial: RecordedTrial, step: int) -> float:
    history, thresholds = trial.history.until(step), Thresholds()
    ruined = diverged(history, thresholds).fired or rules.broken(history, thresholds).fired
    return -1.0 if ruined else _metric(trial, step, "eval/gain")


def _win_rate(trial: RecordedTrial, step: int) -> float:
    """On half of the prompts, so that the row is not the truth itself."""
    mine, rival = trial.gold[step][::2], trial.reference_gold[::2]
    return float(((mine > rival) + 0.5 * (mine == rival)).mean())


def _guarded(trial: RecordedTrial, step: int, value: float) -> float:
    return -1.0 if _metric(trial, step, "samples/kl_per_token") > KL_LIMIT else value


def _drift_guarded(trial: RecordedTrial, step: int) -> float:
    """Without samples: mean |log-ratio| per token over both sides of the select pairs."""
    stats = trial.evaluations.stats("select", step)
    sides = ((stats.drift_chosen / stats.chosen_tokens), (stats.drift_rejected / stats.rejected_tokens))
    drift = float(sum(side.abs().double().mean() for side in sides) / 2)
    return -1.0 if drift > KL_LIMIT else _metric(trial, step, "eval/gain")


def _own_likelihood(trial: RecordedTrial, step: int) -> float:
    """Bradley-Terry's, at the trial's own beta."""
    return -float(np.logaddexp(0, -trial.config.loss_params["beta"] * _margin(trial, step)).mean())


def _own_loss(trial: RecordedTrial, step: int) -> float:
    formula = loss_function(trial.config.loss)
    loss, _ = formula(trial.evaluations.stats("select", step), trial.config.loss_params, None)
    return -float(loss.double().mean())

"""How far a sweep is, as one JSON document: queue, ends, best so far, rungs, hours paid, an estimate of the rest."""

from collections import Counter
from statistics import fmean
from typing import Any

from prefopt_ray.results.answer import ranking
from prefopt_ray.results.ledger import SEARCH, SweepRecord, TrialRecord


def sweep_summary(sweep: SweepRecord, *, expected: int | None = None) -> dict[str, Any]:
    """From the ledger alone. `expected` trials in all, where the spec is at hand; hours are of trials, on a GPU each
    counted by what it reserved."""
    trials = list(sweep.trials.values())
    best = next((standing.configuration.first for standing in ranking(sweep)), None)
    hours = sum(_hours(trial) for trial in trials)
    return {
        "sweep": sweep.sweep_id, "name": sweep.name, "folder": str(sweep.folder), "finished": sweep.finished,
        "expected": expected, "begun": len(trials), "states": dict(Counter(trial.state for trial in trials)),
        "best": _best(best) if best is not None and best.score >= 0 else None,
        "rungs": _rungs(trials), "trial_hours": round(hours, 4),
        "gpu_hours": round(sum(_hours(t) * t.placement.get("gpus", 1.0) for t in trials if _on_gpu(t)), 4),
        "rest": _rest(trials, expected),
    }


def _best(trial: TrialRecord) -> dict[str, Any]:
    return {
        "trial": trial.trial_id, "configuration": trial.config.label, "objective": trial.config.evaluation.objective_name,
        "value": trial.score, "step": trial.best_step,
    }


def _rungs(trials: list[TrialRecord]) -> dict[str, dict[str, int]]:
    """By step: who was decided there, and how many of them went on."""
    decisions = [decision for trial in trials if trial.role == SEARCH for decision in trial.decisions]
    return {
        str(rung): {
            "decided": sum(d.rung == rung for d in decisions),
            "went_on": sum(d.rung == rung and d.keep for d in decisions),
        }
        for rung in sorted({decision.rung for decision in decisions})
    }


def _rest(trials: list[TrialRecord], expected: int | None) -> dict[str, Any] | None:
    """About how long the trials that have not ended will take, by the mean of those that have; None before one has."""
    ended = [trial for trial in trials if trial.end_state is not None]
    if expected is None or not ended:
        return None
    running = [trial for trial in trials if trial.state == "running"]
    left = max(0, expected - len(ended))
    each = fmean(_hours(trial) for trial in ended)
    hours = max(0.0, left * each - sum(min(each, _hours(trial)) for trial in running))
    return {"trials": left, "trial_hours": round(hours, 4), "hours": round(hours / max(1, len(running)), 4)}


def _hours(trial: TrialRecord) -> float:
    return trial.last.seconds / 3600 if trial.last else 0.0


def _on_gpu(trial: TrialRecord) -> bool:
    return trial.placement.get("device") == "cuda"

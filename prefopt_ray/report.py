"""Stored results as words and tables: the answer in sentences, the leaderboard, one trial's row.

Every place that shows a trial (terminal, MLflow, JSON) shows the fields made here.
"""

import math
from collections.abc import Mapping
from typing import Any

from prefopt_ray.answer import Alike, Answer, Standing
from prefopt_ray.ledger import SweepRecord, TrialRecord
from prefopt_ray.measures.compare import Difference, GainInterval
from prefopt_ray.trial import Report

OVER_OPTIMISED_BY = 0.5  # gold reward; the standard error of a mean over 128 samples is about .12


def answer_lines(sweep: SweepRecord, answer: Answer) -> list[str]:
    """The answer in plain words; the first line stands alone."""
    if answer.winner is None:
        return [f"No configuration has a valid score ({sweep.state_counts}).", *_reasons(sweep)]
    lines = [_headline(answer)]
    if answer.test_gain is None:
        lines.append(f"Its gain on the select part is {answer.winner.score:.4f} bits per pair; "
                     "not scored on test yet, so this is optimistic and the order may change.")
    else:
        lines += _test_lines(answer)
    lines += _gold_lines(answer)
    lines += [f"Note: {warning}." for warning in answer.warnings]
    merged = sweep.facts.get("merged_adapters")
    if merged:
        lines.append(f"Note: its adapter belongs on {sweep.facts['model']} with {', '.join(merged)} merged into it first.")
    lines.append(f"Trials: {sweep.state_counts}.")
    return lines


def leaderboard(answer: Answer) -> list[dict[str, str | float | int | None]]:
    """One flat row per trial in the order of the answer."""
    return [_row(standing) for standing in answer.standings]


def answer_json(sweep: SweepRecord, answer: Answer) -> dict[str, Any]:
    """The answer as one JSON document."""
    winner = answer.winner
    return {
        "sweep": sweep.sweep_id,
        "name": sweep.name,
        "folder": str(sweep.folder),
        "finished": sweep.finished,
        "best": None if winner is None else {
            **_row(next(s for s in answer.standings if s.trial is winner)),
            "total_steps": winner.config.training.total_steps,
            "test_gain": _numbers(answer.test_gain),
            "baseline_test_gain": _numbers(answer.baseline_gain),
            "minus_baseline": _numbers(answer.over_baseline),
            "beats_baseline": answer.beats_baseline,
            "training_seeds": 1,
        },
        "cannot_be_told_apart": [
            {"trial": a.trial.trial_id, "configuration": a.trial.config.label, "stop_step": a.trial.best_step,
             "best_minus_this": _numbers(a.difference), "part": a.part}
            for a in answer.alike if not a.better
        ],
        "better_on_test": [a.trial.trial_id for a in answer.alike if a.better],
        "resolvable_difference": answer.resolvable,
        "warnings": list(answer.warnings),
        "trials": leaderboard(answer),
    }


def report_line(report: Report) -> str:
    """One evaluation as one line."""
    metrics = report.metrics
    gold = f"  gold {metrics['gold/reward']:.2f}" if "gold/reward" in metrics else ""
    measured = (
        f"gain {report.objective:.4f}  accuracy {metrics['eval/rewards/accuracy']:.3f}  "
        f"h {metrics['eval/h/mean']:.2f}" if "eval/gain" in metrics else "not evaluated"
    )
    end = f"  [{report.end_state}: {report.reason}]" if report.end_state else ""
    return f"step {report.step:>5}  {measured}{gold}  {report.verdict.headline}{end}"


def _numbers(interval: Difference | GainInterval | None) -> dict[str, float | int | None] | None:
    """JSON knows no infinity: a bound that is not known is null."""
    if interval is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in vars(interval).items()}


def _headline(answer: Answer) -> str:
    winner = answer.winner
    better = [alike.trial.trial_id for alike in answer.alike if alike.better]
    where = f"{winner.config.label}, stopped at step {winner.best_step} of {winner.config.training.total_steps}"
    if len(answer.standings) == 1:
        return f"Trained: {where}."
    if better:
        return f"No clear best: first in rank is {where}, but on test {', '.join(better)} did better."
    if winner.baseline:
        return f"Nothing beats the baseline: {where}."
    if answer.over_baseline is not None and not answer.beats_baseline:
        return f"Nothing is shown to beat the baseline; first in rank is {where}."
    return f"Best: {where}."


def _test_lines(answer: Answer) -> list[str]:
    gain = answer.test_gain
    lines = [
        f"Gain on test, which selected nothing: {gain.gain:.4f} bits per pair "
        f"(95 % interval {gain.low:.4f} to {gain.high:.4f}; {gain.n} pairs, {gain.clusters} prompts)."
    ]
    if answer.over_baseline is not None:
        lines.append(f"Minus the baseline ({answer.baseline.config.label}, step {answer.baseline.best_step}): "
                     f"{_signed(answer.over_baseline)}; {_verdict_on(answer.over_baseline)}.")
    elif answer.winner is not answer.baseline:
        lines.append("The baseline has no valid score to compare with.")
    lines += [f"Better than it on test: {_alike_line(alike)}." for alike in answer.alike if alike.better]
    alike = [alike for alike in answer.alike if not alike.better]
    if alike:
        lines.append(f"Cannot be told apart from it with these pairs ({len(alike)}):")
        lines += [f"  {_alike_line(one)}" for one in alike]
    elif len(answer.standings) > 1 and not answer.alike:
        lines.append("Every other configuration is worse, beyond chance.")
    resolved = "" if answer.resolvable is None else f"These pairs show a difference of {answer.resolvable:.4f} four times in five. "
    lines.append(f"{resolved}All of this is for this training seed.")
    return lines


def _gold_lines(answer: Answer) -> list[str]:
    """Where the true reward is known: whether gain chose well, and who over-optimised."""
    if not gold_rewards(answer.winner):
        return []
    start = answer.winner.reports[0].metrics.get("gold/reward") if 0 in answer.winner.reports else None
    base = "" if start is None else f"; the base model has {start:.2f}"
    known = {s.trial.trial_id: gold_rewards(s.trial) for s in answer.standings}
    known = {name: rewards for name, rewards in known.items() if rewards}
    fell = {name: rewards for name, rewards in known.items() if rewards[1] < rewards[0] - OVER_OPTIMISED_BY}
    line = f"The truth, for once known (gold reward{base}): {known[answer.winner.trial_id][0]:.2f} "
    line += f"for the best; the highest of all trials at their best steps is {max(r[0] for r in known.values()):.2f}."
    if not fell:
        return [line]
    worst = min(fell, key=lambda name: fell[name][1])
    return [line, f"Over-optimised: {len(fell)} of {len(known)} trials lost more than {OVER_OPTIMISED_BY:g} of it by their last "
                  f"step, though training went on 'improving'; worst is {worst}, from {fell[worst][0]:.2f} "
                  f"to {fell[worst][1]:.2f}."]


def gold_rewards(trial: TrialRecord) -> tuple[float, float] | tuple[()]:
    """Mean gold reward of the trial's samples at its best step and at its last; empty where it was not drawn."""
    best = trial.reports.get(trial.best_step)
    if best is None or "gold/reward" not in best.metrics:
        return ()
    return best.metrics["gold/reward"], _last_value(trial, "gold/reward")


def _verdict_on(difference: Difference) -> str:
    if difference.low > 0:
        return "better than the baseline"
    return "worse than the baseline" if difference.high < 0 else "not shown to differ from the baseline"


def _alike_line(alike: Alike) -> str:
    trial = alike.trial
    return (f"{trial.trial_id} {trial.config.label} at step {trial.best_step}: best minus this "
            f"{_signed(alike.difference)} on {alike.part}")


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _reasons(sweep: SweepRecord) -> list[str]:
    return [f"  {t.trial_id} {t.config.label}: {t.end_state}: {t.reason}" for t in sweep.trials.values() if t.reason]


def _row(standing: Standing) -> dict[str, str | float | int | None]:
    trial, last = standing.trial, standing.trial.last
    best = trial.reports.get(trial.best_step)
    metrics: Mapping[str, float] = best.metrics if best else {}
    return {
        "rank": standing.rank,
        "trial": trial.trial_id,
        "baseline": "baseline" if trial.baseline else "",
        "unopposed": "unopposed" if trial.unopposed else "",
        "loss": trial.config.loss,
        **trial.values,
        "end_state": trial.state,
        "verdict_at_best": last.verdict_at_best.headline if last else None,
        "verdict_at_end": last.verdict.headline if last else None,
        "score": round(trial.score, 4),
        "accuracy": _rounded(metrics.get("eval/rewards/accuracy")),
        "stop_step": trial.best_step,
        "steps_trained": last.step if last else 0,
        "onset_step": last.verdict.onset_step if last else None,
        "drift_per_token": _rounded(standing.drift if best else None),
        "gold_reward_at_best": _rounded(metrics.get("gold/reward")),
        "gold_reward_at_end": _rounded(_last_value(trial, "gold/reward")),
        "final_kl": _rounded(_last_value(trial, "samples/kl")),
        "reason": trial.reason,
    }


def _last_value(trial: TrialRecord, key: str) -> float | None:
    values = [trial.reports[step].metrics[key] for step in sorted(trial.reports) if key in trial.reports[step].metrics]
    return values[-1] if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

"""Stored results as words and tables: the answer in sentences, the leaderboard, one trial's row.

Every place that shows a trial (terminal, MLflow, JSON) shows the fields made here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt_ray.results.answer import Alike, Answer
from prefopt_ray.results.configurations import Configuration
from prefopt_ray.results.judgement import judgement_lines, stored_judgements
from prefopt_ray.results.ledger import SweepRecord, TrialRecord
from prefopt_ray.measures.compare import Difference, GainInterval
from prefopt_ray.trial import Report

OVER_OPTIMISED_BY = 0.5  # gold reward; the standard error of a mean over 128 samples is about .12


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """How far a sweep on a cluster is (see results.summary), in words."""
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items()) or "no trial yet"
    expected = f" of up to {summary['expected']}" if summary["expected"] else ""
    lines = [
        f"{summary['name']} {summary['sweep']}: {'finished' if summary['finished'] else summary['job_state']}",
        f"trials  {summary['begun']}{expected}: {states}",
    ]
    if best := summary["best"]:
        lines.append(f"best    {best['trial']} {best['configuration']}: {best['objective']} {best['value']:.4f} "
                     f"at step {best['step']}")
    for rung, counts in summary["rungs"].items():
        lines.append(f"rung    step {rung}: {counts['went_on']} of {counts['decided']} went on")
    lines.append(f"paid    {summary['trial_hours']:.2f} trial-hours, {summary['gpu_hours']:.2f} GPU-hours")
    if rest := summary["rest"]:
        lines.append(f"rest    {rest['trials']} trials, about {rest['hours']:.2f} hours")
    return [*lines, f"results {summary['folder']}"]


def answer_lines(sweep: SweepRecord, answer: Answer) -> list[str]:
    """The answer in plain words; the first line stands alone."""
    if answer.winner is None:
        return [f"No configuration has a valid score ({sweep.state_counts}).", *_reasons(sweep)]
    lines = [_headline(answer)]
    if answer.test_gain is None:
        name = answer.winner.config.evaluation.objective_name
        unit = " bits per pair" if name == "gain" else ""
        lines.append(f"Its {name} on the select part is {answer.winner.score:.4f}{unit}; "
                     "not scored on test yet, so this is optimistic and the order may change.")
    else:
        lines += _test_lines(answer)
    name = answer.winner.config.evaluation.objective_name
    if name != "gain" and answer.test_gain is not None:
        lines.append(f"Note: trials were ranked by {name}; the comparisons above are of gain.")
    lines += _gold_lines(answer)
    lines += [line for judgement in stored_judgements(sweep.folder)
              for line in judgement_lines(judgement, best=answer.winner.trial_id)]
    lines += [f"Note: {warning}." for warning in answer.warnings]
    merged = sweep.facts.get("merged_adapters")
    if merged:
        base = f"{sweep.facts['model']} with {', '.join(merged)} merged into it first"
        lines.append(f"Note: its adapter belongs on {base}.")
    quantisation = sweep.facts.get("quantisation")
    if quantisation:
        lines.append(f"Note: adapters were trained, and all of this measured, on the base in 4 bits ({quantisation}).")
    lines.append(f"Trials: {sweep.state_counts}{_evaluating(sweep)}.")
    return lines


def engine_lines(sweep: SweepRecord) -> list[str]:
    """What computed the trials, and why: one line for each engine that did."""
    trials: dict[str, list[str]] = {}
    for trial in sweep.trials.values():
        if "engine" in trial.placement:
            engine = f"{trial.placement['engine']} ({trial.placement.get('reason', '')})"
            trials.setdefault(engine, []).append(trial.trial_id)
    if len(trials) == 1:
        return [f"Engine: {engine}." for engine in trials]
    return [f"Engine of {', '.join(ids)}: {engine}." for engine, ids in trials.items()]


def leaderboard(answer: Answer) -> list[dict[str, str | float | int | None]]:
    """One flat row per configuration in the order of the answer, then those of the confirmation."""
    searched = [_row(s.configuration, rank=s.rank, drift=s.drift) for s in answer.standings]
    return searched + [_row(configuration) for configuration in answer.confirmed]


def answer_json(sweep: SweepRecord, answer: Answer) -> dict[str, Any]:
    """The answer as one JSON document."""
    winner = answer.winner
    return {
        "sweep": sweep.sweep_id,
        "name": sweep.name,
        "folder": str(sweep.folder),
        "finished": sweep.finished,
        "best": None if winner is None else {
            **_row(winner, rank=answer.rank_of(winner)),
            "total_steps": winner.config.training.total_steps,
            "test_gain": _numbers(answer.test_gain),
            "baseline_test_gain": _numbers(answer.baseline_gain),
            "minus_baseline": _numbers(answer.over_baseline),
            "beats_baseline": answer.beats_baseline,
            "adapter_beats_baseline": answer.adapter_beats_baseline,
            "claim": "configuration" if answer.of_configurations else "adapter",
            "training_seeds": len(winner.seeds),
            "confirmed": bool(answer.confirmed),
        },
        "cannot_be_told_apart": [
            {"trial": a.trial.trial_id, "configuration": a.trial.config.label, "stop_step": a.configuration.best_step,
             "best_minus_this": _numbers(a.difference), "part": a.part}
            for a in answer.alike if not a.better
        ],
        "better_on_test": [a.trial.trial_id for a in answer.alike if a.better],
        "resolvable_difference": answer.resolvable,
        "warnings": list(answer.warnings),
        "judgements": [judgement.to_dict() for judgement in stored_judgements(sweep.folder)],
        "trials": leaderboard(answer),
    }


def report_line(report: Report) -> str:
    """One evaluation as one line."""
    metrics = report.metrics
    gold = f"  gold {metrics['gold/reward']:.2f}" if "gold/reward" in metrics else ""
    measured = (
        f"gain {metrics['eval/gain']:.4f}  accuracy {metrics['eval/rewards/accuracy']:.3f}  "
        f"h {metrics['eval/h/mean']:.2f}" if "eval/gain" in metrics else "not evaluated"
    )
    judged = f"  judge {metrics['judge/win_rate']:.2f}" if "judge/win_rate" in metrics else ""
    end = f"  [{report.end_state}: {report.reason}]" if report.end_state else ""
    return f"step {report.step:>5}  {measured}{gold}{judged}  {report.verdict.headline}{end}"


def _numbers(interval: Difference | GainInterval | None) -> dict[str, float | int | None] | None:
    """JSON knows no infinity: a bound that is not known is null."""
    if interval is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in vars(interval).items()}


def _headline(answer: Answer) -> str:
    winner = answer.winner
    better = [alike.trial.trial_id for alike in answer.alike if alike.better]
    where = f"{winner.config.label}, stopped at step {winner.best_step} of {winner.config.training.total_steps}"
    if answer.confirmed:
        return _confirmed_headline(answer)
    if len(answer.standings) == 1:
        return f"Trained: {where}."
    if better:
        return f"No clear best: first in rank is {where}, but on test {', '.join(better)} did better."
    if winner.baseline:
        return f"Nothing beats the baseline: {where}."
    if answer.over_baseline is not None and not answer.adapter_beats_baseline:
        return f"Nothing is shown to beat the baseline; first in rank is {where}."
    return f"Best: {where}." if answer.of_configurations else f"Best adapter: {where}."


def _confirmed_headline(answer: Answer) -> str:
    winner, count = answer.winner, len(answer.winner.seeds)
    schedule = winner.config.training.schedule
    how = (f"{winner.config.label}, trained for {winner.best_step} steps, confirmed with {count} fresh "
           f"seed{'s' if count > 1 else ''}, schedule {schedule}")
    if winner.baseline:
        return f"Nothing beats the baseline: {how}."
    if answer.over_baseline is not None and not answer.adapter_beats_baseline:
        return f"The confirmed winner is not shown to beat the baseline: {how}."
    return f"Best: {how}." if answer.of_configurations else f"Best adapter: {how}."


def _test_lines(answer: Answer) -> list[str]:
    gain, seeds = answer.test_gain, len(answer.winner.seeds)
    over = f"mean of {seeds} seeds, " if seeds > 1 else ""
    lines = [
        f"Gain on test, which selected nothing: {gain.gain:.4f} bits per pair "
        f"({over}95 % interval {gain.low:.4f} to {gain.high:.4f}; {gain.n} pairs, {gain.clusters} prompts)."
    ]
    if answer.over_baseline is not None:
        lines.append(f"Minus the baseline ({answer.baseline.config.label}, step {answer.baseline.best_step}): "
                     f"{_signed(answer.over_baseline)}; {_verdict_on(answer)}.")
    elif answer.winner is not answer.baseline:
        lines.append("The baseline has no valid score to compare with.")
    lines += _confirmation_lines(answer)
    lines += [f"Better than it on test: {_alike_line(alike)}." for alike in answer.alike if alike.better]
    alike = [alike for alike in answer.alike if not alike.better]
    if alike:
        lines.append(f"Cannot be told apart from it with these pairs ({len(alike)}):")
        lines += [f"  {_alike_line(one)}" for one in alike]
    elif len(answer.standings) > 1 and not answer.alike:
        kind = "configuration" if answer.of_configurations else "adapter"
        lines.append(f"Every other {kind} is worse, beyond chance: the next in rank on test, those below on select, "
                     "which also ranked them.")
    if answer.resolvable is not None:
        lines.append(f"These pairs show a difference of {answer.resolvable:.4f} four times in five. {_scope(answer)}")
    else:
        lines.append(_scope(answer))
    return lines


def _evaluating(sweep: SweepRecord) -> str:
    """What part of the trials' time was spent measuring them."""
    last = [trial.last for trial in sweep.trials.values() if trial.last is not None]
    seconds = sum(report.seconds for report in last)
    share = sum(report.evaluating_seconds for report in last) / seconds if seconds else 0.0
    return f"; {share:.0%} of their time was evaluating" if share else ""


def _scope(answer: Answer) -> str:
    """What the numbers above are claims about."""
    if not answer.of_configurations:
        return ("All of this is for these adapters, one training seed each: the best of several is partly the luckiest. "
                "`replicates` or `confirm` in the spec tell about the configurations.")
    if answer.confirmed:
        return "Errors are over pairs and seeds; these seeds selected no length and no finalist."
    return ("Errors are over pairs and seeds. The same seeds chose the best, so its intervals allow for all it was "
            "chosen from; `confirm` trains it with fresh ones.")


def _confirmation_lines(answer: Answer) -> list[str]:
    """Where the confirmation does not say what the search said."""
    lines = []
    if answer.order_changed:
        rank = {c.key: answer.rank_of(c) for c in answer.confirmed}
        order = ", ".join(f"{c.config.label} (the search's {rank[c.key]}.)" for c in answer.confirmed)
        lines.append(f"The confirmed order differs from the search's: {order}.")
    for configuration in answer.confirmed:
        if configuration.score < 0:
            ends = ", ".join(f"seed {t.seed} {t.state}: {t.reason}" for t in configuration.trials)
            lines.append(f"Not confirmed: {configuration.config.label} did not reach its length with every seed ({ends}).")
    return lines


def _gold_lines(answer: Answer) -> list[str]:
    """Where the true reward is known: whether gain chose well, and who over-optimised."""
    at_best = _mean_at_best(answer.winner, "gold/reward")
    if at_best is None:
        return []
    first = answer.winner.first
    start = first.reports[0].metrics.get("gold/reward") if 0 in first.reports else None
    base = "" if start is None else f"; the base model has {start:.2f}"
    highest = max(
        reward for c in (answer.winner, *(s.configuration for s in answer.standings))
        if (reward := _mean_at_best(c, "gold/reward")) is not None
    )
    line = f"The truth, for once known (gold reward{base}): {at_best:.2f} "
    line += f"for the best; the highest of all trials at their best steps is {highest:.2f}."
    known = {t.trial_id: gold_rewards(t) for s in answer.standings for t in s.configuration.trials}
    known = {name: rewards for name, rewards in known.items() if rewards}
    fell = {name: rewards for name, rewards in known.items() if rewards[1] < rewards[0] - OVER_OPTIMISED_BY}
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


def _verdict_on(answer: Answer) -> str:
    difference = answer.over_baseline
    if difference.low > 0 and not answer.of_configurations:
        return "this adapter is better than the baseline's; one seed cannot say whether the configuration is"
    if difference.low > 0:
        return "better than the baseline"
    return "worse than the baseline" if difference.high < 0 else "not shown to differ from the baseline"


def _alike_line(alike: Alike) -> str:
    trial = alike.trial
    return (f"{trial.trial_id} {trial.config.label} at step {alike.configuration.best_step}: best minus this "
            f"{_signed(alike.difference)} on {_PARTS[alike.part]}")


_PARTS = {"test": "test", "select": "select (of the search, whose pairs and seeds also selected)"}


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _reasons(sweep: SweepRecord) -> list[str]:
    return [f"  {t.trial_id} {t.config.label}: {t.end_state}: {t.reason}" for t in sweep.trials.values() if t.reason]


def _row(
    configuration: Configuration, *, rank: int | None = None, drift: float = math.inf
) -> dict[str, str | float | int | None]:
    """A configuration's row, each number the mean over its seeds; the confirmation's have no rank."""
    first, step, trials = configuration.first, configuration.best_step, configuration.trials
    ends = [t.last for t in trials if t.last is not None]
    return {
        "rank": rank,
        "trial": first.trial_id,
        "role": first.role,
        "seeds": len(configuration.seeds),
        "baseline": "baseline" if first.baseline else "",
        "unopposed": "unopposed" if first.unopposed else "",
        "loss": first.config.loss,
        **first.values,
        "end_state": _each(t.state for t in trials),
        "verdict_at_best": _each(t.reports[step].verdict.headline for t in configuration.seeds) if step > 0 else
        _each(end.verdict_at_best.headline for end in ends),
        "verdict_at_end": _each(end.verdict.headline for end in ends),
        "score": round(configuration.score, 4),
        "accuracy": _rounded(_mean_at_best(configuration, "eval/rewards/accuracy")),
        "stop_step": step,
        "steps_trained": max((end.step for end in ends), default=0),
        "onset_step": min((e.verdict.onset_step for e in ends if e.verdict.onset_step is not None), default=None),
        "drift_per_token": _rounded(drift if math.isfinite(drift) else None),
        "gold_reward_at_best": _rounded(_mean_at_best(configuration, "gold/reward")),
        "gold_reward_at_end": _rounded(_mean(_last_value(t, "gold/reward") for t in configuration.seeds)),
        "final_kl": _rounded(_mean(_last_value(t, "samples/kl") for t in configuration.seeds)),
        "reason": _each(t.reason for t in trials),
    }


def _each(words: Iterable[str]) -> str | None:
    """What the seeds have, each once."""
    return "; ".join(dict.fromkeys(word for word in words if word)) or None


def _mean_at_best(configuration: Configuration, key: str) -> float | None:
    reports = [t.reports.get(configuration.best_step) for t in configuration.seeds]
    return _mean(report.metrics.get(key) if report else None for report in reports)


def _mean(values: Iterable[float | None]) -> float | None:
    """None where any seed has none: a mean over other seeds is another number."""
    listed = list(values)
    return None if None in listed else sum(listed) / len(listed)


def _last_value(trial: TrialRecord, key: str) -> float | None:
    values = [trial.reports[step].metrics[key] for step in sorted(trial.reports) if key in trial.reports[step].metrics]
    return values[-1] if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

"""A plan in words, within 80 columns, and as one JSON document."""

import textwrap
from typing import Any

from prefopt_ray.plan.estimate import SweepPlan

WIDTH, LABEL = 80, 9
GIB, MIB = 2**30, 2**20


def plan_lines(plan: SweepPlan) -> list[str]:
    """For people, one topic a paragraph."""
    counted = ", ".join(f"{count:,} {part}" for part, count in plan.pairs.items())
    lines = [*_paragraph(plan.name, f"{_trials(plan.trials)} on {counted} pairs")]
    lines += _paragraph("steps", _steps(plan))
    lines += _paragraph("engine", _engine(plan))
    lines += _paragraph("step", f"{_duration(plan.probe.step_s)} for {plan.config.training.batch_pairs} pairs")
    lines += _paragraph("trial", _trial(plan))
    lines += _paragraph("sweep", _sweep(plan))
    lines += _paragraph("memory", _memory(plan))
    if plan.judged:
        lines += _paragraph("note", "what the judge takes at each rung is in none of these figures")
    return lines + [line for note in plan.warnings for line in _paragraph("note", note)]


def plan_json(plan: SweepPlan) -> dict[str, Any]:
    """Times in seconds, memory in bytes."""
    probe, trial = plan.probe, plan.trial
    return {
        "name": plan.name, "trials": plan.trials, "pairs": plan.pairs, "rungs": list(plan.rungs),
        "steps": plan.config.training.stop_step, "batch_pairs": plan.config.training.batch_pairs,
        "evaluated_at": list(plan.config.evaluation.steps), "sampled_at": list(plan.config.evaluation.sample_steps),
        "plan": probe.plan.to_dict(), "largest_micro_batch_tokens": probe.widest_tokens,
        "seconds": {
            "open_worker": probe.open_s, "step": probe.step_s, "trial": trial.total, "training": trial.training,
            "select": trial.select, "probe": trial.probe, "samples": trial.samples, "checkpoints": trial.checkpoints,
            "reference_pass": plan.reference_s, "sweep": plan.sweep_s,
        },
        "evaluating_share": trial.evaluating_share,
        "memory_bytes": {"trial": probe.peak, **probe.memory},
        "room_bytes": vars(probe.room), "fitting": plan.fitting, "places": plan.places, "slots": plan.slots,
        "at_once": plan.at_once, "judge_not_timed": plan.judged, "warnings": list(plan.warnings),
    }


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"up to {count} trials"


def _steps(plan: SweepPlan) -> str:
    training, evaluation = plan.config.training, plan.config.evaluation
    rungs = f"; decided at {_listed(plan.rungs)}" if plan.rungs else "; no rungs"
    sampled = f"; sampled at {_listed(evaluation.sample_steps)}" if evaluation.sample_steps else ""
    evaluated = f"; evaluated at {_listed(evaluation.steps)}"
    return f"{training.stop_step} of {training.batch_pairs} pairs{rungs}{evaluated}{sampled}"


def _listed(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps))


def _engine(plan: SweepPlan) -> str:
    made = plan.probe.plan
    threads = f", {made.threads} thread{'s' if made.threads > 1 else ''}" if made.device == "cpu" else ""
    size = plan.config.training.micro_batch_pairs
    held = f"{made.micro_batch_tokens:,} tokens" if size is None else f"{size} pairs"
    return (
        f"{made.engine} ({made.reason}); {made.dtype} on {made.device}{threads}, attention {made.attention}; "
        f"{held} per micro-batch, the largest of these pairs has {plan.probe.widest_tokens:,} tokens"
    )


def _trial(plan: SweepPlan) -> str:
    trial = plan.trial
    parts = {"select": trial.select, "train probe": trial.probe, "samples": trial.samples}
    shares = ", ".join(f"{name} {seconds / trial.total:.0%}" for name, seconds in parts.items() if seconds)
    return (
        f"{_duration(trial.total)}, of which {_duration(trial.training)} training; "
        f"evaluating takes {trial.evaluating_share:.0%} of it: {shares}"
    )


def _sweep(plan: SweepPlan) -> str:
    reference = f", {_duration(plan.reference_s)} of it the reference pass" if plan.reference_s else ""
    return f"{_duration(plan.sweep_s)} with {plan.at_once} at once and none stopped early{reference}"


def _memory(plan: SweepPlan) -> str:
    probe, space = plan.probe, plan.probe.room
    what = "a GPU's" if probe.plan.device == "cuda" else "this machine's"
    parts = ", ".join(f"{stage} {_mib(rise)}" for stage, rise in probe.memory.items() if rise >= MIB)
    fit = f"{plan.fitting} fit" if plan.fitting else "not one fits"
    return (
        f"{_mib(probe.peak)} a trial ({parts}); {fit} in the {space.available / GIB:.1f} GiB that are free "
        f"of {what} {space.total / GIB:.1f}"
    )


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def _duration(seconds: float) -> str:
    """Two digits that matter: `0.53 s`, `48 s`, `12 min`, `3.4 h`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _paragraph(label: str, text: str) -> list[str]:
    label = label if len(label) < LABEL else f"{label}:"
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{LABEL}}" if len(label) < LABEL else f"{label} ",
        subsequent_indent=" " * LABEL, break_long_words=False,
    )

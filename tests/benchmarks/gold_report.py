"""The table as markdown: one function per part, each from recorded trials alone. Trains nothing."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from benchmarks.gold_null import DESIGNS, SELECT_PAIRS, TEST_PAIRS, Design, claim_interval, null_sweeps
from benchmarks.gold_ranks import (
    BUDGET_STEPS, OBJECTIVE, Correlation, best_so_far_table, rank_table, read_curves, regrets,
)
from benchmarks.gold_trials import RecordedTrial, read_trials
from benchmarks.gold_verdicts import Judged, Share, judged, precision, recall

from prefopt_ray.thresholds import Thresholds

CHOSEN_ON = (0, 1, 2)  # the seeds that thresholds were chosen on; the others were trained afterwards
FIRST_LOOK = 0  # the seed on which rankings were looked at first
# What the rules began with: half of the rejected completions, and overfit whatever the drift.
SPECIFIED = {"collapsed_frac": 0.5, "overfit_drift_frac": 0.0}
NULL_SWEEPS = 400  # of each design


def whole_report(out: Path) -> str:
    """Every part, with a line on what was recorded."""
    trials = table_trials(out)
    seeds = sorted({trial.seed for trial in trials})
    head = (
        "# The gold table\n\n"
        "Made by `python tests/benchmarks/gold_table.py run --seeds 0 1 2 3 4 --null 24 --out DIR` and "
        "`python tests/benchmarks/gold_table.py report DIR`.\n\n"
        f"{len(trials)} trials of the embedded gold task on seeds {', '.join(map(str, seeds))}. A seed gives its own "
        "pairs (training, select, and their noisy labels), data order, adapter initialisation and sampling noise; the "
        "base model is the same for all. 1000 training pairs, 320 steps of 64 pairs, evaluated ten times on 2000 "
        "select pairs and on one sample for each of 512 prompts. Nothing is stopped; guards only flag.\n"
    )
    return "\n".join([
        head, "## Verdicts against the gold reward\n", verdict_part(trials),
        "## What ranks trials\n", rank_part(trials),
        "## Claims when nothing is better\n", null_part(out), "## Every trial\n", trial_part(trials),
    ])


def table_trials(out: Path) -> list[RecordedTrial]:
    return read_trials(out, names="seed?-*")


def trial_part(trials: Sequence[RecordedTrial]) -> str:
    """One line per trial: truth on the left, verdict on the right."""
    head = ("trial", "gold at start, peak @ step, end", "fell, of its SE", "verdict", "flags", "onset",
            "KL per token", "best gain @ step, end", "")
    return _table(head, (_trial_row(_judge(trial)) for trial in trials))


def verdict_part(trials: Sequence[RecordedTrial]) -> str:
    """Precision and recall by seed group, then the trials that were judged wrongly."""
    found = [_judge(trial) for trial in trials]
    before = [_judge(trial, **SPECIFIED) for trial in trials]
    rows = [
        row for name, wanted in (
            ("thresholds chosen on these: seeds 0 to 2", lambda j: j.trial.seed in CHOSEN_ON),
            ("held-out seeds 3 and 4", lambda j: j.trial.seed not in CHOSEN_ON),
            ("held-out, rates below 1e-3",
             lambda j: j.trial.seed not in CHOSEN_ON and j.trial.config.learning_rate < 1e-3),
            ("all, LoRA", lambda j: j.trial.config.adapter.kind == "lora"),
            ("all, full fine-tuning", lambda j: j.trial.config.adapter.kind == "none"),
        )
        for row in _group_rows(name, list(filter(wanted, found)), list(filter(wanted, before)))
    ]
    head = ("trials", "n", "gold fell", "kept", "not counted", "precision", "recall", "precision as specified",
            "recall as specified")
    wrong = [j for j in found if j.kind in ("false alarm", "missed")]
    return "\n".join([
        "Positive: a headline of diverged, broken, memorised, overfit or collapsed_rejected, judged without any gold "
        "score. Truth: the gold reward at the end is more than two paired standard errors below its peak, the peak "
        "chosen on half of the prompts and the drop measured on the other half; drops of one to two are not counted. "
        "In brackets Wilson's 95 % interval. As specified: collapsed_rejected from half of the train probe on, and "
        "overfit whatever the drift.\n",
        _table(head, rows), "Judged wrongly:\n", _table(("trial", "", "gold", "verdict"), map(_wrong_row, wrong)),
    ])


def rank_part(trials: Sequence[RecordedTrial]) -> str:
    """Spearman with the gold reward at four lengths, the lead over the objective, and regret."""
    curves = read_curves([trial for trial in trials if trial.seed != FIRST_LOOK])
    now = {percent: rank_table(curves, step=step) for percent, step in BUDGET_STEPS.items()}
    so_far = {percent: best_so_far_table(curves, step=step) for percent, step in BUDGET_STEPS.items()}
    lost = regrets(curves)
    budgets = [f"{percent} %" for percent in BUDGET_STEPS]
    return "\n".join([
        "Spearman's rank correlation with the gold reward at the same step, within a seed, mean over all seeds but the "
        "first, with 95 % bootstrap intervals over trials. Regret: gold reward lost, against the best evaluation of "
        "any trial, by taking the evaluation that the score likes best.\n",
        _table(
            ("score", *(f"at {budget} of the budget" for budget in budgets), "regret"),
            [(name, *(_rho(now[percent][name]) for percent in now), f"{lost[name]:.2f}") for name in lost],
        ),
        "What a rung decides on: the highest value so far, with the highest gold reward so far.\n",
        _table(
            ("score", *(f"until {budget}" for budget in budgets)),
            [(name, *(_rho(so_far[percent][name]) for percent in so_far)) for name in lost],
        ),
        f"Lead over \"{OBJECTIVE}\", paired in the bootstrap: at the step, then best so far.\n",
        _table(
            ("score", *budgets, *(f"until {budget}" for budget in budgets)),
            [(name, *(_lead(table[percent][name]) for table in (now, so_far) for percent in table))
             for name in lost if name != OBJECTIVE],
        ),
    ])


def null_part(out: Path) -> str:
    """How often a sweep of one configuration claims that something beats its baseline."""
    trials = read_trials(out, names="seed1???-*")
    if not trials:
        return "No null trials are recorded.\n"
    first = trials[0].config
    about = (
        f"{len(trials)} trials of one configuration ({first.label}, {first.training.stop_step} steps), on the same "
        "pairs, each with its own training seed, dealt into sweeps without replacement; in every sweep "
        f"{SELECT_PAIRS} select and {TEST_PAIRS} test pairs of a pool are dealt anew. A claim is the answer's own, "
        "from the sweep's folder. Wilson's interval takes sweeps as independent; the second one knows that they "
        "share trials (Bayesian bootstrap of the trials; wide, for a sweep uses up to three in four of them).\n"
    )
    head = ("sweep", "claims \"better than the baseline\"", "with shared trials", "of these adapters only",
            "winner - baseline on test, bits per pair")
    return "\n".join([about, _table(head, [_null_row(trials, design) for design in DESIGNS])])


def _judge(trial: RecordedTrial, **other: float) -> Judged:
    return judged(trial, Thresholds(drift_limit_per_token=trial.config.guards.drift_limit_per_token, **other))


def _group_rows(name: str, found: Sequence[Judged], before: Sequence[Judged]) -> list[tuple[str, ...]]:
    """The group's row; none for an empty one."""
    if not found:
        return []
    counts = (str(sum(j.label.fell is kind for j in found)) for kind in (True, False, None))
    shares = (precision(found), recall(found), precision(before), recall(before))
    return [(name, str(len(found)), *counts, *map(str, shares))]


def _trial_row(found: Judged) -> tuple[str, ...]:
    trial, label = found.trial, found.label
    gold = {step: scores.mean() for step, scores in trial.gold.items()}
    trained = trial.history.trained
    best = max(trained, key=lambda record: record.gain.gain)
    samples = next(r.samples for r in reversed(trial.history.evaluations) if r.samples is not None)
    peak = max(gold, key=gold.get)
    mark = {"right": "", "not counted": "(not counted)"}.get(found.kind, f"**{found.kind}**")
    return (
        trial.name, f"{gold[0]:.2f}, {gold[peak]:.2f} @ {peak}, {gold[max(gold)]:.2f}",
        f"{label.drop:.2f}, {label.drop / label.se:.1f}" if label.se > 0 else "0", found.verdict.headline,
        ", ".join(flag for flag in found.verdict.flags if flag != found.verdict.headline),
        "" if found.verdict.onset_step is None else str(found.verdict.onset_step), f"{samples.kl_per_token:.2f}",
        f"{best.gain.gain:.3f} @ {best.step}, {trained[-1].gain.gain:.3f}", mark,
    )


def _wrong_row(found: Judged) -> tuple[str, ...]:
    label = found.label
    gold = "kept"
    if label.fell:
        gold = f"fell by {label.drop:.2f} ({label.drop / label.se:.1f} SE) from step {label.peak_step}"
    return found.trial.name, found.kind, gold, f"{found.verdict.headline}: {found.verdict.evidence}"


def _null_row(trials: Sequence[RecordedTrial], design: Design) -> tuple[str, ...]:
    found = null_sweeps(trials, design, sweeps=NULL_SWEEPS)
    low, high = claim_interval(found, len(trials))
    differences = np.array([sweep.difference for sweep in found if sweep.difference is not None])
    return (
        f"{design.name} ({design.configurations} configurations)",
        str(Share(sum(sweep.claimed for sweep in found), len(found))), f"{low:.3f} to {high:.3f}",
        str(Share(sum(sweep.adapter_claimed for sweep in found), len(found))),
        f"mean {differences.mean():+.4f}, sd {differences.std():.4f}",
    )


def _rho(found: Correlation) -> str:
    return f"{found.rho:.2f} ({found.low:.2f} to {found.high:.2f})"


def _lead(found: Correlation) -> str:
    return f"{found.lead:+.2f} ({found.lead_low:+.2f} to {found.lead_high:+.2f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"

"""Why a trial has its verdict: every rule with the numbers behind it, recomputed from what the trial stored.

With other thresholds it says what would have been said. Trains nothing, writes nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.results.ledger import SweepRecord, TrialRecord
from prefopt_ray.measures.verdicts import Check, Reading, Thresholds, conclude, read_rules
from prefopt_ray.train.history import read_history
from prefopt_ray.trial import Verdict

LISTED = 20  # trials that an error names


@dataclass(frozen=True)
class Explanation:
    """A trial's verdict at one of its evaluations. `recorded` is what was said there while it ran."""

    trial: TrialRecord
    at: str  # best | end
    step: int
    verdict: Verdict
    recorded: Verdict
    readings: tuple[Reading, ...]


def explain_trial(sweep: SweepRecord, trial_id: str, thresholds: Thresholds, *, at: str = "end") -> Explanation:
    """The verdict at the trial's best evaluation, or at its end; `12` is trial 0012.

    Raises SweepError and CheckpointError.
    """
    trial = _find(sweep, trial_id)
    if trial.last is None or (at == "best" and trial.best_step < 0):
        rule = "has no valid evaluation after a step" if trial.last else "was never evaluated"
        raise SweepError(Problem(sweep.folder.name, trial.trial_id, "", rule, "see `prefopt show SWEEP --reasons`"))
    step = trial.best_step if at == "best" else trial.last.step
    history = read_history(sweep.folder / "trials" / trial.trial_id, trial.config).until(step)
    readings = read_rules(history, thresholds)
    recorded = trial.last.verdict_at_best if at == "best" else trial.last.verdict
    return Explanation(trial, at, step, conclude(readings, history, thresholds), recorded, readings)


def explanation_lines(explanation: Explanation) -> Iterator[str]:
    """The verdict, then a paragraph for each rule; `*` marks a comparison that holds."""
    trial, verdict = explanation.trial, explanation.verdict
    where = "its best evaluation" if explanation.at == "best" else "its end"
    yield f"{trial.trial_id} {trial.config.label}, {trial.state}: the verdict at {where}, step {explanation.step}"
    onset = f" from step {verdict.onset_step}" if verdict.onset_step is not None else ""
    yield f"{verdict.headline}{onset}: {verdict.evidence}"
    if verdict.flags:
        yield f"flags: {', '.join(verdict.flags)}"
    if verdict != explanation.recorded:
        said = ", ".join(explanation.recorded.flags) or "no flags"
        yield f"recorded while it ran: {explanation.recorded.headline} ({said})"
    for reading in explanation.readings:
        yield ""
        yield f"{reading.rule}: {_outcome(reading)}"
        for check in reading.checks:
            yield _check_line(check)


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """The same for scripts; a number that JSON does not know is its name as a text ("inf", "nan")."""
    trial = explanation.trial
    return {
        "trial": trial.trial_id, "label": trial.config.label, "state": trial.state, "at": explanation.at,
        "step": explanation.step, "verdict": asdict(explanation.verdict), "recorded": asdict(explanation.recorded),
        "rules": [
            {**asdict(reading), "checks": [_check_json(check) for check in reading.checks]}
            for reading in explanation.readings
        ],
    }


def _find(sweep: SweepRecord, trial_id: str) -> TrialRecord:
    for written in (trial_id, trial_id.zfill(4)):  # tables show trials by their number
        if written in sweep.trials:
            return sweep.trials[written]
    known = ", ".join(list(sweep.trials)[:LISTED]) or "none"
    known += f" and {len(sweep.trials) - LISTED} more" if len(sweep.trials) > LISTED else ""
    rule = f"no such trial in {sweep.folder.name}"
    raise SweepError(Problem("command line", "TRIAL", repr(trial_id[:200]), rule, f"its trials: {known}"))


def _outcome(reading: Reading) -> str:
    if not reading.checks:
        return "nothing to read"
    if not reading.fired:
        return "no"
    return "yes" if reading.onset_step is None else f"yes, from step {reading.onset_step}"


def _check_line(check: Check) -> str:
    value = "not measured" if check.value is None else f"{check.value:.4g}"
    at = "" if check.step is None else f", step {check.step}"
    threshold = f" ({check.threshold})" if check.threshold else ""
    return f"  {'*' if check.met else ' '} {check.name}{at}: {value}, fires at {check.sign} {check.limit:.4g}{threshold}"


def _check_json(check: Check) -> dict[str, Any]:
    plain = {**asdict(check), "met": check.met}
    return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in plain.items()}

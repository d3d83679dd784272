"""Rule 1, diverged: the numbers blew up. Read from the optimizer steps, and the probe's loss at evaluations.

Linear in the history. Scale-free, because every loss is divided by its value at the start; where that is no scale
(`LossCard.start_is_scale`), only what is not finite and the gradient tell.
"""

import math
from collections.abc import Iterator

import numpy as np

from prefopt_ray.losses.cards import find_card
from prefopt_ray.measures.verdicts.history import EvaluationRecord, StepRecord, TrialHistory
from prefopt_ray.measures.verdicts.reading import Check, Reading, Sign, reading
from prefopt_ray.thresholds import Thresholds


def diverged(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """The earliest sign of numbers blowing up."""
    finite = _finite_steps(history)
    card = find_card(history.loss)
    signs = [_not_finite(history), _grad_spikes(finite, thresholds)]
    if card.start_is_scale:
        signs += [_loss_ran_up(finite, history.warmup_steps, thresholds), _probe_loss_ran_up(history, thresholds)]
    if not card.bounded_below:
        signs.append(_loss_ran_down(finite, thresholds))
    return reading("diverged", signs)


def _finite_steps(history: TrialHistory) -> list[StepRecord]:
    """The steps before the first that is not finite: later ones say nothing."""
    steps = []
    for record in history.steps:
        if not _is_finite(record):
            break
        steps.append(record)
    return steps


def _is_finite(record: StepRecord) -> bool:
    return record.finite and all(map(math.isfinite, (record.loss, record.loss_norm, record.grad_norm)))


def _not_finite(history: TrialHistory) -> Sign:
    steps = [record for record in history.steps if not _is_finite(record)]
    evaluations = [record for record in history.evaluations if not record.valid]
    checks = (Check("steps and evaluations that are not finite", len(steps) + len(evaluations), ">", 0),)
    if steps and (not evaluations or steps[0].step <= evaluations[0].step):
        at = steps[0]
        values = f"loss {at.loss:g}, gradient norm {at.grad_norm:g}"
        return Sign(checks, at.step, f"a loss, gradient or log-prob was not finite at step {at.step} ({values})")
    if evaluations:
        at = evaluations[0]
        return Sign(checks, at.step, f"a log-ratio was not finite at the evaluation of step {at.step}")
    return Sign(checks)


def _loss_ran_up(steps: list[StepRecord], warmup_steps: int, thresholds: Thresholds) -> Sign:
    run, longest, highest = 0, 0, None  # consecutive steps over the limit, after the warm-up
    found: tuple[int, str] | tuple[()] = ()
    for record, average in _loss_averages(steps, thresholds):
        if record.step <= warmup_steps:
            continue
        highest = average if highest is None else max(highest, average)
        run = run + 1 if average > thresholds.loss_norm_limit else 0
        longest = max(longest, run)
        if run == thresholds.loss_steps and not found:
            since = record.step - run + 1
            evidence = f"the smoothed loss was {average:.3g} times its start at step {record.step}"
            found = (since, f"{evidence}, over {thresholds.loss_norm_limit:g} since step {since}")
    limit = thresholds.loss_norm_limit
    checks = (
        Check("highest smoothed loss after the warm-up, times its start", highest, ">", limit, "loss_norm_limit"),
        Check("steps in a row it stayed there", longest, ">=", thresholds.loss_steps, "loss_steps"),
    )
    return Sign(checks, *found)


def _loss_ran_down(steps: list[StepRecord], thresholds: Thresholds) -> Sign:
    """Of a loss that is unbounded below."""
    limit = thresholds.unbounded_loss_norm
    averages = list(_loss_averages(steps, thresholds))
    lowest = min((average for _, average in averages), default=None)
    checks = (Check("lowest smoothed loss, times its start", lowest, "<", limit, "unbounded_loss_norm"),)
    for record, average in averages:
        if average < limit:
            evidence = f"the smoothed loss fell to {average:.3g} times its start at step {record.step}"
            return Sign(checks, record.step, evidence)
    return Sign(checks)


def _loss_averages(steps: list[StepRecord], thresholds: Thresholds) -> Iterator[tuple[StepRecord, float]]:
    """Each step with the exponential average of loss_norm, which begins at the first value."""
    average = steps[0].loss_norm if steps else 0.0
    for record in steps:
        average = thresholds.loss_ema_decay * average + (1 - thresholds.loss_ema_decay) * record.loss_norm
        yield record, average


def _probe_loss_ran_up(history: TrialHistory, thresholds: Thresholds) -> Sign:
    """The same on the probe, for losses that go wrong between recorded steps; select would confuse it with overfit."""
    limit, wanted = thresholds.loss_norm_limit, thresholds.loss_evaluations
    known = [r for r in history.evaluations if r.probe_loss_norm is not None and r.step > history.warmup_steps]
    run: list[EvaluationRecord] = []
    longest, found = 0, ()
    for record in known:
        run = [] if record.probe_loss_norm <= limit else [*run, record]
        longest = max(longest, len(run))
        if len(run) == wanted and not found:
            evidence = f"the train probe's loss was {record.probe_loss_norm:.3g} times its start at step {record.step}"
            found = (run[0].step, f"{evidence}, over {limit:g} since step {run[0].step}")
    highest = max((record.probe_loss_norm for record in known), default=None)
    checks = (
        Check("highest loss of the train probe, times its start", highest, ">", limit, "loss_norm_limit"),
        Check("evaluations in a row it stayed there", longest, ">=", wanted, "loss_evaluations"),
    )
    return Sign(checks, *found)


def _grad_spikes(steps: list[StepRecord], thresholds: Thresholds) -> Sign:
    """Several gradients in a short time far above the running median, and above the level training began at.

    Without the second condition a converged trial, whose median is almost zero, would diverge at the first
    pair it has not fitted. A median of exactly zero (hinge, all pairs satisfied) has no scale to compare with.
    """
    norms = np.array([record.grad_norm for record in steps])
    spikes: list[int] = []  # indices into steps
    most, found = 0, ()
    for i in _spike_candidates(norms, thresholds):
        usual = float(np.median(norms[max(0, i - thresholds.grad_median_steps) : i]))
        start = float(np.median(norms[: min(i, thresholds.grad_start_steps)]))
        if not (usual > 0 and norms[i] > thresholds.grad_spike_ratio * usual and norms[i] > start):
            continue
        spikes = [j for j in spikes if i - j < thresholds.grad_spike_steps] + [i]
        most = max(most, len(spikes))
        if len(spikes) == thresholds.grad_spikes and not found:
            first, ratio = steps[spikes[0]].step, norms[i] / usual
            evidence = f"gradient norm {norms[i]:.3g} at step {steps[i].step} was {ratio:.3g} times its running median"
            found = (first, f"{evidence}, one of {len(spikes)} such steps since step {first}")
    ratio, within = thresholds.grad_spike_ratio, thresholds.grad_spike_steps
    name = f"gradients over {ratio:g} times their median within {within} steps"
    return Sign((Check(name, most, ">=", thresholds.grad_spikes, "grad_spikes"),), *found)


def _spike_candidates(norms: np.ndarray, thresholds: Thresholds) -> list[int]:
    """Indices that could be spikes: far above the smallest norm so far, hence few medians are ever taken."""
    if len(norms) < 2:
        return []
    smallest_before = np.minimum.accumulate(norms)[:-1]
    return [int(i) + 1 for i in np.flatnonzero(norms[1:] > thresholds.grad_spike_ratio * smallest_before)]

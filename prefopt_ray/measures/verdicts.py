"""Verdicts: what went right or wrong in a trial, from its stored history alone.

Rules 1, 4, 6 and 9 of the verdict table: diverged, overfit, collapsed_rejected, healthy. All that fire are
flags, the first is the headline; a trial that neither fails nor shows learning is `inconclusive`. Linear in
the history, so it can be asked again at every evaluation. Knows neither models nor what is done about it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from prefopt_ray.losses.cards import find_card
from prefopt_ray.measures.clustered import ClusteredMean, clustered_mean
from prefopt_ray.measures.gain import LN2, Gain, calibrated_gain, calibrated_losses
from prefopt_ray.trial import Verdict


@dataclass(frozen=True)
class Thresholds:
    """Every number a rule reads. `loss_norm` is loss / L0, so one limit serves all losses and betas."""

    # diverged. An IPO trial sat at 1.7 x L0 for twenty steps and recovered: 2 is on the right side of it.
    loss_norm_limit: float = 2.0
    loss_ema_decay: float = 0.95  # a batch's loss is noisy; this averages about twenty of them
    loss_steps: int = 20  # consecutive, so that one bad batch is forgiven
    loss_evaluations: int = 2  # consecutive; the probe's loss is not noisy
    grad_spike_ratio: float = 1000.0  # a blow-up passes any ratio within steps; an outlier hardly this one
    grad_median_steps: int = 200
    grad_start_steps: int = 20  # a spike must also exceed the median of these, see _grad_spikes
    grad_spikes: int = 3  # two can be two odd batches
    grad_spike_steps: int = 50
    unbounded_loss_norm: float = -1.0  # a loss unbounded below runs away downwards
    # overfit. Real differences at 512 pairs are 1 to 2.8 standard errors: less than 2 must not stop a trial.
    overfit_z: float = 2.0
    overfit_evaluations: int = 2  # consecutive
    fitted_nats: float = 0.01  # a probe with a lower loss is memorised: it cannot visibly fall further
    # collapsed_rejected: half of the train probe's rejected completions have all but vanished.
    collapsed_frac: float = 0.5
    # healthy: the same caution as for overfit.
    learned_z: float = 2.0
    # A starting point for language models, nothing measured; .5 fits the embedded gold task.
    drift_limit_per_token: float = 0.3


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, counted from 1. `grad_norm` before clipping; `loss_norm` = loss / L0."""

    step: int
    loss: float
    loss_norm: float
    grad_norm: float
    finite: bool  # loss, gradients and log-probs all were


@dataclass(frozen=True, eq=False)
class EvaluationRecord:
    """One evaluation. Margins are the loss's own implicit ones without beta, always of the same pairs."""

    step: int  # optimizer steps done; 0 = before training
    select_margins: np.ndarray  # (N,)
    groups: np.ndarray | None  # (N,) equal for pairs of one prompt
    probe_margins: np.ndarray  # (M,), fixed train pairs
    probe_collapsed_frac: float  # share of the probe's rejected completions that collapsed
    probe_loss_norm: float | None = None  # of the probe: on select an overfit trial's loss grows without end
    kl_per_token: float | None = None  # nats, on the policy's own samples, where some were drawn

    @cached_property
    def gain(self) -> Gain:
        """On the select part."""
        return calibrated_gain(self.select_margins, self.groups)

    @cached_property
    def probe_gain(self) -> Gain:
        return calibrated_gain(self.probe_margins, None)

    @property
    def valid(self) -> bool:
        return self.gain.valid and self.probe_gain.valid


@dataclass(frozen=True)
class TrialHistory:
    """What a trial has stored so far, in order of steps."""

    loss: str  # card name
    warmup_steps: int
    steps: Sequence[StepRecord]
    evaluations: Sequence[EvaluationRecord]

    def until(self, step: int) -> "TrialHistory":
        """The history as it was after the evaluation at `step`: the verdict at the best step is judged on it."""
        return replace(
            self,
            steps=[record for record in self.steps if record.step <= step],
            evaluations=[record for record in self.evaluations if record.step <= step],
        )


def judge(history: TrialHistory, thresholds: Thresholds = Thresholds()) -> Verdict:
    """The verdict on a history: headline by precedence diverged > overfit > collapsed_rejected > healthy.

    `flags` holds every rule that fired, then `drift_limit`; `onset_step` and `evidence` are the headline's.
    Raises ValueError when two evaluations cover different numbers of pairs.
    """
    rules: tuple[_Rule, ...] = (_diverged, _overfit, _collapsed_rejected)
    findings = [finding for rule in rules if (finding := rule(history, thresholds))]
    flags = tuple(finding.flag for finding in findings) + _drift_flags(history, thresholds)
    if findings:
        return Verdict(findings[0].flag, flags, findings[0].onset_step, findings[0].evidence)
    headline, evidence = _learned(history, thresholds)
    return Verdict(headline, flags, evidence=evidence)


def drift_exceeded(kl_per_token: float, limit: float) -> bool:
    """Whether the policy's own samples are further from the reference than `limit`, both nats per token.

    A NaN counts as exceeded.
    """
    return not kl_per_token <= limit


@dataclass(frozen=True)
class _Finding:
    flag: str
    onset_step: int
    evidence: str


_Rule = Callable[[TrialHistory, Thresholds], _Finding | None]


def _diverged(history: TrialHistory, thresholds: Thresholds) -> _Finding | None:
    """Rule 1: the earliest sign of numbers blowing up."""
    finite = _finite_steps(history)
    signs = (
        *_not_finite(history),
        *_loss_ran_up(finite, history.warmup_steps, thresholds),
        *_probe_loss_ran_up(history, thresholds),
        *_grad_spikes(finite, thresholds),
        *_loss_ran_down(finite, history, thresholds),
    )
    return min((_Finding("diverged", *sign) for sign in signs), key=lambda f: f.onset_step, default=None)


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


def _not_finite(history: TrialHistory) -> Iterator[tuple[int, str]]:
    bad_step = next((record for record in history.steps if not _is_finite(record)), None)
    if bad_step:
        values = f"loss {bad_step.loss:g}, gradient norm {bad_step.grad_norm:g}"
        yield bad_step.step, f"a loss, gradient or log-prob was not finite at step {bad_step.step} ({values})"
    bad_evaluation = next((record for record in history.evaluations if not record.valid), None)
    if bad_evaluation:
        yield bad_evaluation.step, f"a log-ratio was not finite at the evaluation of step {bad_evaluation.step}"


def _loss_ran_up(steps: list[StepRecord], warmup_steps: int, thresholds: Thresholds) -> Iterator[tuple[int, str]]:
    run: list[int] = []  # consecutive steps over the limit, after the warm-up
    for record, average in _loss_averages(steps, thresholds):
        over = average > thresholds.loss_norm_limit and record.step > warmup_steps
        run = [*run, record.step] if over else []
        if len(run) == thresholds.loss_steps:
            evidence = f"the smoothed loss was {average:.3g} times its start at step {record.step}"
            yield run[0], f"{evidence}, over {thresholds.loss_norm_limit:g} since step {run[0]}"
            return


def _loss_ran_down(
    steps: list[StepRecord], history: TrialHistory, thresholds: Thresholds
) -> Iterator[tuple[int, str]]:
    if find_card(history.loss).bounded_below:
        return
    for record, average in _loss_averages(steps, thresholds):
        if average < thresholds.unbounded_loss_norm:
            yield record.step, f"the smoothed loss fell to {average:.3g} times its start at step {record.step}"
            return


def _loss_averages(steps: list[StepRecord], thresholds: Thresholds) -> Iterator[tuple[StepRecord, float]]:
    """Each step with the exponential average of loss_norm, which begins at the first value."""
    average = steps[0].loss_norm if steps else 0.0
    for record in steps:
        average = thresholds.loss_ema_decay * average + (1 - thresholds.loss_ema_decay) * record.loss_norm
        yield record, average


def _probe_loss_ran_up(history: TrialHistory, thresholds: Thresholds) -> Iterator[tuple[int, str]]:
    """The same on the probe, for losses that go wrong between recorded steps; select would confuse it with overfit."""
    run: list[EvaluationRecord] = []
    for record in history.evaluations:
        known = record.probe_loss_norm is not None and record.step > history.warmup_steps
        over = known and not record.probe_loss_norm <= thresholds.loss_norm_limit
        run = [*run, record] if over else []
        if len(run) == thresholds.loss_evaluations:
            evidence = f"the train probe's loss was {record.probe_loss_norm:.3g} times its start at step {record.step}"
            yield run[0].step, f"{evidence}, over {thresholds.loss_norm_limit:g} since step {run[0].step}"
            return


def _grad_spikes(steps: list[StepRecord], thresholds: Thresholds) -> Iterator[tuple[int, str]]:
    """Several gradients in a short time far above the running median, and above the level training began at.

    Without the second condition a converged trial, whose median is almost zero, would diverge at the first
    pair it has not fitted. A median of exactly zero (hinge, all pairs satisfied) has no scale to compare with.
    """
    norms = np.array([record.grad_norm for record in steps])
    spikes: list[int] = []  # indices into steps
    for i in _spike_candidates(norms, thresholds):
        usual = float(np.median(norms[max(0, i - thresholds.grad_median_steps) : i]))
        start = float(np.median(norms[: min(i, thresholds.grad_start_steps)]))
        if usual > 0 and norms[i] > thresholds.grad_spike_ratio * usual and norms[i] > start:
            spikes = [j for j in spikes if i - j < thresholds.grad_spike_steps] + [i]
        if len(spikes) == thresholds.grad_spikes:
            first, ratio = steps[spikes[0]].step, norms[i] / usual
            evidence = f"gradient norm {norms[i]:.3g} at step {steps[i].step} was {ratio:.3g} times its running median"
            yield first, f"{evidence}, one of {len(spikes)} such steps since step {first}"
            return


def _spike_candidates(norms: np.ndarray, thresholds: Thresholds) -> list[int]:
    """Indices that could be spikes: far above the smallest norm so far, hence few medians are ever taken."""
    if len(norms) < 2:
        return []
    smallest_before = np.minimum.accumulate(norms)[:-1]
    return [int(i) + 1 for i in np.flatnonzero(norms[1:] > thresholds.grad_spike_ratio * smallest_before)]


def _overfit(history: TrialHistory, thresholds: Thresholds) -> _Finding | None:
    """Rule 4: per-pair select losses rise above those of the best evaluation while the train probe's fall.

    Each evaluation is read at its own calibration, so a mere growth of the margins is no overfitting. The
    onset is the best evaluation, the last good one; the rise is found at the second evaluation that shows it.
    """
    # As for best-so-far, an evaluation before the first optimizer step cannot be the best one.
    records = [record for record in history.evaluations if record.step > 0 and record.valid]
    if not records:
        return None
    best = max(records, key=lambda record: record.gain.gain)
    hits = 0
    for record in (r for r in records if r.step > best.step):
        rise = _rise(best, record)
        worse = rise.mean > thresholds.overfit_z * rise.se
        hits = hits + 1 if worse and _probe_kept_falling(best, record, thresholds) else 0
        if hits == thresholds.overfit_evaluations:
            return _Finding("overfit", best.step, _overfit_evidence(best, record, rise))
    return None


def _rise(best: EvaluationRecord, later: EvaluationRecord) -> ClusteredMean:
    """Mean rise of the calibrated select loss per pair, nats, paired."""
    if len(best.select_margins) != len(later.select_margins):
        raise ValueError(f"steps {best.step} and {later.step} evaluated different pairs")
    losses = [calibrated_losses(record.select_margins, record.gain.scale) for record in (best, later)]
    return clustered_mean(losses[1] - losses[0], later.groups)


def _probe_kept_falling(best: EvaluationRecord, later: EvaluationRecord, thresholds: Thresholds) -> bool:
    """The train probe is fitted better than at the best evaluation, or so well that better cannot be seen."""
    before, after = (LN2 * (1 - record.probe_gain.gain) for record in (best, later))
    return after < max(before, thresholds.fitted_nats)


def _overfit_evidence(best: EvaluationRecord, later: EvaluationRecord, rise: ClusteredMean) -> str:
    z = f"z = {rise.mean / rise.se:.1f}" if rise.se > 0 else "the same for every pair"
    drift = "" if later.kl_per_token is None else f", {later.kl_per_token:.3g} nats per token from the reference"
    return (
        f"gain fell from {best.gain.gain:.4f} at step {best.step} to {later.gain.gain:.4f} at step {later.step} "
        f"({z} over {rise.n} pairs) while the train probe's went from {best.probe_gain.gain:.4f} "
        f"to {later.probe_gain.gain:.4f}; detected at step {later.step}{drift}"
    )


def _collapsed_rejected(history: TrialHistory, thresholds: Thresholds) -> _Finding | None:
    """Rule 6, as of the latest evaluation; the onset is where the present collapse began."""
    onset = None
    for record in history.evaluations:
        if record.probe_collapsed_frac < thresholds.collapsed_frac:
            onset = None
        elif onset is None:
            onset = record.step
    if onset is None:
        return None
    last, limit = history.evaluations[-1], thresholds.collapsed_frac
    now = f"{last.probe_collapsed_frac:.0%} of the train probe's rejected completions had collapsed at step {last.step}"
    return _Finding("collapsed_rejected", onset, f"{now}, {limit:.0%} or more since step {onset}")


def _learned(history: TrialHistory, thresholds: Thresholds) -> tuple[str, str]:
    """Rule 9, for a history in which no other rule fired: headline and evidence."""
    trained = [record for record in history.evaluations if record.step > 0]
    if not trained:
        return "inconclusive", "not evaluated after an optimizer step yet"
    last = trained[-1]
    numbers = f"gain {last.gain.gain:.4f} with standard error {last.gain.se:.4f} at step {last.step}"
    if last.gain.gain > thresholds.learned_z * last.gain.se:
        return "healthy", f"{numbers}, more than {thresholds.learned_z:g} standard errors above zero"
    return "inconclusive", f"no evidence of learning yet: {numbers}, not over {thresholds.learned_z:g} of them"


def _drift_flags(history: TrialHistory, thresholds: Thresholds) -> tuple[str, ...]:
    """The latest measured KL counts; evaluations without samples say nothing."""
    measured = [record.kl_per_token for record in history.evaluations if record.kl_per_token is not None]
    over = bool(measured) and drift_exceeded(measured[-1], thresholds.drift_limit_per_token)
    return ("drift_limit",) if over else ()

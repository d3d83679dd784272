"""Rules 2 to 9 and the flags beside a headline: from broken to healthy, each a pure function of the history.

Linear in the evaluations. Unless it says otherwise a rule reads the state at the latest evaluation that measured
what it needs, and its onset is where that state began.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import numpy as np

from prefopt_ray.measures.clustered import ClusteredMean, clustered_mean
from prefopt_ray.measures.gain import LN2, calibrated_losses
from prefopt_ray.measures.verdicts.history import ChosenRecord, EvaluationRecord, SampleRecord, TrialHistory
from prefopt_ray.measures.verdicts.reading import Check, Reading, Sign, reading
from prefopt_ray.thresholds import Thresholds

_CALIBRATED = "calibrated loss"
Fit = Callable[[EvaluationRecord], tuple[np.ndarray, float]]  # loss of each select pair (N,), mean of the probe's


# -- broken ----------------------------------------------------------------------------------------


def broken(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 2: what the policy writes, or thinks of the chosen texts, is no longer language."""
    sampled = [record for record in history.evaluations if record.step > 0 and record.samples is not None]
    return reading("broken", (
        _repeats_itself(sampled, thresholds),
        _far_away(sampled, thresholds),
        _does_not_end(sampled, thresholds),
        _worse_than_uniform(history, thresholds),
    ))


def _repeats_itself(sampled: Sequence[EvaluationRecord], thresholds: Thresholds) -> Sign:
    def limit(samples: SampleRecord) -> float:
        return thresholds.broken_unique_frac * samples.reference_unique_frac

    if not sampled:
        return Sign()
    last = sampled[-1]
    value, onset = last.samples.unique_frac, _since(sampled, lambda r: r.samples.unique_frac < limit(r.samples))
    check = Check("distinct samples", value, "<", limit(last.samples), "broken_unique_frac", last.step)
    return Sign((check,), onset, f"only {value:.0%} of {last.samples.count} samples were distinct at step {last.step}")


def _far_away(sampled: Sequence[EvaluationRecord], thresholds: Thresholds) -> Sign:
    if not sampled:
        return Sign()
    last, limit = sampled[-1], thresholds.broken_kl_per_token
    value, onset = last.samples.kl_per_token, _since(sampled, lambda r: r.samples.kl_per_token > limit)
    check = Check("KL on samples, nats per token", value, ">", limit, "broken_kl_per_token", last.step)
    evidence = f"samples were {value:.3g} nats per token from the reference at step {last.step}, over {limit:g}"
    return Sign((check,), onset, evidence)


def _does_not_end(sampled: Sequence[EvaluationRecord], thresholds: Thresholds) -> Sign:
    """Far fewer samples end by themselves than the reference's, by more than two samples of prompts differ."""
    if not sampled:
        return Sign()
    last, onset = sampled[-1], _since(sampled, lambda r: all(check.met for check in _end_checks(r, thresholds)))
    rates = f"{last.samples.eos_rate:.0%} of the samples ended by themselves at step {last.step}"
    evidence = f"{rates}, {last.samples.reference_eos_rate:.0%} of the reference's"
    return Sign(_end_checks(last, thresholds), onset, evidence)


def _end_checks(record: EvaluationRecord, thresholds: Thresholds) -> tuple[Check, ...]:
    rate, usual = record.samples.eos_rate, record.samples.reference_eos_rate
    se = math.sqrt((rate * (1 - rate) + usual * (1 - usual)) / record.samples.count)
    fall, limit = _in_errors(usual - rate, se), thresholds.broken_eos_frac * usual
    return (
        Check("samples that end by themselves", rate, "<", limit, "broken_eos_frac", record.step),
        Check("its fall from the reference's, standard errors", fall, ">", thresholds.broken_eos_z, "broken_eos_z",
              record.step),
    )


def _worse_than_uniform(history: TrialHistory, thresholds: Thresholds) -> Sign:
    """The chosen texts are less likely than words drawn blindly; a weak reference is close to that by itself."""
    known = _with_chosen(history)
    if history.vocabulary is None or not known:
        return Sign()
    uniform = -math.log(history.vocabulary)

    def worse(record: EvaluationRecord) -> bool:
        room = record.chosen.reference_logp_per_token - uniform
        return record.chosen.logp_per_token < uniform and room > thresholds.broken_logp_room

    last = known[-1]
    value, room = last.chosen.logp_per_token, last.chosen.reference_logp_per_token - uniform
    checks = (
        Check("log-prob of the chosen, nats per token", value, "<", uniform, step=last.step),
        Check("the reference's, above uniform", room, ">", thresholds.broken_logp_room, "broken_logp_room", last.step),
    )
    evidence = f"chosen completions had {value:.3g} nats per token at step {last.step}, below uniform ({uniform:.3g})"
    return Sign(checks, _since(known, worse), evidence)


# -- memorised -------------------------------------------------------------------------------------


def memorised(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 3: the trained pairs are right, and no evaluation so far has shown a gain on held-out ones."""
    records = history.trained
    if not records:
        return reading("memorised", ())
    last, best = records[-1], max(records, key=lambda record: record.gain.gain)
    onset = _since(records, lambda r: r.probe_accuracy >= thresholds.memorised_accuracy)
    checks = (
        Check("train probe's accuracy", last.probe_accuracy, ">=", thresholds.memorised_accuracy,
              "memorised_accuracy", last.step),
        _learned_check("best gain so far, standard errors", best, "<=", thresholds),
    )
    evidence = (
        f"{last.probe_accuracy:.0%} of the train probe is right at step {last.step}, while the best gain on held-out "
        f"pairs was {_gain(best)} at step {best.step}"
    )
    return reading("memorised", (Sign(checks, onset if checks[1].met else None, evidence),))


# -- overfit, overconfident ------------------------------------------------------------------------


def overfit(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 4: per-pair select losses rise above those of the best evaluation while the train probe's fall.

    Each evaluation is read at its own calibration, so a mere growth of the margins is no overfitting. The
    onset is the best evaluation, the last good one; the rise is found at the second evaluation that shows it.
    While the latest samples are near the reference it is `mild_overfit` instead; without samples it always fires.
    Raises ValueError when two evaluations cover different numbers of pairs.
    """
    sign, moved = _overfit_sign(history, thresholds), _moved_check(history, thresholds)
    if moved is None:
        return reading("overfit", (sign,))
    return reading("overfit", (
        replace(sign, checks=(*sign.checks, moved), onset_step=sign.onset_step if moved.met else None),
    ))


def mild_overfit(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """The finding of rule 4 in a policy that still writes much as the reference does: pairs are lost, samples are not.

    IPO with a strong anchor does this: its margins reach their target by heart, and its samples hardly change.
    """
    sign, moved = _overfit_sign(history, thresholds), _moved_check(history, thresholds)
    if moved is None:
        return reading("mild_overfit", ())
    onset = None if moved.met else sign.onset_step
    return reading("mild_overfit", (replace(sign, checks=(*sign.checks, moved), onset_step=onset),))


def _overfit_sign(history: TrialHistory, thresholds: Thresholds) -> Sign:
    limit = partial(_plain_limit, thresholds.overfit_z)
    return _rise_sign(history.trained, _calibrated, _CALIBRATED, limit=limit, thresholds=thresholds)


def _moved_check(history: TrialHistory, thresholds: Thresholds) -> Check | None:
    """Whether the policy is far enough from the reference to be worse for it; None where the latest evaluation drew no
    samples: earlier ones tell how far it was, not how far it is."""
    if not history.trained or history.trained[-1].samples is None:
        return None
    last, limit = history.trained[-1], thresholds.overfit_drift_frac * thresholds.drift_limit_per_token
    kl = last.samples.kl_per_token
    return Check("KL on samples, nats per token", kl, ">=", limit, "overfit_drift_frac", last.step)


def overconfident(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """The same at the loss's own beta, which also sees margins that grow too large for what they know.

    Milder than overfit: the ranking may be as good as ever. For Bradley-Terry losses only. Corrected for the luck of
    the best evaluation: nobody calibrates away what margins of noise do here.
    """
    beta = history.beta
    if beta is None:
        return reading("overconfident", ())

    def at_own_beta(record: EvaluationRecord) -> tuple[np.ndarray, float]:
        losses = [calibrated_losses(margins, beta) for margins in (record.select_margins, record.probe_margins)]
        return losses[0], float(losses[1].mean())

    name = f"loss -log sigma({beta:g} x margin)"
    limit = partial(_limit_above_luck, thresholds.overfit_z)
    return reading("overconfident", (
        _rise_sign(history.trained, at_own_beta, name, limit=limit, thresholds=thresholds),
    ))


def _calibrated(record: EvaluationRecord) -> tuple[np.ndarray, float]:
    return calibrated_losses(record.select_margins, record.gain.scale), LN2 * (1 - record.probe_gain.gain)


def _rise_sign(
    records: Sequence[EvaluationRecord], fit: Fit, name: str, *, limit: Callable[[int], float], thresholds: Thresholds
) -> Sign:
    """`limit`: standard errors that the rise from the best of so many evaluations must exceed."""
    if not records:
        return Sign()
    wanted = thresholds.overfit_evaluations
    fits = [fit(record) for record in records]
    best = int(np.argmin([losses.mean() for losses, _ in fits]))
    (losses, probe), start = fits[best], records[best]
    run, longest, found, checks = 0, 0, (), ()
    # The probe is fitted better than at the best evaluation, or so well that better cannot be seen.
    fitted = max(probe, thresholds.fitted_nats)
    for compared, (record, (later_losses, later_probe)) in enumerate(zip(records, fits), start=1):
        if compared <= best + 1:
            continue
        rise = _paired(start, record, later_losses, losses)
        checks = (
            Check(f"rise of the select part's {name} since step {start.step}, standard errors", _z(rise), ">",
                  limit(compared), "overfit_z", record.step),
            Check(f"the train probe's, nats (against its own at step {start.step})", later_probe, "<", fitted,
                  "fitted_nats", record.step),
        )
        run = run + 1 if all(check.met for check in checks) else 0
        longest = max(longest, run)
        if run == wanted and not found:
            evidence = _rise_evidence(start, record, rise, name=name, values=(losses, probe, later_losses, later_probe))
            found = (start.step, evidence)
    counted = Check("evaluations in a row with both", longest, ">=", wanted, "overfit_evaluations")
    return Sign((*checks, counted), *found)


def _paired(best: EvaluationRecord, later: EvaluationRecord, after: np.ndarray, before: np.ndarray) -> ClusteredMean:
    """Mean rise of the select loss per pair, nats."""
    if len(before) != len(after):
        raise ValueError(f"steps {best.step} and {later.step} evaluated different pairs")
    return clustered_mean(after - before, later.groups)


def _rise_evidence(
    best: EvaluationRecord, later: EvaluationRecord, rise: ClusteredMean, *, name: str,
    values: tuple[np.ndarray, float, np.ndarray, float],
) -> str:
    losses, probe, later_losses, later_probe = values
    z = f"z = {_z(rise):.1f}" if rise.se > 0 else "the same for every pair"
    drift = "" if later.samples is None else f", {later.samples.kl_per_token:.3g} nats per token from the reference"
    if name == _CALIBRATED:
        shown = "gain fell", best.gain.gain, later.gain.gain, best.probe_gain.gain, later.probe_gain.gain
    else:
        shown = f"{name} rose", float(losses.mean()), float(later_losses.mean()), probe, later_probe
    what, before, after, probe_before, probe_after = shown
    return (
        f"{what} from {before:.4f} at step {best.step} to {after:.4f} at step {later.step} "
        f"({z} over {rise.n} pairs) while the train probe's went from {probe_before:.4f} "
        f"to {probe_after:.4f}; detected at step {later.step}{drift}"
    )


# -- over_optimised --------------------------------------------------------------------------------


def over_optimised(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 5: a scorer of the policy's own samples liked an earlier, nearer policy better, at two evaluations.

    Where nobody scores samples there is nothing to read. Win rates are against the reference and paired by prompt.
    """
    sampled = [record for record in history.trained if record.samples is not None]
    names = sorted({name for record in sampled for name in record.samples.scores})
    signs = [_win_rate_fell(name, sampled, history, thresholds=thresholds) for name in names]
    return reading("over_optimised", signs)


def _win_rate_fell(
    name: str, sampled: Sequence[EvaluationRecord], history: TrialHistory, *, thresholds: Thresholds
) -> Sign:
    scored = [record for record in sampled if name in record.samples.scores]
    wins = [record.samples.scores[name].wins for record in scored]
    peak = int(np.argmax([won.mean() for won in wins]))
    best, wanted = scored[peak], thresholds.over_optimised_evaluations
    run, longest, found, checks = 0, 0, (), ()
    for compared, (record, won) in enumerate(zip(scored[peak + 1 :], wins[peak + 1 :]), start=peak + 2):
        fall = clustered_mean(wins[peak] - won, None)
        limit = _limit_above_luck(thresholds.over_optimised_z, compared)
        checks = (
            Check(f"fall of the {name} win rate since step {best.step}, the luckiest of {compared}, standard errors",
                  _z(fall), ">", limit, "over_optimised_z", record.step),
            Check("KL on samples, nats per completion", record.samples.kl, ">", best.samples.kl, step=record.step),
        )
        run = run + 1 if all(check.met for check in checks) else 0
        longest = max(longest, run)
        if run == wanted and not found:
            found = (best.step, _fall_evidence(name, best, record, fall=fall, per_epoch=history.steps_per_epoch))
    counted = Check("sampled evaluations in a row with both", longest, ">=", wanted, "over_optimised_evaluations")
    return Sign((*checks, counted), *found)


def _fall_evidence(
    name: str, best: EvaluationRecord, later: EvaluationRecord, *, fall: ClusteredMean, per_epoch: float | None
) -> str:
    before, after = (float(record.samples.scores[name].wins.mean()) for record in (best, later))
    epochs = f", epoch {best.step / per_epoch:.2g}" if per_epoch else ""
    z = f"z = {_z(fall):.1f}" if fall.se > 0 else "the same for every prompt"
    return (
        f"the {name} win rate fell from {before:.3f} at step {best.step} ({best.samples.kl:.3g} nats from the "
        f"reference{epochs}) to {after:.3f} at step {later.step} ({later.samples.kl:.3g} nats; {z} over "
        f"{fall.n} prompts)"
    )


# -- collapsed_rejected, likelihood_displaced --------------------------------------------------------


def collapsed_rejected(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 6: the rejected completions of the train probe have all but vanished."""
    records, limit = history.evaluations, thresholds.collapsed_frac
    if not records:
        return reading("collapsed_rejected", ())
    last, onset = records[-1], _since(records, lambda r: r.probe_collapsed_frac >= limit)
    check = Check("share of the train probe's rejected completions that collapsed", last.probe_collapsed_frac, ">=",
                  limit, "collapsed_frac", last.step)
    now = f"{last.probe_collapsed_frac:.0%} of the train probe's rejected completions had collapsed at step {last.step}"
    return reading("collapsed_rejected", (Sign((check,), onset, f"{now}, {limit:.0%} or more since step {onset}"),))


def likelihood_displaced(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 7, the severe form: chosen completions lost much of their probability though they are what is preferred.

    Mild displacement, and either half a nat per chosen token is gone while the margin grew, or that much has left
    both completions of a pair.
    """
    known = _with_chosen(history)
    if not known:
        return reading("likelihood_displaced", ())
    first, last = history.evaluations[0], known[-1]
    checks = (*_displacement_checks(last, thresholds), *_severity_checks(last, first, thresholds))
    onset = _since(known, lambda r: _displaced(r, thresholds) and _severely(r, first, thresholds))
    return reading("likelihood_displaced", (Sign(checks, onset, _displacement_evidence(last)),))


def mild_displacement(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Chosen completions became less likely, which a reference tuned on the chosen texts makes expected."""
    known = _with_chosen(history)
    if not known:
        return reading("mild_displacement", ())
    first, last = history.evaluations[0], known[-1]
    mild = None if _severely(last, first, thresholds) else _since(known, lambda r: _displaced(r, thresholds))
    sign = Sign(_displacement_checks(last, thresholds), mild, _displacement_evidence(last))
    return reading("mild_displacement", (sign,))


def _with_chosen(history: TrialHistory) -> list[EvaluationRecord]:
    return [record for record in history.trained if record.chosen is not None]


def _displaced(record: EvaluationRecord, thresholds: Thresholds) -> bool:
    return all(check.met for check in _displacement_checks(record, thresholds))


def _displacement_checks(record: EvaluationRecord, thresholds: Thresholds) -> tuple[Check, ...]:
    drift = clustered_mean(record.chosen.drift, record.groups)
    return (
        Check("drift of the chosen, standard errors", _z(drift), "<", -thresholds.displaced_z, "displaced_z",
              record.step),
        Check("share of the chosen that fell", record.chosen.down_frac, ">=", thresholds.displaced_frac,
              "displaced_frac", record.step),
    )


def _severely(record: EvaluationRecord, first: EvaluationRecord, thresholds: Thresholds) -> bool:
    fell, grew, leaked = _severity_checks(record, first, thresholds)
    return (fell.met and grew.met) or leaked.met


def _severity_checks(
    record: EvaluationRecord, first: EvaluationRecord, thresholds: Thresholds
) -> tuple[Check, Check, Check]:
    grown = float(record.select_margins.mean() - first.select_margins.mean())
    return (
        Check("drift of the chosen, nats per token", record.chosen.drift_per_token, "<",
              -thresholds.displaced_nats_per_token, "displaced_nats_per_token", record.step),
        Check("growth of the margin since the start", grown, ">", 0.0, step=record.step),
        Check("leak out of both completions, nats per token (alone enough)", record.chosen.leak_per_token, ">",
              thresholds.displaced_leak_per_token, "displaced_leak_per_token", record.step),
    )


def _displacement_evidence(record: EvaluationRecord) -> str:
    chosen: ChosenRecord = record.chosen
    return (
        f"{chosen.down_frac:.0%} of the chosen completions were less likely than under the reference at step "
        f"{record.step}, by {-chosen.drift_per_token:.3g} nats per token on average; {chosen.leak_per_token:.3g} "
        "nats per token left both completions of a pair"
    )


# -- underfit, healthy, drift ------------------------------------------------------------------------


def underfit(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """Rule 8: half of the budget is spent, and either nothing is learned or the policy has hardly moved.

    The second, because the gain is blind to size: the first steps of a tiny learning rate already point the right
    way. A loss near its start is no sign of it: DPO at beta .01 had .97 of its first loss with margins of 5 nats.
    """
    if not history.trained or not history.budget_steps:
        return reading("underfit", ())
    last = history.trained[-1]

    def unmoved(record: EvaluationRecord) -> bool:
        spent, gained, probe, still = _underfit_checks(record, history, thresholds)
        return spent.met and ((gained.met and probe.met) or still.met)

    checks, onset = _underfit_checks(last, history, thresholds), _since(history.trained, unmoved)
    far = _latest_measure(last, history)
    moved = f", {far.moved_by} {far.moved_per_token:.2g} nats per token" if far.moved_per_token is not None else ""
    evidence = (
        f"gain {_gain(last)} at step {last.step} of {history.budget_steps}, the train probe's "
        f"{last.probe_gain.gain:.4f}{moved}{_backwards(last, thresholds)}"
    )
    return reading("underfit", (Sign(checks, onset, evidence),))


def _latest_measure(record: EvaluationRecord, history: TrialHistory) -> EvaluationRecord:
    """The latest evaluation up to this one that drew samples; itself where none did."""
    sampled = [r for r in history.trained if r.samples is not None and r.step <= record.step]
    return sampled[-1] if sampled else record


def _backwards(record: EvaluationRecord, thresholds: Thresholds) -> str:
    """Another cure than more training is needed where the pairs it trains on are ranked the wrong way round."""
    accuracy, pairs = record.probe_accuracy, len(record.probe_margins)
    if accuracy >= 0.5 - thresholds.learned_z * 0.5 / math.sqrt(pairs):
        return ""
    return f"; it ranks the trained pairs backwards ({accuracy:.0%} right): are chosen and rejected swapped?"


def _underfit_checks(record: EvaluationRecord, history: TrialHistory, thresholds: Thresholds) -> tuple[Check, ...]:
    """The first, and either the next two or the last."""
    far = _latest_measure(record, history)
    return (
        Check("share of the budget", record.step / history.budget_steps, ">=", thresholds.underfit_budget_frac,
              "underfit_budget_frac", record.step),
        _learned_check("gain, standard errors", record, "<=", thresholds),
        Check("train probe's gain", record.probe_gain.gain, "<", thresholds.underfit_probe_gain,
              "underfit_probe_gain", record.step),
        Check(f"{far.moved_by}, nats per token (with the budget alone enough)", far.moved_per_token, "<",
              thresholds.underfit_kl_per_token, "underfit_kl_per_token", far.step),
    )


def learned(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """The condition of rule 9: at the latest evaluation the gain is above its error."""
    if not history.trained:
        return reading("healthy", ())
    last = history.trained[-1]
    onset = _since(history.trained, lambda r: _learned_check("", r, ">", thresholds).met)
    check = _learned_check("gain, standard errors", last, ">", thresholds)
    evidence = f"gain {_gain(last)} at step {last.step}, more than {thresholds.learned_z:g} standard errors above zero"
    return reading("healthy", (Sign((check,), onset, evidence),))


def drift_limit(history: TrialHistory, thresholds: Thresholds) -> Reading:
    """The policy is further from the reference than wanted; a flag beside any headline.

    By the latest samples, or by the pairs in a trial that draws none.
    """
    sampled = [record for record in history.evaluations if record.samples is not None]
    measured = sampled or [record for record in history.evaluations if record.moved_per_token is not None]
    if not measured:
        return reading("drift_limit", ())
    last, limit = measured[-1], thresholds.drift_limit_per_token
    value, onset = last.moved_per_token, _since(measured, lambda r: drift_exceeded(r.moved_per_token, limit))
    check = Check(f"{last.moved_by}, nats per token", value, ">", limit, "drift_limit_per_token", last.step)
    evidence = f"{last.moved_by} was {value:.3g} nats per token at step {last.step}, over {limit:g}"
    return reading("drift_limit", (Sign((check,), onset, evidence),))


def drift_exceeded(kl_per_token: float, limit: float) -> bool:
    """Whether the policy's own samples are further from the reference than `limit`, both nats per token.

    A NaN counts as exceeded.
    """
    return not kl_per_token <= limit


def _learned_check(name: str, record: EvaluationRecord, sign: str, thresholds: Thresholds) -> Check:
    errors = _in_errors(record.gain.gain, record.gain.se)
    return Check(name, errors, sign, thresholds.learned_z, "learned_z", record.step)


def _gain(record: EvaluationRecord) -> str:
    return f"{record.gain.gain:.4f} with standard error {record.gain.se:.4f}"


# -- of all rules ------------------------------------------------------------------------------------


def _since(records: Iterable[EvaluationRecord], holds: Callable[[EvaluationRecord], bool]) -> int | None:
    """Where the unbroken run of evaluations that reaches the latest one began; None when it does not hold there."""
    onset = None
    for record in records:
        if not holds(record):
            onset = None
        elif onset is None:
            onset = record.step
    return onset


def _plain_limit(errors: float, compared: int) -> float:
    return errors


def _limit_above_luck(errors: float, compared: int) -> float:
    """`errors`, and by how many errors a difference from the best of `compared` equal values is too large.

    That is the expected largest of so many normal numbers (Blom 1958), over the error of a difference. Without it one
    in six unchanging policies was over-optimised after 16 evaluations.
    """
    return errors + NormalDist().inv_cdf((compared - 0.375) / (compared + 0.25)) / math.sqrt(2)


def _z(mean: ClusteredMean) -> float:
    return _in_errors(mean.mean, mean.se)


def _in_errors(value: float, se: float) -> float:
    """In standard errors; where there is no spread, infinity with the value's sign."""
    if se > 0:
        return value / se
    return math.copysign(math.inf, value) if value else 0.0

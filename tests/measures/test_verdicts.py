"""Verdicts on synthetic histories: each rule fires where it should, when it should, and nowhere else."""

import math
import time
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest

from prefopt_ray.measures.verdicts import (
    EvaluationRecord,
    StepRecord,
    Thresholds,
    TrialHistory,
    drift_exceeded,
    judge,
)

PAIRS, PROBES = 512, 256


def steps_from(
    loss_norms: list[float], grad_norms: list[float] | None = None, *, start: float = 0.69
) -> list[StepRecord]:
    """Steps 1, 2, ... with the given loss / L0 and gradient norms (one when not given)."""
    grads = grad_norms or [1.0] * len(loss_norms)
    return [
        StepRecord(i + 1, norm * start, norm, grad, math.isfinite(norm) and math.isfinite(grad))
        for i, (norm, grad) in enumerate(zip(loss_norms, grads, strict=True))
    ]


def evaluation(step: int, *, effect: float = 0.4, noise: float = 0.0, probe: float = 1.0, **more) -> EvaluationRecord:
    """Margins that share their pairs' difficulty between evaluations; `noise` is what memorising adds, sd."""
    pair, probe_pair = np.random.default_rng(0).normal(size=PAIRS), np.random.default_rng(1).normal(size=PROBES)
    memorised = np.random.default_rng([2, step]).normal(size=PAIRS)
    return EvaluationRecord(
        step=step,
        select_margins=effect + pair + noise * memorised,
        groups=np.arange(PAIRS) // 2,
        probe_margins=probe + probe_pair,
        **{"probe_collapsed_frac": 0.0} | more,
    )


def start() -> EvaluationRecord:
    return EvaluationRecord(0, np.zeros(PAIRS), None, np.zeros(PROBES), 0.0)


def history(
    *,
    steps: Sequence[StepRecord] = (),
    evaluations: Sequence[EvaluationRecord] = (),
    loss: str = "sigmoid",
    warmup_steps: int = 0,
) -> TrialHistory:
    return TrialHistory(loss, warmup_steps, steps, evaluations)


# -- healthy and inconclusive


def test_a_trial_that_learned_is_healthy():
    verdict = judge(history(steps=steps_from([1.0, 0.9, 0.8] * 30), evaluations=[start(), evaluation(90)]))
    assert (verdict.headline, verdict.flags, verdict.onset_step) == ("healthy", (), None)
    assert "at step 90" in verdict.evidence


def test_a_loss_near_its_start_does_not_make_a_trial_unlearned():
    """DPO at beta .01 had .97 of its first loss with margins of 5 nats."""
    tiny_beta = evaluation(100, probe_loss_norm=0.97)
    assert judge(history(steps=steps_from([0.97] * 100), evaluations=[start(), tiny_beta])).headline == "healthy"


@pytest.mark.parametrize("evaluations", [[], [start()]])
def test_before_the_first_evaluation_after_a_step_nothing_is_known(evaluations: list[EvaluationRecord]):
    verdict = judge(history(evaluations=evaluations))
    assert (verdict.headline, verdict.flags) == ("inconclusive", ())
    assert "not evaluated" in verdict.evidence


def test_a_gain_within_two_errors_of_zero_is_no_evidence_of_learning():
    verdict = judge(history(evaluations=[start(), evaluation(20, effect=0.0)]))
    assert verdict.headline == "inconclusive" and "no evidence of learning" in verdict.evidence


# -- diverged


def test_a_step_that_is_not_finite_diverges_there():
    for at, bad in ((4, math.nan), (2, math.inf)):
        verdict = judge(history(steps=steps_from([1.0] * (at - 1) + [bad]), evaluations=[start()]))
        assert (verdict.headline, verdict.onset_step) == ("diverged", at)
        assert f"step {at}" in verdict.evidence
    silent = [*steps_from([1.0]), StepRecord(2, 0.6, 0.9, 1.0, finite=False)]  # a log-prob, not the loss
    assert judge(history(steps=silent)).onset_step == 2


def test_an_evaluation_with_a_margin_that_is_not_finite_diverges():
    broken = evaluation(40)
    broken.select_margins[3] = math.nan
    verdict = judge(history(evaluations=[start(), evaluation(20), broken]))
    assert (verdict.headline, verdict.onset_step) == ("diverged", 40)


def ipo_under_sgd(lr: float, *, steps: int) -> list[StepRecord]:
    """One certain pair of two free logits, target 5: the margin's error is multiplied by 1 - 4 lr each step."""
    errors = [-5.0 * (1 - 4 * lr) ** k for k in range(steps)]
    return steps_from([(e / 5) ** 2 for e in errors], [2 * math.sqrt(2) * abs(e) for e in errors], start=25.0)


def test_ipo_with_a_learning_rate_far_too_large_is_found_within_ten_steps():
    verdict = judge(history(steps=ipo_under_sgd(10.0, steps=10), loss="ipo_sum"))
    assert verdict.headline == "diverged" and "gradient norm" in verdict.evidence


def test_ipo_just_beyond_its_stability_limit_is_found_by_its_loss():
    verdict = judge(history(steps=ipo_under_sgd(0.55, steps=60), loss="ipo_sum"))
    assert verdict.headline == "diverged" and "smoothed loss" in verdict.evidence
    assert judge(history(steps=ipo_under_sgd(0.49, steps=200), loss="ipo_sum")).headline == "inconclusive"


def test_a_loss_that_sits_below_twice_its_start_and_recovers_is_fine():
    recovering = [1.0] + [1.7] * 10 + [1.6] * 10 + [0.8] * 60
    assert "diverged" not in judge(history(steps=steps_from(recovering))).flags


def test_a_loss_over_twice_its_start_diverges_after_twenty_steps_and_not_before():
    high = [1.0] + [50.0] * 20  # the average passes 2 at the first of them
    assert judge(history(steps=steps_from(high[:-1]))).flags == ()
    verdict = judge(history(steps=steps_from(high)))
    assert (verdict.headline, verdict.onset_step) == ("diverged", 2)


def test_a_loss_that_returns_below_the_limit_starts_its_count_again():
    burst = [45.0] + [0.0] * 60  # the average stays over 2 for sixteen steps
    assert judge(history(steps=steps_from([1.0] + burst * 4))).flags == ()


def test_a_loss_that_is_high_only_in_warm_up_does_not_count():
    high = steps_from([50.0] * 20 + [1.0] * 120)
    assert judge(history(steps=high)).headline == "diverged"
    assert judge(history(steps=high, warmup_steps=120)).flags == ()


def test_the_probes_loss_over_twice_its_start_at_two_evaluations_diverges():
    once = [start(), evaluation(20, probe_loss_norm=3.0), evaluation(40, probe_loss_norm=1.0)]
    assert "diverged" not in judge(history(evaluations=once)).flags
    twice = [*once, evaluation(60, probe_loss_norm=3.0), evaluation(80, probe_loss_norm=4.0)]
    verdict = judge(history(evaluations=twice))
    assert (verdict.headline, verdict.onset_step) == ("diverged", 60)


def test_one_odd_gradient_is_forgiven_and_three_in_fifty_steps_are_not():
    calm = [1.0] * 100
    for spikes, found in (([50], False), ([50, 60], False), ([50, 70, 90], True), ([10, 50, 90], False)):
        grads = [5000.0 if i in spikes else norm for i, norm in enumerate(calm)]
        verdict = judge(history(steps=steps_from(calm, grads)))
        assert (verdict.headline == "diverged") == found
        assert verdict.onset_step == (51 if found else None)


def test_pairs_that_pull_again_after_convergence_are_not_a_divergence():
    converged = [10.0] * 30 + [1e-6] * 300
    grads = [2.0 if i in (310, 320, 325) else norm for i, norm in enumerate(converged)]
    assert judge(history(steps=steps_from([0.5] * 330, grads))).flags == ()
    satisfied = [1.0] * 30 + [0.0] * 300  # hinge: exactly zero once every pair is satisfied
    grads = [2.0 if i in (310, 320, 325) else norm for i, norm in enumerate(satisfied)]
    assert judge(history(steps=steps_from([0.1] * 330, grads), loss="hinge")).flags == ()


def test_robust_dpo_running_to_minus_infinity_diverges_and_a_bounded_loss_is_not_asked():
    falling = [1.0 - 0.1 * i for i in range(60)]
    assert judge(history(steps=steps_from(falling), loss="robust")).headline == "diverged"
    assert judge(history(steps=steps_from(falling), loss="sigmoid")).flags == ()


def test_the_earliest_sign_of_divergence_is_the_onset():
    verdict = judge(history(steps=steps_from([1.0] + [50.0] * 30 + [math.nan])))
    assert verdict.onset_step == 2


# -- overfit


def overfitting() -> list[EvaluationRecord]:
    """Gain rises to step 100, then memorising adds noise on select while the probe is fitted ever better."""
    rising = [evaluation(20 * k, effect=0.1 * k, probe=0.3 * k) for k in range(1, 6)]
    falling = [evaluation(100 + 20 * k, effect=0.5, noise=0.6 * k, probe=1.5 + 0.3 * k) for k in range(1, 6)]
    return [start(), *rising, *falling]


def test_overfit_begins_at_the_best_evaluation_and_is_found_at_the_second_rise():
    verdict = judge(history(evaluations=overfitting()))
    assert (verdict.headline, verdict.onset_step, verdict.flags) == ("overfit", 100, ("overfit",))
    assert "detected at step 140" in verdict.evidence and "step 100" in verdict.evidence and "z = " in verdict.evidence


def test_judged_at_its_best_step_the_same_trial_is_healthy():
    whole = history(evaluations=overfitting(), steps=steps_from([0.9] * 200))
    assert judge(whole.until(100)).headline == "healthy"
    assert judge(whole.until(120)).headline == "healthy"  # one rise is not enough
    assert judge(whole.until(140)).headline == "overfit"
    assert len(whole.until(120).steps) == 120


def test_a_rise_on_select_without_a_better_fit_of_the_probe_is_not_overfitting():
    noise = np.random.default_rng(3).normal(size=PROBES)
    damaged = [replace(r, probe_margins=noise) if r.step > 100 else r for r in overfitting()]
    assert "overfit" not in judge(history(evaluations=damaged)).flags


def memorised() -> list[EvaluationRecord]:
    """Every probe pair has been won by far since the first evaluation."""
    return [replace(r, probe_margins=np.full(PROBES, 9.0)) for r in overfitting()[1:]]


def test_a_probe_already_fitted_completely_does_not_hide_overfitting():
    assert judge(history(evaluations=memorised())).headline == "overfit"


def test_copies_of_the_same_pairs_are_no_further_evidence_of_overfitting():
    """The rise at half the noise is within two errors of 512 pairs, but not of 4 x 512 when all count as new."""

    def copied(record: EvaluationRecord, *, groups: np.ndarray | None) -> EvaluationRecord:
        return replace(record, select_margins=np.tile(record.select_margins, 4), groups=groups)

    small = [replace(r, groups=None) for r in slightly_overfitting()]
    assert "overfit" not in judge(history(evaluations=small)).flags
    of_prompt = np.tile(np.arange(PAIRS), 4)
    assert "overfit" not in judge(history(evaluations=[copied(r, groups=of_prompt) for r in small])).flags
    assert "overfit" in judge(history(evaluations=[copied(r, groups=None) for r in small])).flags


def slightly_overfitting() -> list[EvaluationRecord]:
    later = [evaluation(100 + 20 * k, effect=0.5, noise=0.3, probe=1.5 + 0.3 * k) for k in range(1, 6)]
    return [evaluation(100, effect=0.5, probe=1.5), *later]


def test_growing_margins_alone_are_not_overfitting():
    growing = [replace(evaluation(20 * k), select_margins=5.0**k * evaluation(20).select_margins) for k in range(1, 8)]
    assert judge(history(evaluations=growing)).headline == "healthy"


def test_noise_of_the_evaluation_is_not_overfitting():
    found = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        pair, probe = 0.4 + rng.normal(size=PAIRS), rng.normal(size=PROBES)
        flat = [
            EvaluationRecord(20 * k, pair + 0.3 * rng.normal(size=PAIRS), None, 1 + 0.1 * k + probe, 0.0)
            for k in range(1, 9)
        ]
        found += "overfit" in judge(history(evaluations=flat)).flags
    assert found <= 4


def test_the_evaluation_before_training_is_never_the_best_one():
    """A reference-free loss has a gain before the first step, but nobody can stop there."""
    good_start = replace(evaluation(0, effect=0.8), probe_margins=np.zeros(PROBES))
    later = [evaluation(20 * k, effect=0.4, probe=1.0 + 0.1 * k) for k in range(1, 5)]
    assert judge(history(evaluations=[good_start, *later], loss="simpo")).headline == "healthy"


def test_an_overfit_trial_whose_select_loss_explodes_has_not_diverged():
    large = [replace(r, select_margins=100 * r.select_margins, probe_loss_norm=0.2) for r in overfitting()]
    assert judge(history(evaluations=large, steps=steps_from([0.3] * 200))).flags == ("overfit",)


def test_evaluations_of_different_pairs_are_refused():
    other = replace(evaluation(40, effect=0.1), select_margins=np.ones(7) * [1, -1, 1, 1, -1, 1, -1], groups=None)
    with pytest.raises(ValueError, match="different pairs"):
        judge(history(evaluations=[evaluation(20), other]))


# -- collapsed_rejected, drift, precedence


def test_rejected_completions_collapse_at_the_evaluation_that_passes_one_half():
    fractions = {40: 0.12, 80: 0.46, 120: 0.87}
    records = [evaluation(step, probe_collapsed_frac=fraction) for step, fraction in fractions.items()]
    verdict = judge(history(evaluations=[start(), *records]))
    assert (verdict.headline, verdict.onset_step) == ("collapsed_rejected", 120)
    assert "87%" in verdict.evidence


def test_a_collapse_that_was_undone_is_no_verdict_and_a_new_one_has_a_new_onset():
    fractions = [0.6, 0.2, 0.5, 0.9]
    records = [evaluation(20 * (i + 1), probe_collapsed_frac=f) for i, f in enumerate(fractions)]
    assert judge(history(evaluations=records[:2])).headline == "healthy"
    assert judge(history(evaluations=records)).onset_step == 60


def test_all_rules_that_fire_are_flags_and_the_first_is_the_headline():
    collapsing = [replace(r, probe_collapsed_frac=0.9 if r.step >= 120 else 0.1) for r in overfitting()]
    verdict = judge(history(evaluations=collapsing))
    assert (verdict.headline, verdict.flags) == ("overfit", ("overfit", "collapsed_rejected"))
    everything = [replace(r, kl_per_token=0.8) for r in collapsing]
    verdict = judge(history(evaluations=everything, steps=steps_from([1.0, math.nan])))
    assert verdict.headline == "diverged"
    assert verdict.flags == ("diverged", "overfit", "collapsed_rejected", "drift_limit")


def test_drift_is_flagged_by_the_latest_samples_and_leaves_the_headline():
    far = [evaluation(20, kl_per_token=0.1), evaluation(40, kl_per_token=0.31), evaluation(60)]
    verdict = judge(history(evaluations=far))
    assert (verdict.headline, verdict.flags) == ("healthy", ("drift_limit",))
    assert judge(history(evaluations=far), Thresholds(drift_limit_per_token=0.5)).flags == ()
    assert judge(history(evaluations=[*far, evaluation(80, kl_per_token=0.2)])).flags == ()


def test_a_drift_that_is_not_a_number_counts_as_exceeded():
    assert drift_exceeded(math.nan, 0.3) and drift_exceeded(0.4, 0.3) and not drift_exceeded(0.3, 0.3)


def spiky(*at: int) -> TrialHistory:
    return history(steps=steps_from([1.0] * 100, [5000.0 if i in at else 1.0 for i in range(100)]))


# For each threshold: another value of it, and a history on which that changes the verdict.
CHANGES = {
    "loss_norm_limit": (100.0, history(steps=steps_from([1.0] + [50.0] * 20))),
    "loss_ema_decay": (0.99999, history(steps=steps_from([1.0] + [50.0] * 20))),
    "loss_steps": (21, history(steps=steps_from([1.0] + [50.0] * 20))),
    "loss_evaluations": (3, history(evaluations=[evaluation(step, probe_loss_norm=3.0) for step in (20, 40)])),
    "grad_spike_ratio": (6000.0, spiky(50, 60, 70)),
    "grad_median_steps": (2, spiky(50, 51, 52)),
    "grad_start_steps": (80, history(steps=steps_from([1.0] * 100, [9.0] * 30 + [1e-6] * 60 + [5.0] * 3 + [1e-6] * 7))),
    "grad_spikes": (4, spiky(50, 60, 70)),
    "grad_spike_steps": (10, spiky(50, 60, 70)),
    "unbounded_loss_norm": (-99.0, history(steps=steps_from([1.0] + [-50.0] * 9), loss="robust")),
    "overfit_z": (50.0, history(evaluations=overfitting())),
    "overfit_evaluations": (6, history(evaluations=overfitting())),
    "fitted_nats": (0.0, history(evaluations=memorised())),
    "collapsed_frac": (0.9, history(evaluations=[evaluation(20, probe_collapsed_frac=0.8)])),
    "learned_z": (50.0, history(evaluations=[evaluation(20)])),
    "drift_limit_per_token": (0.9, history(evaluations=[evaluation(20, kl_per_token=0.5)])),
}


def test_every_threshold_is_read():
    assert set(CHANGES) == {field.name for field in fields(Thresholds)}
    for name, (value, trial) in CHANGES.items():
        before, after = judge(trial), judge(trial, Thresholds(**{name: value}))
        assert (before.headline, before.flags) != (after.headline, after.flags), name


def test_judging_a_long_trial_again_and_again_is_cheap():
    noisy = np.random.default_rng(0).uniform(0.5, 1.0, size=5000).tolist()
    long = history(steps=steps_from(noisy, noisy), evaluations=overfitting())
    judge(long)  # gains are computed once per evaluation and kept
    began = time.perf_counter()
    judge(long)
    assert time.perf_counter() - began < 0.5

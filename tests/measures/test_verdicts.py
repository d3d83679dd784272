"""Verdicts on synthetic histories: each rule fires where it should, when it should, and nowhere else."""

import math
import time
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest

from prefopt_ray.measures.verdicts import (
    ChosenRecord,
    EvaluationRecord,
    Reading,
    SampleRecord,
    Scores,
    StepRecord,
    Thresholds,
    TrialHistory,
    drift_exceeded,
    judge,
    read_rules,
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


def samples(kl_per_token: float = 0.1, **more) -> SampleRecord:
    """256 completions of ten tokens, as good as the reference's in every respect unless `more` says otherwise."""
    usual = {"count": 256, "kl": 10 * kl_per_token, "unique_frac": 1.0, "eos_rate": 1.0}
    return SampleRecord(kl_per_token=kl_per_token, **usual | more)


def start() -> EvaluationRecord:
    return EvaluationRecord(0, np.zeros(PAIRS), None, np.zeros(PROBES), 0.0)


def history(
    *,
    steps: Sequence[StepRecord] = (),
    evaluations: Sequence[EvaluationRecord] = (),
    loss: str = "sigmoid",
    warmup_steps: int = 0,
    **known: float,
) -> TrialHistory:
    return TrialHistory(loss, warmup_steps, steps, evaluations, **known)


def reading(rule: str, trial: TrialHistory, **thresholds: float) -> Reading:
    return next(found for found in read_rules(trial, Thresholds(**thresholds)) if found.rule == rule)


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


@pytest.mark.parametrize(("last_kl", "headline", "flags"), [
    (0.119, "healthy", ("mild_overfit",)),  # the limit is 0.4 of the drift limit of 0.3
    (0.121, "overfit", ("overfit",)),
])
def test_overfit_is_mild_while_the_latest_samples_are_near_the_reference(last_kl: float, headline: str, flags: tuple):
    sampled = [replace(record, samples=samples(0.2)) for record in overfitting()[1:-1]]
    last = replace(overfitting()[-1], samples=samples(last_kl))
    verdict = judge(history(evaluations=[start(), *sampled, last]))
    assert (verdict.headline, verdict.flags) == (headline, flags)


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


# -- overconfident


def growing_margins() -> list[EvaluationRecord]:
    """The same ranking all along, said ever louder."""
    select, probe = evaluation(20, effect=0.8).select_margins, np.full(PROBES, 0.3)
    return [
        replace(evaluation(20 * k), select_margins=3.0**k * select, probe_margins=3.0**k * probe) for k in range(1, 6)
    ]


def test_margins_that_outgrow_what_they_know_are_overconfident_but_healthy():
    verdict = judge(history(evaluations=growing_margins(), beta=0.5))
    assert (verdict.headline, verdict.flags) == ("healthy", ("overconfident",))
    assert judge(history(evaluations=growing_margins())).flags == (), "no likelihood, no overconfidence"
    assert judge(history(evaluations=growing_margins(), beta=1e-4)).flags == (), "far below certainty"


def test_overfitting_is_overconfident_too():
    verdict = judge(history(evaluations=overfitting(), beta=1.0))
    assert (verdict.headline, verdict.flags) == ("overfit", ("overfit", "overconfident"))
    assert "-log sigma(1 x margin)" in reading("overconfident", history(evaluations=overfitting(), beta=1.0)).evidence


# -- broken


def broken_ways() -> dict[str, tuple[list[EvaluationRecord], str]]:
    """For each way to be broken: an evaluation before it, the one that shows it, and a word of its evidence."""
    chosen = chosen_record(logp_per_token=-4.0)
    return {
        "repeats": (evaluation(40, samples=samples(unique_frac=0.4)), "40% of 256 samples were distinct"),
        "far": (evaluation(40, samples=samples(2.5)), "2.5 nats per token"),
        "endless": (evaluation(40, samples=samples(eos_rate=0.4)), "40% of the samples ended"),
        "babble": (evaluation(40, chosen=chosen), "below uniform (-3)"),
    }


def chosen_record(drift: float = 0.1, **more) -> ChosenRecord:
    """Chosen completions of ten tokens that drifted by `drift` nats each, give or take one."""
    values = drift + np.random.default_rng(5).normal(size=PAIRS)
    usual = {"leak_per_token": 0.0, "logp_per_token": -0.9, "reference_logp_per_token": -0.9}
    return ChosenRecord(drift=values, drift_per_token=drift / 10, **usual | more)


E3 = round(math.exp(3))  # a vocabulary of about 3 nats


@pytest.mark.parametrize("way", broken_ways())
def test_each_way_to_be_broken_is_found_at_its_evaluation(way: str):
    record, words = broken_ways()[way]
    verdict = judge(history(evaluations=[start(), evaluation(20, samples=samples()), record], vocabulary=E3))
    assert (verdict.headline, verdict.onset_step) == ("broken", 40)
    assert words in verdict.evidence


def test_samples_as_poor_as_the_references_own_are_not_broken():
    """One-word answers, or a token limit that cuts every sample."""
    short = samples(unique_frac=0.2, reference_unique_frac=0.25)
    cut = samples(eos_rate=0.0, reference_eos_rate=0.0)
    assert judge(history(evaluations=[evaluation(20, samples=short), evaluation(40, samples=cut)])).flags == ()


def test_a_rare_ending_that_halves_by_chance_is_not_broken():
    few = samples(count=64, eos_rate=0.03, reference_eos_rate=0.08)
    assert judge(history(evaluations=[evaluation(20, samples=few)])).flags == ()


def test_a_reference_near_uniform_says_nothing_about_a_policy_below_it():
    weak = chosen_record(logp_per_token=-4.0, reference_logp_per_token=-2.0)
    assert judge(history(evaluations=[evaluation(20, chosen=weak)], vocabulary=E3)).flags == ()


def test_a_policy_that_recovered_is_no_longer_broken():
    recovered = [evaluation(20, samples=samples(2.5)), evaluation(40, samples=samples(0.2))]
    assert judge(history(evaluations=recovered)).headline == "healthy"
    assert judge(history(evaluations=recovered).until(20)).headline == "broken"


# -- memorised


def test_a_fitted_probe_without_any_gain_is_memorised():
    probes = {20: 0.5, 40: 2.0, 60: 3.0}
    fitted = [evaluation(step, effect=0.0, probe=probe) for step, probe in probes.items()]
    verdict = judge(history(evaluations=[start(), *fitted]))
    assert (verdict.headline, verdict.onset_step) == ("memorised", 40)
    assert "train probe is right" in verdict.evidence and "best gain" in verdict.evidence


def test_a_gain_shown_once_is_enough_not_to_be_memorised():
    once = [evaluation(20, effect=0.4, probe=1.0), evaluation(40, effect=0.0, probe=3.0)]
    assert "memorised" not in judge(history(evaluations=once)).flags


# -- over_optimised


def sampled(step: int, quality: float, kl: float, *, scorer: str = "gold") -> EvaluationRecord:
    """Rewards that share their prompts' luck between evaluations."""
    luck = np.random.default_rng(7).normal(size=256)
    own = np.random.default_rng([8, step]).normal(size=256)
    scores = {scorer: Scores(quality + luck + 0.3 * own, np.random.default_rng(9).normal(size=256))}
    return evaluation(step, samples=samples(kl / 10, kl=kl, scores=scores))


def test_a_win_rate_that_falls_while_the_policy_moves_on_is_over_optimised():
    course = {10: (0.3, 0.7), 40: (1.0, 2.0), 80: (0.9, 4.6), 160: (-0.2, 9.4), 320: (-1.0, 14.5)}
    records = [sampled(step, *point) for step, point in course.items()]
    trial = history(evaluations=records, steps_per_epoch=16)
    verdict = judge(trial)
    assert (verdict.headline, verdict.onset_step) == ("over_optimised", 40)
    assert "at step 40 (2 nats from the reference, epoch 2.5)" in verdict.evidence
    assert judge(trial.until(160)).headline == "healthy", "one fall is not enough"


def test_a_win_rate_that_falls_on_the_way_back_to_the_reference_is_not_over_optimised():
    records = [sampled(40, 1.0, 8.0), sampled(80, 0.0, 3.0), sampled(160, -0.5, 2.0)]
    assert judge(history(evaluations=records)).flags == ()


def test_without_a_scorer_nothing_is_over_optimised():
    silent = [evaluation(step, samples=samples(step / 100)) for step in (10, 20, 30)]
    assert reading("over_optimised", history(evaluations=silent)).checks == ()


# -- likelihood_displaced


def test_chosen_completions_that_fell_a_little_are_a_remark_on_a_healthy_trial():
    fell = evaluation(40, chosen=chosen_record(-3.0))
    verdict = judge(history(evaluations=[start(), evaluation(20, chosen=chosen_record(0.5)), fell]))
    assert (verdict.headline, verdict.flags) == ("healthy", ("mild_displacement",))


def test_half_a_nat_per_chosen_token_lost_while_the_margin_grew_is_displacement():
    lost = evaluation(40, chosen=chosen_record(-6.0))
    verdict = judge(history(evaluations=[start(), evaluation(20, chosen=chosen_record(-3.0)), lost]))
    assert (verdict.headline, verdict.onset_step) == ("likelihood_displaced", 40)
    assert verdict.flags == ("likelihood_displaced",), "not the mild form as well"
    assert "0.6 nats per token" in verdict.evidence
    shrunk = replace(lost, select_margins=-lost.select_margins)
    assert "likelihood_displaced" not in judge(history(evaluations=[start(), shrunk])).flags


def test_mass_that_left_both_completions_is_displacement_by_itself():
    leaked = evaluation(40, chosen=chosen_record(-3.0, leak_per_token=0.6))
    assert judge(history(evaluations=[start(), leaked])).headline == "likelihood_displaced"


def test_chosen_completions_that_gained_are_not_displaced_whatever_some_lost():
    mixed = evaluation(40, chosen=chosen_record(-0.5))  # about seven in ten fell
    assert judge(history(evaluations=[start(), mixed])).flags == ()


# -- underfit


def unmoved(step: int) -> EvaluationRecord:
    return evaluation(step, effect=0.0, probe=0.0, samples=samples(0.001))


def test_a_trial_that_has_not_moved_by_half_of_its_budget_is_underfit():
    trial = history(evaluations=[start(), unmoved(10), unmoved(50), unmoved(100)], budget_steps=100)
    verdict = judge(trial)
    assert (verdict.headline, verdict.onset_step) == ("underfit", 50)
    assert "step 100 of 100" in verdict.evidence and "0.001 nats per token" in verdict.evidence
    assert judge(trial.until(10)).headline == "inconclusive", "too early to say"


def test_a_policy_still_at_the_reference_is_underfit_whatever_its_gain():
    """The gain is blind to size: the first step of a tiny learning rate points the right way."""
    near = evaluation(100, effect=0.4, probe=0.4, samples=samples(0.001))
    assert judge(history(evaluations=[near], budget_steps=100)).headline == "underfit"
    unsampled = evaluation(100, effect=0.4, probe=0.4)
    assert judge(history(evaluations=[unsampled], budget_steps=100)).headline == "healthy"
    still = judge(history(evaluations=[replace(unsampled, pair_drift_per_token=0.001)], budget_steps=100))
    assert still.headline == "underfit" and "drift on pairs (no samples) 0.001" in still.evidence


def test_a_last_evaluation_without_samples_does_not_hide_that_nothing_moved():
    near, last = evaluation(60, effect=0.4, probe=0.4, samples=samples(0.001)), evaluation(100, effect=0.4, probe=0.4)
    assert judge(history(evaluations=[near, last], budget_steps=100)).headline == "underfit"


def test_pairs_ranked_backwards_are_said_to_be():
    inverted = evaluation(100, effect=-1.0, probe=-1.0, samples=samples(0.2))
    verdict = judge(history(evaluations=[inverted], budget_steps=100))
    assert verdict.headline == "underfit" and "ranks the trained pairs backwards" in verdict.evidence
    assert "backwards" not in judge(history(evaluations=[unmoved(100)], budget_steps=100)).evidence


def test_a_loss_whose_start_is_no_scale_does_not_diverge_by_being_large():
    def headline(loss: str) -> str:
        return judge(history(loss=loss, steps=steps_from([5.0] * 80), evaluations=[start()])).headline

    assert headline("sigmoid") == "diverged"
    assert headline("dpop") == headline("dpop+nll") == "inconclusive"


def test_a_policy_that_moved_and_fitted_its_pairs_is_not_underfit():
    moved = evaluation(100, effect=0.0, probe=1.0, samples=samples(0.2))
    assert judge(history(evaluations=[moved], budget_steps=100)).headline == "inconclusive"


# -- collapsed_rejected, drift, precedence


def test_rejected_completions_collapse_at_the_evaluation_that_passes_a_fifth():
    fractions = {40: 0.12, 80: 0.19, 120: 0.87}
    records = [evaluation(step, probe_collapsed_frac=fraction) for step, fraction in fractions.items()]
    verdict = judge(history(evaluations=[start(), *records]))
    assert (verdict.headline, verdict.onset_step) == ("collapsed_rejected", 120)
    assert "87%" in verdict.evidence


def test_a_collapse_that_was_undone_is_no_verdict_and_a_new_one_has_a_new_onset():
    fractions = [0.6, 0.1, 0.5, 0.9]
    records = [evaluation(20 * (i + 1), probe_collapsed_frac=f) for i, f in enumerate(fractions)]
    assert judge(history(evaluations=records[:2])).headline == "healthy"
    assert judge(history(evaluations=records)).onset_step == 60


def test_all_rules_that_fire_are_flags_and_the_first_is_the_headline():
    collapsing = [replace(r, probe_collapsed_frac=0.9 if r.step >= 120 else 0.1) for r in overfitting()]
    verdict = judge(history(evaluations=collapsing))
    assert (verdict.headline, verdict.flags) == ("overfit", ("overfit", "collapsed_rejected"))
    everything = [replace(r, samples=samples(0.8)) for r in collapsing]
    verdict = judge(history(evaluations=everything, steps=steps_from([1.0, math.nan])))
    assert verdict.headline == "diverged"
    assert verdict.flags == ("diverged", "overfit", "collapsed_rejected", "drift_limit")


def test_every_rule_is_read_and_exactly_what_fired_is_a_flag():
    order = [
        "diverged", "broken", "memorised", "overfit", "over_optimised", "collapsed_rejected", "likelihood_displaced",
        "underfit", "healthy", "mild_overfit", "overconfident", "mild_displacement", "drift_limit",
    ]
    for trial in (history(), *(trial for _, trial in CHANGES.values())):
        readings, verdict = read_rules(trial), judge(trial)
        assert [found.rule for found in readings] == order
        assert [found.rule for found in readings if found.fired and found.rule != "healthy"] == list(verdict.flags)
        assert all((found.onset_step is not None) for found in readings if found.fired)
        headline = next((found.rule for found in readings[:9] if found.fired), "inconclusive")
        assert verdict.headline == headline


def test_a_reading_shows_its_numbers_also_when_nothing_fired():
    trial = history(steps=steps_from([1.0, 0.9] * 30), evaluations=[start(), evaluation(60, samples=samples(0.1))])
    checks = {check.threshold: check for found in read_rules(trial) for check in found.checks}
    assert checks["broken_kl_per_token"].value == 0.1 and not checks["broken_kl_per_token"].met
    assert checks["loss_norm_limit"].limit == 2.0 and checks["loss_steps"].value == 0
    assert checks["collapsed_frac"].step == 60


def test_drift_is_flagged_by_the_latest_samples_and_leaves_the_headline():
    far = [evaluation(20, samples=samples(0.1)), evaluation(40, samples=samples(0.31)), evaluation(60)]
    verdict = judge(history(evaluations=far))
    assert (verdict.headline, verdict.flags) == ("healthy", ("drift_limit",))
    assert judge(history(evaluations=far), Thresholds(drift_limit_per_token=0.5)).flags == ()
    assert judge(history(evaluations=[*far, evaluation(80, samples=samples(0.2))])).flags == ()


def test_a_trial_without_samples_is_held_to_the_drift_limit_by_its_pairs():
    far = [replace(evaluation(step), pair_drift_per_token=drift) for step, drift in ((20, 0.2), (40, 0.4))]
    assert judge(history(evaluations=far)).flags == ("drift_limit",)
    sampled = replace(evaluation(60, samples=samples(0.1)), pair_drift_per_token=0.9)
    assert judge(history(evaluations=[*far, sampled])).flags == ()  # samples say it better


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
    "overfit_drift_frac": (0.1, history(evaluations=[replace(r, samples=samples(0.05)) for r in overfitting()])),
    "fitted_nats": (0.0, history(evaluations=memorised())),
    "broken_unique_frac": (0.3, history(evaluations=[evaluation(20, samples=samples(unique_frac=0.4))])),
    "broken_kl_per_token": (3.0, history(evaluations=[evaluation(20, samples=samples(2.5))])),
    "broken_logp_room": (
        3.0, history(evaluations=[evaluation(20, chosen=chosen_record(logp_per_token=-4.0))], vocabulary=E3)
    ),
    "broken_eos_frac": (0.3, history(evaluations=[evaluation(20, samples=samples(eos_rate=0.4))])),
    "broken_eos_z": (50.0, history(evaluations=[evaluation(20, samples=samples(eos_rate=0.4))])),
    "memorised_accuracy": (0.9999, history(evaluations=[evaluation(20, effect=0.0, probe=2.0)])),
    "over_optimised_z": (50.0, history(evaluations=[sampled(20 * k, 1.0 - k, 3.0 * k) for k in (1, 2, 3)])),
    "over_optimised_evaluations": (3, history(evaluations=[sampled(20 * k, 1.0 - k, 3.0 * k) for k in (1, 2, 3)])),
    "displaced_z": (200.0, history(evaluations=[start(), evaluation(20, chosen=chosen_record(-6.0))])),
    "displaced_frac": (0.9, history(evaluations=[start(), evaluation(20, chosen=chosen_record(-1.1))])),
    "displaced_nats_per_token": (0.7, history(evaluations=[start(), evaluation(20, chosen=chosen_record(-6.0))])),
    "displaced_leak_per_token": (
        0.7, history(evaluations=[start(), evaluation(20, chosen=chosen_record(-3.0, leak_per_token=0.6))])
    ),
    "underfit_budget_frac": (0.6, history(evaluations=[unmoved(50)], budget_steps=100)),
    "underfit_probe_gain": (
        0.0, history(evaluations=[replace(unmoved(50), samples=samples(0.1))], budget_steps=100)
    ),
    "underfit_kl_per_token": (
        0.0001, history(evaluations=[evaluation(50, effect=0.0, samples=samples(0.001))], budget_steps=100)
    ),
    "collapsed_frac": (0.9, history(evaluations=[evaluation(20, probe_collapsed_frac=0.8)])),
    "learned_z": (50.0, history(evaluations=[evaluation(20)])),
    "drift_limit_per_token": (0.9, history(evaluations=[evaluation(20, samples=samples(0.5))])),
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

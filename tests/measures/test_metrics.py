"""Metrics against values worked out by hand and plain loops, for every loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_stats import full_stats, random_stats

from prefopt_ray.losses.cards import CARDS, LossCard
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.measures.gain import calibrated_gain
from prefopt_ray.measures.metrics import (
    accuracy_by_length,
    calibration_error,
    collapsed_rejected,
    gap_metric_keys,
    gap_metrics,
    ipo_h_over_target,
    length_correlation,
    margins,
    metric_keys,
    pair_metrics,
    saturation,
    select_metric_keys,
    select_metrics,
)

EVERY_CARD = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())


def defaults(card: LossCard) -> dict[str, float]:
    return {param.name: param.default for param in card.params}


def make_stats(rows: list[tuple[float, ...]]) -> PairStats:
    """Rows of (policy chosen, policy rejected, reference chosen, reference rejected, tokens, tokens)."""
    logps = [torch.tensor([row[i] for row in rows], dtype=torch.float32) for i in range(4)]
    tokens = [torch.tensor([int(row[i]) for row in rows]) for i in (4, 5)]
    return full_stats(*logps, tokens=(tokens[0], tokens[1]))


def at_the_reference(stats: PairStats) -> PairStats:
    """Before the first step: nothing has drifted."""
    return replace(
        stats,
        policy_chosen=stats.reference_chosen, policy_rejected=stats.reference_rejected,
        policy_chosen_prefix=stats.reference_chosen_prefix, policy_rejected_prefix=stats.reference_rejected_prefix,
        chosen_kl=0 * stats.chosen_kl, rejected_kl=0 * stats.rejected_kl, mismatched_drift=0 * stats.mismatched_drift,
    )  # fmt: skip


# Three pairs: h = 4, -3, 0; drifts chosen -1, -2, +3; rejected -5, +1, +3.
HAND = make_stats([(-11, -25, -10, -20, 10, 20), (-12, -7, -10, -8, 2, 4), (-5, -6, -8, -9, 4, 3)])


def test_metrics_of_three_pairs_are_those_worked_out_by_hand():
    metrics = pair_metrics(HAND, CARDS["sigmoid"], {"beta": 0.1})
    expected = {
        "rewards/chosen": 0.1 * (-1 - 2 + 3) / 3,
        "rewards/rejected": 0.1 * (-5 + 1 + 3) / 3,
        "rewards/margin": 0.1 * (4 - 3 + 0) / 3,
        "rewards/accuracy": (1 + 0 + 0.5) / 3,
        "logps/chosen": (-11 - 12 - 5) / 3,
        "logps/rejected": (-25 - 7 - 6) / 3,
        "logps/chosen/per_token": (-1.1 - 6 - 1.25) / 3,
        "logps/rejected/per_token": (-1.25 - 1.75 - 2) / 3,
        "drift/chosen": 0.0,
        "drift/rejected": -1 / 3,
        "drift/chosen/per_token": (-0.1 - 1 + 0.75) / 3,
        "drift/rejected/per_token": (-0.25 + 0.25 + 1) / 3,
        "h/mean": 1 / 3,
        "h/std": math.sqrt((16 + 9 + 0) / 3 - 1 / 9),
        "h/p05": -2.7,
        "h/p50": 0.0,
        "h/p95": 3.6,
        "collapse/rejected_frac": 0.0,
        "displacement/chosen_down_frac": 2 / 3,
        "displacement/both_down_frac": 1 / 3,
        "displacement/leak": -np.mean([
            math.log((math.exp(-11) + math.exp(-25)) / (math.exp(-10) + math.exp(-20))),
            math.log((math.exp(-12) + math.exp(-7)) / (math.exp(-10) + math.exp(-8))),
            math.log((math.exp(-5) + math.exp(-6)) / (math.exp(-8) + math.exp(-9))),
        ]),
    }  # fmt: skip
    assert metrics == pytest.approx(expected, abs=1e-9)


def test_rewards_and_accuracy_are_of_the_losss_own_margin():
    per_token = pair_metrics(HAND, CARDS["ipo_mean"], {"beta": 2.0})
    assert per_token["rewards/chosen"] == pytest.approx(2 * (-0.1 - 1 + 0.75) / 3)
    assert per_token["rewards/accuracy"] == pytest.approx(1 / 3)  # margins .15, -1.25, -.25
    policy = pair_metrics(HAND, CARDS["simpo"], {"beta": 2.0, "gamma_ratio": 0.5})
    assert policy["rewards/margin"] == pytest.approx(2 * (0.15 - 4.25 + 0.75) / 3)
    assert policy["rewards/accuracy"] == pytest.approx(2 / 3)
    assert policy["h/mean"] == per_token["h/mean"] == pytest.approx(1 / 3)  # against the reference, for every loss


@EVERY_CARD
def test_keys_are_constant_and_values_finite_floats_for_finite_statistics(card: LossCard):
    extreme = make_stats([(-1e6, -1.0, -1.0, -1e6, 1, 1), (-1.0, -1e6, -1e6, -1.0, 1, 9)])
    for stats in (HAND, random_stats(pairs=1, seed=0), at_the_reference(HAND), extreme):
        shared = pair_metrics(stats, card, defaults(card))
        select = select_metrics(stats, card, defaults(card), groups=None)
        gap = gap_metrics(stats, HAND, card, params=defaults(card))
        assert tuple(shared) == metric_keys() and tuple(select) == select_metric_keys()
        assert tuple(gap) == gap_metric_keys()
        values = [*shared.values(), *select.values(), *gap.values(), saturation(stats, card, defaults(card))]
        assert all(isinstance(value, float) and math.isfinite(value) for value in values)


@EVERY_CARD
def test_a_policy_that_is_its_reference_has_accuracy_one_half_and_no_drift(card: LossCard):
    metrics = pair_metrics(at_the_reference(random_stats(pairs=20, seed=1)), card, defaults(card))
    assert metrics["h/mean"] == metrics["drift/chosen"] == metrics["displacement/leak"] == 0.0
    if "reference" in card.needs:
        assert metrics["rewards/accuracy"] == 0.5


@EVERY_CARD
def test_metrics_do_not_depend_on_batches_or_order(card: LossCard):
    stats = random_stats(pairs=31, seed=2)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    parts = [stats.map(lambda values, rows=rows: values[rows]) for rows in order.split([3, 8, 20])]
    shuffled = PairStats.gather(parts)
    params = defaults(card)
    assert pair_metrics(shuffled, card, params) == pytest.approx(pair_metrics(stats, card, params), rel=1e-12)
    whole = select_metrics(stats, card, params, groups=None)
    assert select_metrics(shuffled, card, params, groups=None) == pytest.approx(whole, rel=1e-9)


def test_statistics_that_are_not_finite_stay_visible():
    broken = replace(HAND, policy_chosen=torch.tensor([math.nan, -12.0, -5.0]))
    assert math.isnan(pair_metrics(broken, CARDS["sigmoid"], {"beta": 0.1})["h/mean"])
    select = select_metrics(broken, CARDS["sigmoid"], {"beta": 0.1}, groups=None)
    assert select["gain"] == -1.0 and math.isnan(select["ece"])


def test_no_pairs_are_refused():
    nothing = HAND.map(lambda values: values[:0])
    with pytest.raises(ValueError, match="no pairs"):
        pair_metrics(nothing, CARDS["sigmoid"], {"beta": 0.1})


@pytest.mark.parametrize(("tokens", "limit"), [(1, math.log(1000)), (10, 10.0), (200, 200.0)])
def test_a_rejected_completion_collapses_below_a_thousandth_and_below_one_nat_per_token(tokens: int, limit: float):
    stats = make_stats([(-1, -2 - limit - 0.01, -1, -2, 5, tokens), (-1, -2 - limit + 0.01, -1, -2, 5, tokens)])
    assert collapsed_rejected(stats).tolist() == [True, False]
    assert pair_metrics(stats, CARDS["sigmoid"], {"beta": 0.1})["collapse/rejected_frac"] == 0.5


def test_leak_is_the_nats_that_left_both_completions():
    drained = make_stats([(-13, -15, -10, -12, 5, 5)])
    assert pair_metrics(drained, CARDS["sigmoid"], {"beta": 0.1})["displacement/leak"] == pytest.approx(3.0)
    far = make_stats([(-2003, -3003, -2000, -3000, 5, 5)])  # exp would underflow
    assert pair_metrics(far, CARDS["sigmoid"], {"beta": 0.1})["displacement/leak"] == pytest.approx(3.0)


# Closed forms of |slope| by hand: in u for Bradley-Terry losses, relative to the start for the others.
def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


GRAD_WEIGHTS = {
    "sigmoid": lambda m: sigma(-0.1 * m),
    "cdpo": lambda m: abs(0.9 * sigma(-0.1 * m) - 0.1 * sigma(0.1 * m)),
    "robust": lambda m: (0.9 * sigma(-0.1 * m) + 0.1 * sigma(0.1 * m)) / 0.8,
    "ipo_sum": lambda m: abs(m - 50) / 50,
    "ipo_mean": lambda m: abs(m - 1) / 1,
    "hinge": lambda m: float(0.05 * m < 1),
    "simpo": lambda m: sigma(-(2.0 * m - 1.0)),
    "sigmoid_norm": lambda m: sigma(-5.0 * m),
}


@pytest.mark.parametrize("name", GRAD_WEIGHTS)
def test_saturation_is_the_mean_pull_of_a_pair(name: str):
    card, stats = CARDS[name], random_stats(pairs=12, seed=3)
    expected = np.mean([GRAD_WEIGHTS[card.name](margin) for margin in margins(stats, card)])
    assert saturation(stats, card, defaults(card)) == pytest.approx(expected, rel=1e-9)


@EVERY_CARD
def test_a_loss_without_a_unit_of_its_own_starts_with_a_pull_of_one(card: LossCard):
    start = saturation(at_the_reference(random_stats(pairs=12, seed=3)), card, defaults(card))
    assert card.bradley_terry or start == pytest.approx(1.0)


def test_saturation_follows_the_state_a_loss_carries():
    at_shift = {"shift": 0.5}
    rewarded = make_stats([(-10, -10, -20, -20, 5, 5)])  # drifts of 10 nats, rewards of one half: on the shift
    assert saturation(rewarded, CARDS["bco"], {"beta": 0.05, "shift_decay": 0.9}, state=at_shift) == pytest.approx(1.0)


def test_rewards_of_a_loss_without_beta_are_not_scaled():
    assert pair_metrics(HAND, CARDS["rebel"], {"eta": 7.0})["rewards/chosen"] == 0.0  # mean of -1, -2 and 3
    assert pair_metrics(HAND, CARDS["rebel"], {"eta": 7.0})["rewards/margin"] == pytest.approx(1 / 3)


@EVERY_CARD
def test_saturation_can_be_asked_where_gradients_are_off(card: LossCard):
    stats = random_stats(pairs=3, seed=3)
    outside = saturation(stats, card, defaults(card))
    with torch.inference_mode():
        inside = saturation(replace(stats, policy_chosen=stats.policy_chosen * 1), card, defaults(card))
    with torch.no_grad():
        assert saturation(stats, card, defaults(card)) == inside == outside


def test_dpo_starts_at_one_half_and_spent_pairs_do_not_pull():
    assert saturation(at_the_reference(HAND), CARDS["sigmoid"], {"beta": 0.1}) == 0.5
    spent = make_stats([(-1, -901, -1, -1, 5, 5)])
    for name in ("sigmoid", "hinge"):
        assert saturation(spent, CARDS[name], {"beta": 0.1}) < 1e-9


def test_ipo_margin_is_measured_in_targets_of_its_own_unit():
    at_target = make_stats([(-10, -25, -10, -20, 5, 10)])  # h = 5, per token .5
    assert ipo_h_over_target(at_target, CARDS["ipo_sum"], {"beta": 0.1}) == pytest.approx(1.0)
    assert ipo_h_over_target(at_target, CARDS["ipo_mean"], {"beta": 1.0}) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="sigmoid has no target"):
        ipo_h_over_target(at_target, CARDS["sigmoid"], {"beta": 0.1})


def test_a_policy_that_only_learned_length_is_right_where_chosen_is_longer_and_wrong_where_shorter():
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(90):
        chosen, rejected = rng.integers(1, 100, size=2)
        rows.append((-50.0 + 0.1 * chosen, -50.0 + 0.1 * rejected, -50.0, -50.0, chosen, rejected))
    short, mid, long = accuracy_by_length(make_stats(rows), CARDS["sigmoid"])
    assert short < 0.1 < mid < 0.9 < long
    assert (short + mid + long) / 3 == pytest.approx(
        pair_metrics(make_stats(rows), CARDS["sigmoid"], {"beta": 0.1})["rewards/accuracy"]
    )


def test_thirds_by_length_are_the_same_pairs_whatever_their_order_and_empty_thirds_count_one_half():
    rng = np.random.default_rng(5)
    same_length = make_stats([(rng.normal(), 0.0, 0.0, 0.0, 7, 7) for _ in range(10)])
    backwards = same_length.map(lambda values: values.flip(0))
    card = CARDS["sigmoid"]
    assert accuracy_by_length(same_length, card) == accuracy_by_length(backwards, card)
    assert accuracy_by_length(make_stats([(1.0, 0.0, 0.0, 0.0, 7, 7)]), card) == (1.0, 0.5, 0.5)


def test_a_margin_that_is_the_length_correlates_with_it_and_equal_lengths_explain_nothing():
    """Correlation against numpy's; the effect size of margins 1, 2, 3 by hand."""
    card, rng = CARDS["sigmoid"], np.random.default_rng(6)
    lengths = rng.integers(1, 100, size=(90, 2))
    noisy = [(-50.0 + c - r + 20 * rng.normal(), -50.0, -50.0, -50.0, c, r) for c, r in lengths]
    expected = np.corrcoef(margins(make_stats(noisy), card), lengths[:, 0] - lengths[:, 1])[0, 1]
    assert length_correlation(make_stats(noisy), card) == pytest.approx(expected)
    even = make_stats([(float(i), 0.0, 0.0, 0.0, 7, 7) for i in (1, 2, 3)])
    assert length_correlation(even, card) == 0.0
    assert select_metrics(even, card, {"beta": 0.1}, groups=None)["effect_size"] == pytest.approx(2 / math.sqrt(2 / 3))
    flat = make_stats([(1.0, 0.0, 0.0, 0.0, 7, 7)] * 3)
    assert select_metrics(flat, card, {"beta": 0.1}, groups=None)["effect_size"] == 0.0


def test_select_metrics_hold_the_gain_of_each_kind_of_margin():
    stats = random_stats(pairs=200, seed=6)
    stats = replace(stats, policy_chosen=stats.policy_chosen + 8)
    groups = np.arange(200) // 2
    gains = {kind: calibrated_gain(margins(stats, CARDS[name]), groups)
             for kind, name in (("sum", "ipo_sum"), ("per_token", "ipo_mean"), ("policy", "simpo"))}  # fmt: skip
    for name, own in (("sigmoid", "sum"), ("ipo_mean", "per_token"), ("simpo", "policy")):
        metrics = select_metrics(stats, CARDS[name], defaults(CARDS[name]), groups=groups)
        assert (metrics["gain"], metrics["gain_se"]) == (gains[own].gain, gains[own].se)
        assert metrics["gain_sum"] == gains["sum"].gain and metrics["gain_per_token"] == gains["per_token"].gain


def test_calibration_is_read_at_the_losss_own_beta_where_it_is_a_likelihood_and_after_calibration_elsewhere():
    stats = random_stats(pairs=300, seed=8)
    stats = replace(stats, policy_chosen=stats.policy_chosen + 8)
    h = margins(stats, CARDS["sigmoid"])
    calibrated = calibration_error(calibrated_gain(h, None).scale * h)
    for beta in (0.01, 3.0):
        own = select_metrics(stats, CARDS["sigmoid"], {"beta": beta}, groups=None)["ece"]
        assert own == pytest.approx(calibration_error(beta * h)) and own > calibrated
        assert select_metrics(stats, CARDS["ipo_sum"], {"beta": beta}, groups=None)["ece"] == pytest.approx(calibrated)


def test_gaps_are_probe_minus_select():
    easy = make_stats([(-10, -20, -10, -10, 5, 5)] * 3)  # h = 10
    gap = gap_metrics(easy, HAND, CARDS["sigmoid"], params={"beta": 0.1})
    nll = [math.log(1 + math.exp(-0.1 * h)) for h in (10, 4, -3, 0)]
    assert gap["gap/accuracy"] == pytest.approx(1 - 0.5)
    assert gap["gap/nll"] == pytest.approx(nll[0] - np.mean(nll[1:]))
    assert gap["gap/gain"] == pytest.approx(1.0 - calibrated_gain(np.array([4.0, -3.0, 0.0]), None).gain, abs=1e-6)


def test_calibration_error_is_zero_for_honest_and_large_for_boastful_probabilities():
    rng = np.random.default_rng(7)
    u = rng.normal(0, 2, size=100_000)
    honest = np.where(rng.random(100_000) < 1 / (1 + np.exp(-u)), u, -u)
    assert calibration_error(honest) < 0.01
    assert calibration_error(10 * honest) > 0.1
    assert calibration_error(np.zeros(10)) == 0.0
    assert math.isnan(calibration_error(np.array([1.0, math.nan])))
    boast = np.concatenate([np.full(75, 800.0), np.full(25, -800.0)])  # certain, and right three times in four
    assert calibration_error(boast) == pytest.approx(0.25)

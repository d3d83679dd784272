"""The contract of every loss: one suite over all cards, and over compositions of each kind.

A new loss adds a card, a formula and its line among the oracles. Values and gradients are checked against loops
over token log-probs in float64; where TRL 1.16 has the loss, `test_trl_losses` checks them against that too.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses.oracle import COMPOSITIONS, ORACLES, Oracle, TokenPair
from pair_stats import full_stats, random_stats
from torch import Tensor

from prefopt_ray.losses.cards import CARDS, LOSS_NAMES, LossCard, find_card
from prefopt_ray.losses.formulas import FORMULAS, LossState, implicit_margin, implicit_reward, loss_function
from prefopt_ray.losses.stats import PairStats

ALL: dict[str, LossCard] = CARDS | {name: find_card(name) for name in COMPOSITIONS}
EVERY_CARD = pytest.mark.parametrize("card", ALL.values(), ids=ALL.keys())
EVERY_STATEFUL = pytest.mark.parametrize("card", [card for card in ALL.values() if card.stateful], ids=lambda c: c.name)
POLICY_FIELDS = ("policy_chosen", "policy_rejected", "policy_chosen_prefix", "policy_rejected_prefix")


def oracle_of(card: LossCard) -> Oracle:
    return (ORACLES | COMPOSITIONS)[card.name]


def losses_of(
    card: LossCard, stats: PairStats, params: Mapping[str, float] | None = None, state: LossState = None
) -> Tensor:
    return loss_function(card.name)(stats, params or card.defaults, state)[0]


def usual_corners(card: LossCard) -> Iterator[dict[str, float]]:
    """Defaults, and every corner of the usual ranges; three of the corners where there would be more than eight."""
    yield card.defaults
    ends = [(param.usual.low, param.usual.high) for param in card.params]
    corners = list(itertools.product(*ends))
    for corner in corners if len(corners) <= 8 else (corners[0], corners[len(corners) // 3], corners[-1]):
        yield dict(zip(card.param_names, corner, strict=True))


# -- every loss is whole --------------------------------------------------------------------------------------


def test_every_card_has_a_formula_an_oracle_and_nothing_is_left_over():
    assert set(CARDS) == set(ORACLES) and set(FORMULAS) == {*CARDS, "nll"}
    assert tuple(CARDS) == LOSS_NAMES


def test_widely_used_losses_stand_before_experimental_ones():
    experimental = [card.experimental for card in CARDS.values()]
    assert experimental == sorted(experimental) and not all(experimental)


@EVERY_CARD
def test_a_card_says_what_a_person_needs_to_choose_it(card: LossCard):
    assert card.title and card.formula and card.source and card.trl and card.beta_unit
    assert card.scope in ("pair", "batch")
    assert card.needs <= {"reference", "lengths", "per_token", "token_sq", "distribution", "mismatched", "scores"}
    for param in card.params:
        assert param.allows(param.default) and param.allows(param.usual.low) and param.allows(param.usual.high)
        assert param.meaning and (param.usual.low > 0 or not param.usual.log)


def test_aliases_find_the_formula_of_the_full_name():
    for card in CARDS.values():
        for alias in card.aliases:
            assert loss_function(alias) is FORMULAS[card.name]
    with pytest.raises(KeyError):
        loss_function("no_such_loss")


# -- value and gradient ---------------------------------------------------------------------------------------


def token_pairs(card: LossCard, params: Mapping[str, float], *, seed: int = 1) -> list[TokenPair]:
    """Pairs of unequal lengths, some with |beta D| up to 50 in either direction; all log-probs below zero."""
    draw = torch.Generator().manual_seed(seed)
    far = 50 / params.get("beta", 1.0)

    def tokens(count: int, total: float = 0.0) -> list[float]:
        return (-3 * torch.rand(count, generator=draw, dtype=torch.float64) - total / count).tolist()

    def amount() -> float:
        return float(torch.rand((), generator=draw, dtype=torch.float64))

    pairs = []
    for row in range(24):
        chosen, rejected = torch.randint(1, 12, (2,), generator=draw).tolist()
        falls = [far * amount() if row % 3 == side else 0.0 for side in (1, 1, 2, 2)]  # of policy, of reference
        pairs.append(TokenPair(
            tokens(chosen, falls[0]), tokens(rejected, falls[1]), tokens(chosen, falls[2]), tokens(rejected, falls[3]),
            tokens(chosen), tokens(rejected), [amount() for _ in range(chosen)], [amount() for _ in range(rejected)],
            mismatched_drift=4 * amount() - 1, score_chosen=amount(), score_rejected=amount(), row=100 + row,
        ))  # fmt: skip
    return pairs


def stats_of(pairs: Sequence[TokenPair]) -> PairStats:
    def column(values: Iterator[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    shared = [min(len(pair.policy_chosen), len(pair.policy_rejected)) for pair in pairs]
    sides = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return PairStats(
        row_ids=torch.tensor([pair.row for pair in pairs]),
        chosen_tokens=torch.tensor([len(pair.policy_chosen) for pair in pairs]),
        rejected_tokens=torch.tensor([len(pair.policy_rejected) for pair in pairs]),
        **{side: column(sum(getattr(pair, side)) for pair in pairs) for side in sides},
        **{
            f"{side}_prefix": column(sum(getattr(pair, side)[:n]) for pair, n in zip(pairs, shared, strict=True))
            for side in sides
        },
        chosen_token_sq=column(sum(pair.token_sq_chosen) for pair in pairs),
        rejected_token_sq=column(sum(pair.token_sq_rejected) for pair in pairs),
        chosen_kl=column(sum(pair.kl_chosen) for pair in pairs),
        rejected_kl=column(sum(pair.kl_rejected) for pair in pairs),
        mismatched_drift=column(pair.mismatched_drift for pair in pairs),
        chosen_score=column(pair.score_chosen for pair in pairs),
        rejected_score=column(pair.score_rejected for pair in pairs),
    )


@EVERY_CARD
def test_loss_agrees_with_a_loop_over_pairs_and_tokens(card: LossCard):
    for params in usual_corners(card):
        pairs = token_pairs(card, params)
        expected = torch.tensor(oracle_of(card)(pairs, params, pairs), dtype=torch.float64)
        torch.testing.assert_close(losses_of(card, stats_of(pairs), params), expected, rtol=1e-9, atol=1e-11)


@EVERY_CARD
def test_gradient_agrees_with_differences_of_the_loop(card: LossCard):
    params = card.defaults
    pairs = token_pairs(card, params)
    chosen, rejected = token_gradients(card, stats_of(pairs), params)
    for side, gradient in (("policy_chosen", chosen), ("policy_rejected", rejected)):
        for row, pair in enumerate(pairs):
            first = getattr(pair, side)[0]
            eps = 1e-6 * max(1.0, abs(first))
            sums = [
                math.fsum(oracle_of(card)([*pairs[:row], moved(pair, side, step), *pairs[row + 1 :]], params, pairs))
                for step in (eps, -eps)
            ]
            rounding = 1e-15 * (sum(map(abs, sums)) + 1) / eps
            slope = (sums[0] - sums[1]) / (2 * eps)
            assert gradient[row].item() == pytest.approx(slope, rel=2e-5, abs=2e-8 + 4 * rounding), (side, row)


def moved(pair: TokenPair, side: str, step: float) -> TokenPair:
    """The pair with its first token of one side a little more likely under the policy."""
    tokens = getattr(pair, side)
    return replace(pair, **{side: [tokens[0] + step, *tokens[1:]]})


def token_gradients(card: LossCard, stats: PairStats, params: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Of the summed loss in the first token of chosen and of rejected, which is in the shared prefix too."""
    free = {name: getattr(stats, name).clone().requires_grad_() for name in POLICY_FIELDS}
    total = losses_of(card, replace(stats, **free), params).sum()
    grads = torch.autograd.grad(total, list(free.values()), materialize_grads=True)
    return grads[0] + grads[2], grads[1] + grads[3]


@EVERY_CARD
def test_float32_agrees_with_float64_up_to_fifty(card: LossCard):
    stats = stats_of(token_pairs(card, card.defaults))
    single = stats.map(lambda values: values.float() if values.is_floating_point() else values)
    exact = losses_of(card, single.map(lambda values: values.double() if values.is_floating_point() else values))
    losses = losses_of(card, single)
    assert losses.dtype == torch.float32 and losses.shape == exact.shape
    torch.testing.assert_close(losses.double(), exact, rtol=2e-4, atol=2e-4)


# Which of (policy chosen, policy rejected, reference chosen, reference rejected) is all but impossible.
EXTREMES = ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 3), (1, 2))


def extremes(card: LossCard, params: Mapping[str, float]) -> PairStats:
    """|beta D| up to 1000 of either side in either direction, and up to a million for the losses that bear it."""
    far = torch.tensor([0.0, 1e-8, 1.0, 50.0, 1e3, 1e6 if card.name in UP_TO_A_MILLION else 1e3])
    far = far / params.get("beta", 1.0)
    logps = [torch.cat([-far if side in which else 0 * far for which in EXTREMES]) for side in range(4)]
    one = torch.ones_like(logps[0], dtype=torch.int64)
    return full_stats(*logps, tokens=(one, one))


UP_TO_A_MILLION = ("sigmoid", "cdpo", "ipo_mean", "ipo_sum", "hinge", "robust", "simpo", "sigmoid_norm", "nca", "exo")


@EVERY_CARD
def test_loss_and_gradient_stay_finite_at_extreme_log_ratios(card: LossCard):
    for params in usual_corners(card):
        stats = extremes(card, params)
        losses = losses_of(card, stats, params)
        slopes = token_gradients(card, stats, params)
        assert torch.isfinite(losses).all() and all(torch.isfinite(slope).all() for slope in slopes)


# -- where it starts, what it reads, what it promises ---------------------------------------------------------


@EVERY_CARD
def test_loss_at_the_reference_is_the_cards(card: LossCard):
    if card.loss_at_start is None:
        # Only where lengths, scores, weights or the policy's own likelihood decide is the start measured.
        assert card.needs & {"lengths", "scores", "token_sq", "per_token"} or "reference" not in card.needs
        return
    stats = at_the_reference(random_stats(pairs=5, seed=0))
    for params in usual_corners(card):
        expected = torch.full((5,), card.loss_at_start(params), dtype=torch.float64)
        measured = losses_of(card, stats, params)
        if card.scope == "batch":  # a batch's loss is its mean; a row of it may be left out
            measured, expected = measured.mean(), expected.mean()
        torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-12)


def at_the_reference(stats: PairStats) -> PairStats:
    """Before the first step: nothing has drifted."""
    zero = torch.zeros_like(stats.chosen_kl)
    return replace(
        stats,
        policy_chosen=stats.reference_chosen, policy_rejected=stats.reference_rejected,
        policy_chosen_prefix=stats.reference_chosen_prefix, policy_rejected_prefix=stats.reference_rejected_prefix,
        chosen_kl=zero, rejected_kl=zero, mismatched_drift=zero,
    )  # fmt: skip


STARTS = {
    "sigmoid": 0.6931472, "cdpo": 0.6931472, "robust": 0.6931472, "sigmoid_norm": 0.6931472, "aot": 0.6931472,
    "aot_unpaired": 0.6931472, "dpop": 0.6931472, "chipo": 0.6931472, "tdpo": 0.6931472, "beta_dpo": 0.6931472,
    "ipo_mean": 1.0, "ipo_sum": 2500.0, "hinge": 1.0, "sppo": 500_000.0, "nca": 1.3862944, "bco": 1.3862944,
    "apo_zero": 1.0, "apo_down": 1.0, "kto": 1.0, "discopop": 0.8465736, "exo": 2.7612313,
}  # fmt: skip


def test_starting_values_are_the_published_ones():
    known = {name: card.loss_at_start(card.defaults) for name, card in CARDS.items() if card.loss_at_start}
    assert known == pytest.approx(STARTS, rel=1e-6)


@EVERY_CARD
def test_the_first_gradient_raises_chosen_or_lowers_rejected_more(card: LossCard):
    if card.name.startswith("discopop"):
        return  # rises at zero: not convex, as its card says
    logp = torch.full((3,), -20.0, dtype=torch.float64)
    tokens = torch.tensor([5, 9, 30])
    stats = at_the_reference(full_stats(logp, logp, logp, logp, tokens=(tokens, tokens)))
    stats = replace(stats, chosen_score=torch.ones(3).double(), rejected_score=torch.zeros(3).double())
    chosen, rejected = token_gradients(card, stats, card.defaults)
    assert (chosen.mean() < rejected.mean()).all() and rejected.mean() > 0
    if not card.name.startswith("apo_down"):
        assert chosen.mean() < 0


@EVERY_CARD
def test_loss_is_float32_one_per_pair_and_only_a_stateful_one_makes_a_state(card: LossCard):
    losses, state = loss_function(card.name)(random_stats(pairs=6, seed=2, dtype=torch.float32), card.defaults, None)
    assert losses.shape == (6,) and losses.dtype == torch.float32
    assert (state is not None) == card.stateful


@EVERY_CARD
def test_batch_order_and_for_pair_scope_batch_split_change_nothing(card: LossCard):
    stats = random_stats(pairs=24, seed=3, dtype=torch.float32)
    formula, params = loss_function(card.name), card.defaults
    whole, state = formula(stats, params, None)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    shuffled, same = formula(take(stats, order), params, None)
    exact = {"rtol": 0, "atol": 0} if card.scope == "pair" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(shuffled, whole[order], **exact)
    assert (same or {}) == pytest.approx(state or {}, rel=1e-5)
    if card.scope == "pair":
        parts = [formula(take(stats, part), params, state)[0] for part in torch.arange(24).split([1, 7, 16])]
        torch.testing.assert_close(torch.cat(parts), formula(stats, params, state)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "kto", "beta_dpo"])
def test_batch_scope_is_not_claimed_in_vain(name: str):
    stats = random_stats(pairs=24, seed=3)
    whole = losses_of(CARDS[name], stats).mean()
    halves = [losses_of(CARDS[name], take(stats, half)).mean() for half in torch.arange(24).split(12)]
    assert abs(whole - torch.stack(halves).mean()) > 1e-6


def take(stats: PairStats, indices: Tensor) -> PairStats:
    return stats.map(lambda values: values[indices])


class RecordedParams(Mapping):
    """A params mapping that remembers what was read from it."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values_by_name, self.read = values, set()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a formula reads its parameters by name")

    __len__ = __iter__


@EVERY_CARD
def test_a_formula_reads_exactly_the_parameters_its_card_names(card: LossCard):
    params = RecordedParams(card.defaults)
    loss_function(card.name)(random_stats(pairs=2, seed=5), params, None)
    assert params.read == set(card.param_names)


@EVERY_CARD
def test_every_parameter_changes_the_loss(card: LossCard):
    far = random_stats(pairs=16, seed=6)
    near = replace(far, policy_chosen=far.reference_chosen - 0.5, policy_rejected=far.reference_rejected - 1.5)
    stats = PairStats.gather([near, far])
    state = loss_function(card.name)(stats, card.defaults, None)[1]
    before = loss_function(card.name)(stats, card.defaults, state)
    for param in card.params:
        other = card.defaults | {param.name: 0.9 * param.usual.high + 0.1 * param.usual.low}
        after = loss_function(card.name)(stats, other, state)
        assert not torch.equal(before[0], after[0]) or before[1] != after[1], param.name


@EVERY_CARD
def test_a_formula_reads_exactly_the_statistics_its_card_needs(card: LossCard):
    stats = random_stats(pairs=8, seed=6)
    before = losses_of(card, stats)
    changed = {
        "reference": replace(stats, reference_chosen=stats.reference_chosen - 1.7),
        "lengths": replace(stats, chosen_tokens=stats.chosen_tokens + 3),
        "per_token": replace(stats, policy_chosen_prefix=stats.policy_chosen_prefix - 1.7),
        "token_sq": replace(stats, chosen_token_sq=stats.chosen_token_sq + 0.1),
        "distribution": replace(stats, chosen_kl=stats.chosen_kl + 1),
        "mismatched": replace(stats, mismatched_drift=stats.mismatched_drift + 1),
        "scores": replace(stats, chosen_score=stats.chosen_score + 1),
    }
    for need, other in changed.items():
        assert torch.equal(before, losses_of(card, other)) == (need not in card.needs), need


@EVERY_CARD
def test_a_loss_needs_no_field_its_card_does_not_name(card: LossCard):
    optional = {
        "per_token": ("policy_chosen_prefix", "policy_rejected_prefix", "reference_chosen_prefix",
                      "reference_rejected_prefix"),
        "token_sq": ("chosen_token_sq", "rejected_token_sq"), "distribution": ("chosen_kl", "rejected_kl"),
        "mismatched": ("mismatched_drift",), "scores": ("chosen_score", "rejected_score"),
    }  # fmt: skip
    absent = {field: None for need, fields in optional.items() if need not in card.needs for field in fields}
    losses_of(card, replace(random_stats(pairs=3, seed=8), **absent))


@EVERY_CARD
def test_bounded_below_is_true_to_fact(card: LossCard):
    scale = card.defaults.get("beta", 1.0)
    margins = [u / scale for u in (-1e6, -1e3, -1.0, 0.0, 0.5, 1.0, 1e3, 1e6)]
    far = [value(card, h) for h in margins]
    assert (min(far) >= 0) == card.bounded_below
    assert (min(far) < -1e4) != card.bounded_below


def value(card: LossCard, h: float, **params: float) -> float:
    """Loss of one pair whose margin is h in every reward kind: one token each, no log-prob above zero."""
    stats = with_margin(torch.tensor([h], dtype=torch.float64))
    return losses_of(card, stats, card.defaults | params).item()


def with_margin(h: Tensor) -> PairStats:
    one = torch.ones_like(h, dtype=torch.int64)
    return full_stats(h.clamp(max=0), -h.clamp(min=0), 0 * h, 0 * h, tokens=(one, one))


# Losses that see a pair only through the margin of their own reward.
MARGIN_ONLY = ("sigmoid", "cdpo", "ipo_mean", "ipo_sum", "hinge", "robust", "simpo", "sigmoid_norm", "exo", "discopop")


@pytest.mark.parametrize("name", MARGIN_ONLY)
def test_the_loss_depends_on_the_pair_only_through_its_implicit_margin(name: str):
    card, stats = CARDS[name], random_stats(pairs=10, seed=7)
    torch.testing.assert_close(losses_of(card, stats), losses_of(card, with_margin(implicit_margin(stats, card))))


@EVERY_CARD
def test_the_implicit_margin_is_chosen_minus_rejected_reward_and_zero_for_equal_sides(card: LossCard):
    stats = random_stats(pairs=10, seed=7)
    chosen, rejected = implicit_reward(stats, card)
    torch.testing.assert_close(chosen - rejected, implicit_margin(stats, card))
    same = replace(stats, policy_rejected=stats.policy_chosen, reference_rejected=stats.reference_chosen,
                   rejected_tokens=stats.chosen_tokens)  # fmt: skip
    assert (implicit_margin(same, card) == 0).all()


def test_an_unknown_reward_kind_is_refused_with_the_known_ones():
    card = replace(CARDS["sigmoid"], reward="per_char")
    with pytest.raises(ValueError, match="per_char.*sum, per_token, policy_sum, policy_per_token, log_odds"):
        implicit_reward(random_stats(pairs=1, seed=0), card)


# What swapping the labels changes: loss(h) - loss(-h). Closed forms from softplus(x) - softplus(-x) = x.
SWAPS = {
    "sigmoid": lambda h, b: -b * h,
    "sigmoid_norm": lambda h, b: -b * h,
    "cdpo": lambda h, b: -(1 - 2 * 0.1) * b * h,
    "robust": lambda h, b: -b * h / (1 - 2 * 0.1),
    "ipo_mean": lambda h, b: -2 * h / b,
    "ipo_sum": lambda h, b: -2 * h / b,
    "hinge": lambda h, b: -math.copysign(min(2 * abs(b * h), 1 + abs(b * h)), h),
    "simpo": lambda h, b: -b * h,  # at gamma_ratio 0
    "exo": lambda h, b: -math.tanh(b * h / 2) * math.log(0.999 / 0.001),
}


@pytest.mark.parametrize("name", SWAPS)
@given(h=st.floats(-1e3, 1e3), beta=st.floats(1e-3, 10))
def test_swapping_the_labels_obeys_the_losss_law(name: str, h: float, beta: float):
    params = {"beta": beta} | ({"gamma_ratio": 0.0} if name == "simpo" else {})
    forward, backward = value(CARDS[name], h, **params), value(CARDS[name], -h, **params)
    assert forward - backward == pytest.approx(SWAPS[name](h, beta), rel=1e-9, abs=1e-9 * max(forward, backward, 1.0))


def test_dpo_at_the_reference_is_ln2_and_ipo_is_zero_at_half_inverse_beta():
    assert value(CARDS["sigmoid"], 0.0) == pytest.approx(math.log(2), rel=1e-15)
    for name in ("ipo_sum", "ipo_mean"):
        assert value(CARDS[name], 1 / (2 * 0.25), beta=0.25) == 0.0


# -- state ----------------------------------------------------------------------------------------------------


@EVERY_STATEFUL
def test_state_is_plain_numbers_and_the_same_whether_or_not_the_step_was_split(card: LossCard):
    formula, state = loss_function(card.name), None
    for step in range(3):
        _, state = formula(random_stats(pairs=12, seed=step), card.defaults, state)
        assert all(type(value) is float for value in state.values())
    stats = random_stats(pairs=12, seed=9)
    first, moved_state = formula(stats, card.defaults, state)
    again, same = formula(stats, card.defaults, dict(state))
    assert torch.equal(first, again) and moved_state == same != state


def test_bcos_shift_is_the_running_mean_of_rewards_before_the_step():
    formula, stats = loss_function("bco"), random_stats(pairs=6, seed=1)
    params = {"beta": 0.05, "shift_decay": 0.75}
    _, state = formula(stats, params, {"shift": 0.4})
    rewards = 0.05 * torch.cat([stats.drift_chosen, stats.drift_rejected])
    assert state["shift"] == pytest.approx(0.75 * 0.4 + 0.25 * rewards.mean().item())
    shifted, _ = formula(stats, params, {"shift": 0.4})
    expected = [
        math.log1p(math.exp(0.4 - 0.05 * c)) + math.log1p(math.exp(0.05 * r - 0.4))
        for c, r in zip(stats.drift_chosen.tolist(), stats.drift_rejected.tolist(), strict=True)
    ]
    assert shifted.tolist() == pytest.approx(expected, rel=1e-12)


def test_beta_dpo_draws_other_pairs_at_other_steps_and_the_same_ones_after_a_resume():
    formula, stats = loss_function("beta_dpo"), random_stats(pairs=40, seed=1)
    params = CARDS["beta_dpo"].defaults | {"rho": 0.4}
    left_out, state = set(), {"margin_mean": float(stats.h.mean()), "margin_std": 1e4, "steps": 0.0}
    for step in range(4):
        losses, _ = formula(stats, params, state | {"steps": float(step)})
        assert int((losses == 0).sum()) == 16
        left_out.add(tuple((losses == 0).nonzero().flatten().tolist()))
    assert len(left_out) == 4


def test_beta_dpo_leaves_out_the_unusual_margins_most_often():
    formula = loss_function("beta_dpo")
    zero, one = torch.zeros(20, dtype=torch.float64), torch.ones(20, dtype=torch.int64)
    margins = torch.cat([torch.zeros(16), torch.full((4,), 30.0)]).double()
    stats = full_stats(margins, zero, zero, zero, tokens=(one, one))
    for step in range(20):
        state = {"margin_mean": 0.0, "margin_std": 5.0, "steps": float(step)}
        losses, _ = formula(stats, CARDS["beta_dpo"].defaults, state)
        assert (losses[16:] == 0).all() and (losses[:16] > 0).all()

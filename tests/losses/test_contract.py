"""The contract of every loss: one suite over all cards. A new loss adds a card, a formula and an oracle here."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefopt_ray.losses.cards import CARDS, LossCard
from prefopt_ray.losses.formulas import FORMULAS, implicit_margin, implicit_reward, loss_function
from prefopt_ray.losses.stats import PairStats

EVERY_CARD = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# Oracles: the papers' formulas in plain floats, from one pair's four lists of token log-probs.
# -log sigma(x) = softplus(-x).
ORACLES = {
    "sigmoid": lambda t, p: softplus(-p["beta"] * log_ratio(t)),
    "cdpo": lambda t, p: (1 - p["label_smoothing"]) * softplus(-p["beta"] * log_ratio(t))
    + p["label_smoothing"] * softplus(p["beta"] * log_ratio(t)),
    "ipo_mean": lambda t, p: (log_ratio(t, mean) - 0.5 / p["beta"]) ** 2,
    "ipo_sum": lambda t, p: (log_ratio(t) - 0.5 / p["beta"]) ** 2,
    "hinge": lambda t, p: max(0.0, 1 - p["beta"] * log_ratio(t)),
    "robust": lambda t, p: (
        (1 - p["label_smoothing"]) * softplus(-p["beta"] * log_ratio(t))
        - p["label_smoothing"] * softplus(p["beta"] * log_ratio(t))
    )
    / (1 - 2 * p["label_smoothing"]),
    "simpo": lambda t, p: softplus(p["gamma_ratio"] * p["beta"] - p["beta"] * (mean(t[0]) - mean(t[1]))),
}


def mean(tokens: list[float]) -> float:
    return sum(tokens) / len(tokens)


def log_ratio(tokens: list[list[float]], reduce: Callable[[list[float]], float] = sum) -> float:
    """reduce(chosen log-ratios) - reduce(rejected log-ratios)."""
    pc, pr, rc, rr = tokens
    return reduce([pc[t] - rc[t] for t in range(len(pc))]) - reduce([pr[t] - rr[t] for t in range(len(pr))])


def defaults(card: LossCard) -> dict[str, float]:
    return {param.name: param.default for param in card.params}


def make_stats(*logps: Tensor, tokens: tuple[Tensor, Tensor] | None = None) -> PairStats:
    chosen_tokens, rejected_tokens = tokens or (torch.full(logps[0].shape, 7), torch.full(logps[0].shape, 4))
    return PairStats(torch.arange(len(logps[0])), *logps, chosen_tokens, rejected_tokens)


def random_stats(*, pairs: int, seed: int, dtype: torch.dtype = torch.float64) -> PairStats:
    draw = torch.Generator().manual_seed(seed)
    logps = [-30 * torch.rand(pairs, generator=draw, dtype=dtype) - 1 for _ in range(4)]
    tokens = torch.randint(1, 40, (2, pairs), generator=draw)
    return make_stats(*logps, tokens=(tokens[0], tokens[1]))


def with_h(h: Tensor) -> PairStats:
    """Margin h in every reward kind: one token each, reference and rejected log-probs zero."""
    zero, one = torch.zeros_like(h), torch.ones_like(h, dtype=torch.int64)
    return make_stats(h, zero, zero, zero, tokens=(one, one))


def value(card: LossCard, h: float, **params: float) -> float:
    stats = with_h(torch.tensor([h], dtype=torch.float64))
    return loss_function(card.name)(stats, defaults(card) | params, None)[0].item()


def gradients(card: LossCard, stats: PairStats) -> tuple[Tensor, Tensor]:
    chosen, rejected = stats.policy_chosen.clone().requires_grad_(), stats.policy_rejected.clone().requires_grad_()
    losses, _ = loss_function(card.name)(
        replace(stats, policy_chosen=chosen, policy_rejected=rejected), defaults(card), None
    )
    return torch.autograd.grad(losses.sum(), (chosen, rejected))


def test_every_card_has_a_formula_an_oracle_and_nothing_is_left_over():
    assert set(FORMULAS) == set(CARDS) == set(ORACLES)


def test_aliases_find_the_formula_of_the_full_name():
    for card in CARDS.values():
        for alias in card.aliases:
            assert loss_function(alias) is FORMULAS[card.name]
    with pytest.raises(KeyError):
        loss_function("no_such_loss")


@EVERY_CARD
def test_loss_at_the_reference_is_the_cards(card: LossCard):
    if card.loss_at_start is None:
        assert "reference" not in card.needs  # only then is the start a matter of measurement
        return
    stats = random_stats(pairs=5, seed=0)
    stats = replace(stats, policy_chosen=stats.reference_chosen, policy_rejected=stats.reference_rejected)
    for params in usual_corners(card):
        losses, _ = loss_function(card.name)(stats, params, None)
        expected = torch.full((5,), card.loss_at_start(params), dtype=torch.float64)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def usual_corners(card: LossCard) -> Iterator[dict[str, float]]:
    """Defaults, and every corner of the usual ranges."""
    yield defaults(card)
    for corner in itertools.product(*[(param.usual.low, param.usual.high) for param in card.params]):
        yield dict(zip(card.param_names, corner, strict=True))


@EVERY_CARD
def test_loss_agrees_with_a_loop_over_pairs_and_tokens(card: LossCard):
    draw = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(30):
        lengths = torch.randint(1, 12, (2,), generator=draw).tolist()
        pairs.append([(-3 * torch.rand(n, generator=draw, dtype=torch.float64)).tolist() for n in lengths * 2])
    logps = [torch.tensor([sum(pair[side]) for pair in pairs], dtype=torch.float64) for side in range(4)]
    tokens = tuple(torch.tensor([len(pair[side]) for pair in pairs]) for side in range(2))
    for params in usual_corners(card):
        losses, _ = loss_function(card.name)(make_stats(*logps, tokens=tokens), params, None)
        expected = [ORACLES[card.name](pair, params) for pair in pairs]
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@EVERY_CARD
def test_loss_is_float32_one_per_pair_and_returns_the_state_it_was_given(card: LossCard):
    losses, state = loss_function(card.name)(random_stats(pairs=6, seed=2, dtype=torch.float32), defaults(card), None)
    assert losses.shape == (6,) and losses.dtype == torch.float32 and state is None


@EVERY_CARD
def test_gradient_at_the_reference_raises_chosen_and_lowers_rejected(card: LossCard):
    logp = torch.full((3,), -20.0, dtype=torch.float64)
    tokens = torch.tensor([1, 5, 30])
    chosen, rejected = gradients(card, make_stats(logp, logp, logp, logp, tokens=(tokens, tokens)))
    assert (chosen < 0).all() and (rejected > 0).all()
    torch.testing.assert_close(chosen, -rejected)


@EVERY_CARD
def test_loss_and_gradient_stay_finite_at_extreme_log_ratios(card: LossCard):
    for params in usual_corners(card):
        u = torch.tensor([0.0, 1e-8, 1.0, 50.0, 1e3, 1e6])
        h = (torch.cat([u, -u]) / params["beta"]).requires_grad_()
        losses, _ = loss_function(card.name)(with_h(h), params, None)
        (slope,) = torch.autograd.grad(losses.sum(), h)
        assert torch.isfinite(losses).all() and torch.isfinite(slope).all()


@EVERY_CARD
def test_batch_order_and_split_change_nothing(card: LossCard):
    stats = random_stats(pairs=24, seed=3, dtype=torch.float32)
    formula, params = loss_function(card.name), defaults(card)
    whole, _ = formula(stats, params, None)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    shuffled, _ = formula(take(stats, order), params, None)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=0)
    if card.scope == "pair":
        parts = [formula(take(stats, part), params, None)[0] for part in torch.arange(24).split([1, 7, 16])]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


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
    params = RecordedParams(defaults(card))
    loss_function(card.name)(random_stats(pairs=2, seed=5), params, None)
    assert params.read == set(card.param_names)


@EVERY_CARD
def test_a_formula_reads_exactly_the_statistics_its_card_needs(card: LossCard):
    stats = random_stats(pairs=8, seed=6)
    before, _ = loss_function(card.name)(stats, defaults(card), None)
    changed = {
        "reference": replace(stats, reference_chosen=stats.reference_chosen - 1.7),
        "lengths": replace(stats, chosen_tokens=stats.chosen_tokens + 3),
    }
    for need, other in changed.items():
        after, _ = loss_function(card.name)(other, defaults(card), None)
        assert torch.equal(before, after) == (need not in card.needs), need


@EVERY_CARD
def test_bounded_below_is_true_to_fact(card: LossCard):
    far = [value(card, u / defaults(card)["beta"]) for u in (-1e6, -1e3, -1.0, 0.0, 0.5, 1.0, 1e3, 1e6)]
    assert (min(far) >= 0) == card.bounded_below
    assert (min(far) < -1e4) != card.bounded_below


@EVERY_CARD
def test_the_loss_depends_on_the_pair_only_through_its_implicit_margin(card: LossCard):
    stats = random_stats(pairs=10, seed=7)
    margin = implicit_margin(stats, card)
    chosen, rejected = implicit_reward(stats, card)
    torch.testing.assert_close(chosen - rejected, margin)
    losses, _ = loss_function(card.name)(stats, defaults(card), None)
    expected, _ = loss_function(card.name)(with_h(margin), defaults(card), None)
    torch.testing.assert_close(losses, expected)


def test_an_unknown_reward_kind_is_refused_with_the_known_ones():
    card = replace(CARDS["sigmoid"], reward="per_char")
    with pytest.raises(ValueError, match="per_char.*sum, per_token, policy_per_token"):
        implicit_reward(random_stats(pairs=1, seed=0), card)


# What swapping the labels changes: loss(h) - loss(-h). Closed forms from softplus(x) - softplus(-x) = x.
SWAPS = {
    "sigmoid": lambda h, b: -b * h,
    "cdpo": lambda h, b: -(1 - 2 * 0.1) * b * h,
    "robust": lambda h, b: -b * h / (1 - 2 * 0.1),
    "ipo_mean": lambda h, b: -2 * h / b,
    "ipo_sum": lambda h, b: -2 * h / b,
    "hinge": lambda h, b: -math.copysign(min(2 * abs(b * h), 1 + abs(b * h)), h),
    "simpo": lambda h, b: -b * h,  # at gamma_ratio 0
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

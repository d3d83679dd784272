"""Where the losses lead: closed-form optima, gradient-flow and stability laws, and the bandits of the IPO paper.

Everything in float64 with free log-ratios, so a wrong sign, factor or reduction cannot hide behind a model.
`beta` may be a vector here: several temperatures are then trained side by side as independent pairs.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.stats import PairStats

TAUS = (0.1, 0.5, 1.0, 2.0)


def pairs(chosen: Tensor, rejected: Tensor) -> PairStats:
    """Log-ratios to a reference at zero, completions of one token."""
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen, dtype=torch.int64)
    return PairStats(torch.arange(len(chosen)), chosen, rejected, zero, zero, one, one, mismatched_drift=zero)


def loss_of(name: str, margin: Tensor, params: Mapping[str, float | Tensor]) -> Tensor:
    return loss_function(name)(pairs(margin, torch.zeros_like(margin)), params, None)[0]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# Optimal u = beta h when the chosen completion wins with probability p; beta drops out of all of them.
BEST_MARGIN: dict[str, Callable[[float], float]] = {
    "sigmoid": logit,
    "sigmoid_norm": logit,
    "cdpo": lambda p: logit(0.9 * p + 0.1 * (1 - p)),
    "robust": lambda p: logit((p - 0.1) / 0.8),
    "ipo_sum": lambda p: p - 0.5,
    "ipo_mean": lambda p: p - 0.5,
    "hinge": lambda p: 1.0,
    "simpo": logit,  # at gamma_ratio 0
    "exo": lambda p: (2 * p - 1) * logit(1 - 1e-3),
}


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("p", [0.6, 0.75, 0.85])
@pytest.mark.parametrize("name", BEST_MARGIN)
def test_the_best_margin_for_a_noisy_preference_is_the_closed_form(name: str, p: float, beta: float):
    params = find_card(name).defaults | {"beta": beta, "gamma_ratio": 0.0}
    assert best_margin(name, p, params) * beta == pytest.approx(BEST_MARGIN[name](p), abs=1e-6)


def best_margin(name: str, p: float, params: Mapping[str, float]) -> float:
    """Bisection on the slope of p loss(h) + (1 - p) loss(-h), which has one sign change in h."""
    low, high = -100 / params["beta"], 100 / params["beta"]
    for _ in range(60):
        h = torch.tensor([(low + high) / 2], dtype=torch.float64, requires_grad=True)
        expected = p * loss_of(name, h, params) + (1 - p) * loss_of(name, -h, params)
        (slope,) = torch.autograd.grad(expected.sum(), h)
        low, high = (low, h.item()) if slope.item() > 0 else (h.item(), high)
    return (low + high) / 2


# Both optima (beta A, beta B), free of each other, for one pair of answers of which A wins with probability p.
BEST_REWARDS: dict[str, Callable[[float], tuple[float, float]]] = {
    "nca": lambda p: (math.log(p / 0.5), math.log((1 - p) / 0.5)),
    "bco": lambda p: (logit(p), -logit(p)),
    "sppo": lambda p: (p - 0.5, 0.5 - p),
}


@pytest.mark.parametrize("name", BEST_REWARDS)
@given(p=st.floats(0.55, 0.97), beta=st.floats(0.05, 2.0))
@settings(max_examples=10)
def test_pointwise_losses_anchor_each_side_at_its_closed_form(name: str, p: float, beta: float):
    assert minimiser(name, p, beta=beta) == pytest.approx(BEST_REWARDS[name](p), abs=2e-3)


TABLE = {  # u at p = .75 and .9, where A and B are free
    "sigmoid": (1.0986, 2.1972), "cdpo": (0.8473, 1.5163), "ipo_sum": (0.25, 0.4), "exo": (3.4534, 5.5254),
    "nca": (0.4055 + 0.6931, 0.5878 + 1.6094), "bco": (2.1972, 4.3944), "sppo": (0.5, 0.8),
    "discopop": (1.3327, 2.2936),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_optimal_margins_are_the_tabulated_ones_whatever_beta(name: str):
    for p, expected in zip((0.75, 0.9), TABLE[name], strict=True):
        for beta in (0.1, 1.0):
            a, b = minimiser(name, p, beta=beta)
            assert a - b == pytest.approx(expected, abs=2e-3)


def test_robust_dpo_believes_noisy_labels_more_and_has_no_optimum_at_its_own_flip_rate():
    a, b = minimiser("robust", 0.75, beta=0.1)
    assert a - b == pytest.approx(1.4663, abs=2e-3)
    far = [pair_loss("robust", torch.tensor([u, -u], dtype=torch.float64), 0.9, beta=0.1) for u in (5.0, 50.0, 500.0)]
    assert far == sorted(far, reverse=True)


@pytest.mark.parametrize(("tau", "end"), [(0.05, -0.119), (0.1, -0.117), (0.11, math.inf)])
def test_discopop_descends_from_the_reference_into_an_inverted_minimum_unless_tau_is_large(tau: float, end: float):
    """Gradient descent on one certain pair from u = 0; `inf` is beyond u = 1."""
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for _ in range(600):
        (slope,) = torch.autograd.grad(loss_of("discopop", u, {"beta": 1.0, "tau": tau}).sum(), u)
        with torch.no_grad():
            u -= 0.05 * slope
    assert (math.inf if u.item() > 1 else u.item()) == pytest.approx(end, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "best"),
    [("ipo_sum", 0.5), ("cdpo", 2.1972), ("exo", 6.9068), ("sppo", 1.0)],
)
def test_on_a_certain_preference_these_stop(name: str, best: float):
    a, b = minimiser(name, 1.0, beta=0.1)
    assert a - b == pytest.approx(best, abs=2e-3)


def test_on_a_certain_preference_nca_stops_for_chosen_only():
    rewards = torch.tensor([math.log(2), -30.0], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(pair_loss("nca", rewards, 1.0, beta=0.1), rewards)[0]
    assert slope[0].item() == pytest.approx(0.0, abs=1e-12) and slope[1] > 0


@pytest.mark.parametrize("name", ["sigmoid:forward_kl", "sigmoid:js", "sigmoid:alpha"])
def test_under_an_f_divergence_dpos_optimum_is_a_margin_of_f_prime(name: str):
    """The likelihood is fitted exactly, whatever the divergence; what changes is which policy that is."""
    links = {
        "forward_kl": lambda d: 1 - math.exp(-d), "js": lambda d: math.log(2 / (1 + math.exp(-d))),
        "alpha": lambda d: (math.exp(-0.5 * d) - 1) / -0.5,
    }  # fmt: skip
    link = links[name.partition(":")[2]]
    for p in (0.6, 0.75, 0.9):
        a, b = (reward / 2.0 for reward in minimiser(name, p, beta=2.0))
        assert 2.0 * (link(a) - link(b)) == pytest.approx(logit(p), abs=2e-3)


@pytest.mark.parametrize("p", [0.55, 0.75, 0.9, 1.0])
@pytest.mark.parametrize(("name", "a", "b"), [("apo_zero", 1, -1), ("kto", 1, -1), ("apo_down", -1, -3)])
def test_bounded_losses_run_off_for_any_preference_above_one_half(name: str, a: float, b: float, p: float):
    """Along (a, b) t the expected loss keeps falling: it has no minimiser."""
    direction = torch.tensor([a, b], dtype=torch.float64)
    falling = [float(pair_loss(name, t * direction, p, beta=0.1)) for t in (2.0, 4.0, 8.0, 16.0)]
    assert all(later < before for before, later in itertools.pairwise(falling))


def pair_loss(name: str, rewards: Tensor, p: float, *, beta: float) -> Tensor:
    """Expected loss of two answers with rewards (beta A, beta B), of which A wins with probability p."""
    params = find_card(name).defaults | {"beta": beta}
    formula = loss_function(name)
    a, b = rewards[:1] / beta, rewards[1:] / beta
    wins, loses = formula(pairs(a, b), params, None)[0], formula(pairs(b, a), params, None)[0]
    return (p * wins + (1 - p) * loses).sum()


def minimiser(name: str, p: float, *, beta: float) -> tuple[float, float]:
    """(beta A, beta B) by L-BFGS in float64, from a margin of 2: discopop has a second minimum near zero."""
    rewards = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                              line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = pair_loss(name, rewards, p, beta=beta)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return tuple(rewards.tolist())


@pytest.mark.parametrize(("name", "u"), [("cdpo", logit(0.9)), ("ipo_sum", 0.5), ("ipo_mean", 0.5)])
def test_losses_that_stop_on_a_certain_preference_stop_there(name: str, u: float):
    assert best_margin(name, 1.0, {"beta": 0.1, "label_smoothing": 0.1}) * 0.1 == pytest.approx(u, abs=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "simpo"])
def test_losses_without_a_minimiser_on_a_certain_preference_always_push_on(name: str):
    h = torch.tensor([1.0, 10.0, 100.0, 300.0], dtype=torch.float64, requires_grad=True)
    params = {"beta": 1.0, "label_smoothing": 0.1, "gamma_ratio": 0.0}
    (slope,) = torch.autograd.grad(loss_of(name, h, params).sum(), h)
    assert (slope < 0).all()


def test_robust_dpo_has_no_minimum_once_labels_are_cleaner_than_assumed():
    params = {"beta": 0.1, "label_smoothing": 0.1}
    h = torch.tensor([1e2, 1e3, 1e4], dtype=torch.float64)
    clean = 0.95 * loss_of("robust", h, params) + 0.05 * loss_of("robust", -h, params)
    assert (clean.diff() < 0).all() and clean[-1] < -10


def descend(name: str, *, beta: float | Tensor, lr: float, steps: int) -> Tensor:
    """SGD on one certain pair of two free logits (|grad h|^2 = 2): h after each step, (steps, len(beta))."""
    beta = torch.as_tensor(beta, dtype=torch.float64).reshape(-1)
    logits = torch.zeros(2, len(beta), dtype=torch.float64, requires_grad=True)
    formula, path = loss_function(name), []
    for _ in range(steps):
        losses, _ = formula(pairs(logits[0], logits[1]), {"beta": beta}, None)
        (slope,) = torch.autograd.grad(losses.sum(), logits)
        logits = (logits - lr * slope).detach().requires_grad_()
        path.append((logits[0] - logits[1]).detach())
    return torch.stack(path)


def test_dpo_margin_follows_the_gradient_flow_and_small_beta_ends_larger():
    beta = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    h = descend("sigmoid", beta=beta, lr=0.1, steps=10_000)
    measured = {
        100: [0.976, 3.016, 2.908, 2.179],
        1000: [7.922, 7.710, 5.279, 3.340],
        10_000: [28.96, 12.409, 7.598, 4.493],
    }
    for step, expected in measured.items():
        assert h[step - 1].tolist() == pytest.approx(expected, rel=1e-3)
        u = beta * h[step - 1]
        torch.testing.assert_close(u + u.exp(), 1 + 2 * beta**2 * 0.1 * step, rtol=0.03, atol=0)
    assert h[-1].tolist() == sorted(h[-1].tolist(), reverse=True) and h[99].argmin() == 0


def test_ipo_under_sgd_needs_a_learning_rate_below_one_over_the_squared_gradient_of_h():
    assert descend("ipo_sum", beta=0.1, lr=0.49, steps=200)[-1].item() == pytest.approx(4.9986, abs=1e-4)
    assert descend("ipo_sum", beta=0.1, lr=0.51, steps=200)[-1].item() == pytest.approx(-1.3e4, rel=0.03)


def test_dpo_under_sgd_does_not_blow_up_where_ipo_would():
    assert descend("sigmoid", beta=0.1, lr=2000.0, steps=200).abs().max() < 1e3


@pytest.mark.parametrize(("beta", "ratio"), [(0.05, 800.0), (0.1, 200.0), (0.5, 8.0), (1.0, 2.0)])
def test_first_ipo_gradient_is_two_over_beta_squared_times_dpos(beta: float, ratio: float):
    first = {name: descend(name, beta=beta, lr=1.0, steps=1).item() for name in ("ipo_sum", "sigmoid")}
    assert first["ipo_sum"] / first["sigmoid"] == pytest.approx(ratio, rel=1e-12)


def test_bradley_terry_gaps_grow_without_bound_and_sgd_keeps_the_sum():
    """Four items, pairs 0>1, 2>3, 1>3, each reward 1, SGD at .1 pair by pair."""
    rewards = torch.ones(4, dtype=torch.float64)
    expected = {100: [3.0387, 0.7166, 1.9914, -1.7466], 1000: [5.1948, 0.5494, 2.4090, -4.1532]}
    for epoch in range(1, 1001):
        for winner, loser in ((0, 1), (2, 3), (1, 3)):
            free = rewards.clone().requires_grad_()
            stats = pairs(free[winner : winner + 1], free[loser : loser + 1])
            losses, _ = loss_function("sigmoid")(stats, {"beta": 1.0}, None)
            (slope,) = torch.autograd.grad(losses.sum(), free)
            rewards = rewards - 0.1 * slope
        if epoch in expected:
            assert rewards.tolist() == pytest.approx(expected[epoch], abs=1e-3)
    assert rewards.sum().item() == pytest.approx(4.0, abs=1e-9)


Comparisons = Sequence[tuple[int, int]]
TOTAL_ORDER: Comparisons = ((0, 1), (1, 2), (0, 2))
CHAIN: Comparisons = ((0, 1), (1, 2))
CYCLE: Comparisons = ((0, 1), (1, 2), (2, 0))
C_NEVER_WINS: Comparisons = ((0, 1), (1, 0), (0, 2), (1, 2))


def bandit(name: str, comparisons: Comparisons, *, taus: Sequence[float], at: Sequence[int]) -> dict[int, Tensor]:
    """Three actions, uniform reference, full-batch Adam at .01: the policy (len(taus), 3) at the steps asked for."""
    theta = torch.zeros(len(taus), 3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=0.01)
    winners, losers = (torch.tensor(side) for side in zip(*comparisons, strict=True))
    beta = torch.tensor(taus, dtype=torch.float64).repeat_interleave(len(comparisons))
    formula, seen = loss_function(name), {}
    for step in range(1, max(at) + 1):
        log_policy = theta.log_softmax(-1) + math.log(3)  # log-ratio to the uniform reference
        stats = pairs(log_policy[:, winners].flatten(), log_policy[:, losers].flatten())
        losses, _ = formula(stats, {"beta": beta}, None)
        (theta.grad,) = torch.autograd.grad(losses.sum() / len(comparisons), theta)
        adam.step()
        if step in at:
            seen[step] = theta.softmax(-1).detach()
    return seen


def softmax(*logits: float) -> list[float]:
    return torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()


def test_ipo_keeps_a_mixed_policy_on_a_total_order():
    policy = bandit("ipo_sum", TOTAL_ORDER, taus=(0.1, 0.3, 0.5, 1.0, 2.0), at=[3500])[3500]
    published = [
        [0.964370, 0.034403, 0.001227], [0.695623, 0.228994, 0.075383], [0.562742, 0.288921, 0.148337],
        [0.448441, 0.321322, 0.230237], [0.390166, 0.330268, 0.279566],
    ]  # fmt: skip
    for tau, row, expected in zip((0.1, 0.3, 0.5, 1.0, 2.0), policy.tolist(), published, strict=True):
        assert row == pytest.approx(expected, abs=2e-6)
        assert row == pytest.approx(softmax(2 / (3 * tau), 1 / (3 * tau), 0), abs=2e-6)  # adjacent gap 1 / (3 tau)


def test_dpo_runs_to_the_deterministic_policy_whatever_tau_but_slower_for_a_large_one():
    policies = bandit("sigmoid", TOTAL_ORDER, taus=TAUS, at=[100, 1000, 3000])
    best = {step: policy[:, 0].tolist() for step, policy in policies.items()}
    assert best[100] == pytest.approx([0.6616, 0.6455, 0.6246, 0.5872], abs=2e-4)
    assert best[1000] == pytest.approx([0.9998, 0.9930, 0.9682, 0.8945], abs=2e-4)
    assert best[3000] == pytest.approx([1.0, 0.9998, 0.9955, 0.9608], abs=2e-4)


def test_on_a_chain_ipo_stops_and_dpo_lets_the_others_vanish():
    ipo = bandit("ipo_sum", CHAIN, taus=TAUS, at=[3000])[3000]
    for tau, row in zip(TAUS, ipo.tolist(), strict=True):
        assert row == pytest.approx(softmax(1 / tau, 1 / (2 * tau), 0), abs=1e-3)
    assert bandit("sigmoid", CHAIN, taus=(0.1, 0.5), at=[2500])[2500][:, 0].min() >= 0.999


@pytest.mark.parametrize("comparisons", [CYCLE, ((0, 1), (1, 0))], ids=["cycle", "contradiction"])
@pytest.mark.parametrize("name", ["ipo_sum", "sigmoid"])
def test_preferences_that_cancel_leave_the_reference(name: str, comparisons: Comparisons):
    policy = bandit(name, comparisons, taus=TAUS, at=[200])[200]
    torch.testing.assert_close(policy, torch.full((4, 3), 1 / 3, dtype=torch.float64))


def test_an_action_that_never_wins_keeps_mass_under_ipo_only():
    ipo = bandit("ipo_sum", C_NEVER_WINS, taus=(0.1, 1.0), at=[3000])[3000]
    assert ipo[0].tolist() == pytest.approx([0.49832, 0.49832, 0.00336], abs=1e-4)
    assert ipo[1].tolist() == pytest.approx([0.38365, 0.38365, 0.23270], abs=1e-4)
    dpo = bandit("sigmoid", C_NEVER_WINS, taus=(0.1,), at=[1000])[1000]
    assert dpo[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)

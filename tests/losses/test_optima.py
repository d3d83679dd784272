"""Where the losses lead: closed-form optima, gradient-flow and stability laws, and the bandits of the IPO paper.

Everything in float64 with free log-ratios, so a wrong sign, factor or reduction cannot hide behind a model.
`beta` may be a vector here: several temperatures are then trained side by side as independent pairs.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.stats import PairStats

TAUS = (0.1, 0.5, 1.0, 2.0)


def pairs(chosen: Tensor, rejected: Tensor) -> PairStats:
    """Log-ratios to a reference at zero, completions of one token."""
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen, dtype=torch.int64)
    return PairStats(torch.arange(len(chosen)), chosen, rejected, zero, zero, one, one)


def loss_of(name: str, margin: Tensor, params: Mapping[str, float | Tensor]) -> Tensor:
    return loss_function(name)(pairs(margin, torch.zeros_like(margin)), params, None)[0]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# Optimal u = beta h when the chosen completion wins with probability p; beta drops out of all of them.
BEST_MARGIN: dict[str, Callable[[float], float]] = {
    "sigmoid": logit,
    "cdpo": lambda p: logit(0.9 * p + 0.1 * (1 - p)),
    "robust": lambda p: logit((p - 0.1) / 0.8),
    "ipo_sum": lambda p: p - 0.5,
    "ipo_mean": lambda p: p - 0.5,
    "hinge": lambda p: 1.0,
    "simpo": logit,  # at gamma_ratio 0
}


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("p", [0.6, 0.75, 0.85])
@pytest.mark.parametrize("name", BEST_MARGIN)
def test_the_best_margin_for_a_noisy_preference_is_the_closed_form(name: str, p: float, beta: float):
    params = {"beta": beta, "label_smoothing": 0.1, "gamma_ratio": 0.0}
    assert best_margin(name, p, params) * beta == pytest.approx(BEST_MARGIN[name](p), abs=1e-6)


def best_margin(name: str, p: float, params: Mapping[str, float]) -> float:
    """Bisection on the slope of p loss(h) + (1 - p) loss(-h), which is convex in h."""
    low, high = -100 / params["beta"], 100 / params["beta"]
    for _ in range(60):
        h = torch.tensor([(low + high) / 2], dtype=torch.float64, requires_grad=True)
        expected = p * loss_of(name, h, params) + (1 - p) * loss_of(name, -h, params)
        (slope,) = torch.autograd.grad(expected.sum(), h)
        low, high = (low, h.item()) if slope.item() > 0 else (h.item(), high)
    return (low + high) / 2


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
    path = []
    for _ in range(steps):
        losses, _ = loss_function(name)(pairs(logits[0], logits[1]), {"beta": beta}, None)
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
    seen = {}
    for step in range(1, max(at) + 1):
        log_policy = theta.log_softmax(-1) + math.log(3)  # log-ratio to the uniform reference
        stats = pairs(log_policy[:, winners].flatten(), log_policy[:, losers].flatten())
        losses, _ = loss_function(name)(stats, {"beta": beta}, None)
        adam.zero_grad()
        (losses.sum() / len(comparisons)).backward()
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


@pytest.mark.parametrize("name", ["ipo_sum", "sigmoid"])
def test_a_cycle_of_preferences_leaves_the_reference(name: str):
    torch.testing.assert_close(
        bandit(name, CYCLE, taus=TAUS, at=[200])[200], torch.full((4, 3), 1 / 3, dtype=torch.float64)
    )


def test_an_action_that_never_wins_keeps_mass_under_ipo_only():
    ipo = bandit("ipo_sum", C_NEVER_WINS, taus=(0.1, 1.0), at=[3000])[3000]
    assert ipo[0].tolist() == pytest.approx([0.49832, 0.49832, 0.00336], abs=1e-4)
    assert ipo[1].tolist() == pytest.approx([0.38365, 0.38365, 0.23270], abs=1e-4)
    dpo = bandit("sigmoid", C_NEVER_WINS, taus=(0.1,), at=[1000])[1000]
    assert dpo[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)

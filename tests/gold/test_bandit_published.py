"""The bandits of the IPO paper, through the product's own losses: published and derived policies.

IPO's optimum on any comparisons: theta - theta_ref = L^+ b with L their Laplacian and b_i = (wins - losses) / (2 tau).
"""

from collections.abc import Iterable

import pytest
import torch
from gold.bandit_loop import Run, trained
from torch import Tensor

from prefopt_ray.gold.bandit import ACTIONS, COMPARISONS
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.stats import PairStats

OBSERVED = {
    name: tuple((ACTIONS.index(winner), ACTIONS.index(loser)) for winner, loser in pairs)
    for name, pairs in COMPARISONS.items()
}
UNIFORM = [1 / 3] * 3
# IPO on the total order by tau.
MIXED = {
    0.1: [0.964370, 0.034403, 0.001227], 0.3: [0.695623, 0.228994, 0.075383], 0.5: [0.562742, 0.288921, 0.148337],
    1.0: [0.448441, 0.321322, 0.230237], 2.0: [0.390166, 0.330268, 0.279566],
}  # fmt: skip
# DPO on the total order: the best action's probability by tau after 100, 1000, 3000 and 18000 steps.
GREEDY = {
    0.1: [0.6616, 0.9998, 1.0, 1.0], 0.5: [0.6455, 0.9930, 0.9998, 1.0],
    1.0: [0.6246, 0.9682, 0.9955, 1.0000], 2.0: [0.5872, 0.8945, 0.9608, 0.99924],
}  # fmt: skip
REPLICATES = range(10)
STEADY = range(3000, 6001, 250)  # IPO has arrived; in minibatches it goes on wandering around the same policy


@pytest.fixture(scope="module")
def policies() -> dict[Run, dict[int, list[float]]]:
    """All runs side by side: a hundred cost little more than one."""
    names, taus = ("cycle", "contradiction", "chain", "never_wins"), (0.1, 0.5, 1.0)
    ipo = [Run("ipo_sum", OBSERVED["total_order"], tau) for tau in MIXED]
    ipo += [Run("ipo_sum", OBSERVED[name], tau) for name in names for tau in taus]
    for name, minibatch_taus in (("total_order", MIXED), ("cycle", (0.1, 0.5))):
        ipo += [Run("ipo_sum", OBSERVED[name], tau, number) for tau in minibatch_taus for number in REPLICATES]
    dpo = [Run("sigmoid", OBSERVED["total_order"], tau) for tau in GREEDY]
    dpo += [Run("sigmoid", OBSERVED[name], tau) for name in names for tau in taus]
    return by_run(ipo, STEADY) | by_run(dpo, (100, 1000, 3000, 5000, 18000))


def by_run(runs: list[Run], steps: Iterable[int]) -> dict[Run, dict[int, list[float]]]:
    policies = trained(runs, at=steps)
    return {run: {step: policy[row].tolist() for step, policy in policies.items()} for row, run in enumerate(runs)}


def full_batch(policies: dict, loss: str, name: str, tau: float) -> dict[int, list[float]]:
    return policies[Run(loss, OBSERVED[name], tau)]


def softmax(*logits: float) -> list[float]:
    return torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()


@pytest.mark.parametrize("tau", MIXED)
def test_ipo_on_a_total_order_stays_mixed(policies: dict, tau: float):
    off = {
        step: max(abs(p - expected) for p, expected in zip(policy, MIXED[tau], strict=True))
        for step, policy in full_batch(policies, "ipo_sum", "total_order", tau).items()
    }
    assert off[3000] < 1e-4 and min(off.values()) < 2e-6
    # Not 2e-6 at every later step: where gradients vanish so does Adam's second moment, and a rounding error can
    # make a step that takes a few hundred to mend.
    assert max(off.values()) < 5e-4


@pytest.mark.parametrize("tau", MIXED)
def test_ipo_in_the_papers_minibatches_ends_around_the_same_policy(policies: dict, tau: float):
    ends = torch.tensor([policies[Run("ipo_sum", OBSERVED["total_order"], tau, number)][6000] for number in REPLICATES])
    assert ends.mean(0).tolist() == pytest.approx(MIXED[tau], abs=0.01)
    assert 1.96 * ends.std(0).max() / len(REPLICATES) ** 0.5 < 0.01


@pytest.mark.parametrize("tau", GREEDY)
def test_dpo_on_a_total_order_ends_at_one_action_for_every_tau(policies: dict, tau: float):
    policy = full_batch(policies, "sigmoid", "total_order", tau)
    best = [policy[step][0] for step in (100, 1000, 3000, 18000)]
    assert best == pytest.approx(GREEDY[tau], abs=2e-4)
    assert best == sorted(best) and best[-1] >= 0.999


def test_beta_changes_dpos_path_though_not_its_end(policies: dict):
    early = {tau: full_batch(policies, "sigmoid", "total_order", tau)[100][0] for tau in (0.1, 2.0)}
    assert early[0.1] - early[2.0] > 0.05


@pytest.mark.parametrize("name", ["cycle", "contradiction"])
@pytest.mark.parametrize("loss", ["ipo_sum", "sigmoid"])
def test_comparisons_that_cancel_leave_the_reference(policies: dict, loss: str, name: str):
    for tau in (0.1, 0.5, 1.0):
        for policy in full_batch(policies, loss, name, tau).values():
            assert policy == pytest.approx(UNIFORM, abs=1e-12)


@pytest.mark.parametrize(("tau", "within"), [(0.1, 0.08), (0.5, 0.03)])
def test_a_cycle_in_minibatches_stays_around_the_reference(policies: dict, tau: float, within: float):
    ends = torch.tensor([policies[Run("ipo_sum", OBSERVED["cycle"], tau, number)][6000] for number in REPLICATES])
    assert ends.mean(0).tolist() == pytest.approx(UNIFORM, abs=within)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_an_unobserved_comparison_is_filled_in_by_ipo_and_overshot_by_dpo(policies: dict, tau: float):
    ipo = full_batch(policies, "ipo_sum", "chain", tau)[6000]
    assert ipo == pytest.approx(softmax(1 / tau, 1 / (2 * tau), 0), abs=1e-3)
    expected = {0.1: [0.9933, 0.0067, 5e-5], 0.5: [0.6652, 0.2447, 0.0900], 1.0: [0.5065, 0.3072, 0.1863]}
    assert ipo == pytest.approx(expected[tau], abs=1e-3)
    assert full_batch(policies, "sigmoid", "chain", tau)[5000][0] >= 0.999


def test_an_action_that_never_wins_vanishes_under_dpo_only(policies: dict):
    for tau, expected in ((0.1, [0.49832, 0.49832, 0.00336]), (1.0, [0.38365, 0.38365, 0.23270])):
        assert full_batch(policies, "ipo_sum", "never_wins", tau)[6000] == pytest.approx(expected, abs=1e-4)
    for tau in (0.1, 0.5, 1.0):
        assert full_batch(policies, "sigmoid", "never_wins", tau)[18000] == pytest.approx([0.5, 0.5, 0], abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_ipos_optimum_on_any_comparisons_solves_their_laplacian(seed: int):
    generator = torch.Generator().manual_seed(seed)
    actions, tau = 3 + seed % 4, 0.1 * (1 + seed)
    chain = torch.arange(actions - 1)
    extra = torch.randint(actions, (12, 2), generator=generator)
    extra = extra[extra[:, 0] != extra[:, 1]]
    observed = torch.cat([torch.stack([chain, chain + 1], dim=1), extra])  # connected
    reference = torch.randn(actions, generator=generator, dtype=torch.float64).log_softmax(-1)
    assert best_ipo_policy(observed, reference, tau=tau) == pytest.approx(
        (reference + laplacian_solution(observed, actions, tau=tau)).softmax(-1).tolist(), abs=1e-8
    )


def laplacian_solution(observed: Tensor, actions: int, *, tau: float) -> Tensor:
    laplacian, b = torch.zeros(actions, actions, dtype=torch.float64), torch.zeros(actions, dtype=torch.float64)
    for winner, loser in observed.tolist():
        edge = torch.zeros(actions, dtype=torch.float64)
        edge[winner], edge[loser] = 1, -1
        laplacian += torch.outer(edge, edge)
        b += edge / (2 * tau)
    return torch.linalg.pinv(laplacian) @ b


def best_ipo_policy(observed: Tensor, reference: Tensor, *, tau: float) -> list[float]:
    """The loss itself, minimised from the reference by L-BFGS."""
    theta = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    one = torch.ones(len(observed), dtype=torch.int64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = theta.log_softmax(-1)
        sides = (policy[observed[:, 0]], policy[observed[:, 1]], reference[observed[:, 0]], reference[observed[:, 1]])
        loss = loss_function("ipo_sum")(PairStats(one, *sides, one, one), {"beta": tau}, None)[0].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach().softmax(-1).tolist()

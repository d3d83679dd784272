"""The losses' maths: statistics of B pairs in, one loss per pair out. Knows no model, batch or optimizer.

Each formula is one pure function of (PairStats, params, state); stateless losses hand `state` back as
it came. Notation as in `cards`: h = Dc - Dr and u = beta h, where D is a summed log-ratio to the reference.
Everything goes through `logsigmoid`, `relu` or a square, so float32 stays finite for |u| up to 1e6.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_ray.losses.cards import LossCard, find_card
from prefopt_ray.losses.stats import PairStats

LossState = Mapping[str, float] | None  # what a stateful loss carries from step to step; None for the others
LossFunction = Callable[[PairStats, Mapping[str, float], LossState], tuple[Tensor, LossState]]


def loss_function(name: str) -> LossFunction:
    """The formula of a full name or alias. Returns (loss (B,), state). Raises KeyError for an unknown name."""
    return FORMULAS[find_card(name).name]


def implicit_reward(stats: PairStats, card: LossCard) -> tuple[Tensor, Tensor]:
    """The reward the loss itself trains, without beta: chosen (B,), rejected (B,).

    Nats for `sum`, nats per token for `per_token` and `policy_per_token`. Gain and accuracy of a trial are
    measured on the margin its own loss orders, not on another's. Raises ValueError for an unknown kind.
    """
    if card.reward == "sum":
        return stats.drift_chosen, stats.drift_rejected
    if card.reward == "per_token":
        return stats.drift_chosen / stats.chosen_tokens, stats.drift_rejected / stats.rejected_tokens
    if card.reward == "policy_per_token":
        return stats.policy_chosen / stats.chosen_tokens, stats.policy_rejected / stats.rejected_tokens
    raise ValueError(f"{card.name}: reward {card.reward!r} must be one of sum, per_token, policy_per_token")


def implicit_margin(stats: PairStats, card: LossCard) -> Tensor:
    """Chosen minus rejected implicit reward, without beta: (B,)."""
    chosen, rejected = implicit_reward(stats, card)
    return chosen - rejected


def sigmoid(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """DPO, Eq. 7 of arXiv:2305.18290."""
    return -logsigmoid(params["beta"] * stats.h), state


def cdpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Conservative DPO: the cross-entropy when a share `label_smoothing` of the labels is flipped (Mitchell 2023)."""
    u, flipped = params["beta"] * stats.h, params["label_smoothing"]
    return -(1 - flipped) * logsigmoid(u) - flipped * logsigmoid(-u), state


def ipo_mean(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Eq. 17 of arXiv:2310.12036 on log-ratios averaged over tokens, as TRL computes it."""
    margin = stats.drift_chosen / stats.chosen_tokens - stats.drift_rejected / stats.rejected_tokens
    return (margin - 1 / (2 * params["beta"])) ** 2, state


def ipo_sum(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Eq. 17 of arXiv:2310.12036 as printed; beta is its tau."""
    return (stats.h - 1 / (2 * params["beta"])) ** 2, state


def hinge(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Hinge on the DPO margin (RSO, arXiv:2309.06657; SLiC, arXiv:2305.10425)."""
    return torch.relu(1 - params["beta"] * stats.h), state


def robust(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Robust DPO, arXiv:2403.00409: unbiased for the clean loss under flips, hence unbounded below."""
    u, flipped = params["beta"] * stats.h, params["label_smoothing"]
    return (-(1 - flipped) * logsigmoid(u) + flipped * logsigmoid(-u)) / (1 - 2 * flipped), state


def simpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """SimPO, Eq. 6 of arXiv:2405.14734, with gamma = gamma_ratio x beta as in its code."""
    margin = stats.policy_chosen / stats.chosen_tokens - stats.policy_rejected / stats.rejected_tokens
    return -logsigmoid(params["beta"] * (margin - params["gamma_ratio"])), state


FORMULAS: dict[str, LossFunction] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "ipo_mean": ipo_mean,
    "ipo_sum": ipo_sum,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
}

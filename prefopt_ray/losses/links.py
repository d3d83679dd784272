"""f-divergences in place of the reverse KL: what a log-ratio becomes before a loss sees it. Card side: `compositions`.

f'(t) at t = e^D with the constants TRL keeps, all zero at D = 0 and increasing (f-DPO, arXiv:2309.16240).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_ray.losses.card_parts import EXPONENT_LIMIT
from prefopt_ray.losses.stats import LossFunction, LossState, PairStats

NEARLY_REVERSE_KL = 1e-6  # |alpha - 1| below which the limit is taken, as in TRL


def forward_kl(log_ratio: Tensor, params: Mapping[str, float]) -> Tensor:
    """1 - 1/t."""
    return -torch.expm1((-log_ratio).clamp(max=EXPONENT_LIMIT))


def js(log_ratio: Tensor, params: Mapping[str, float]) -> Tensor:
    """log 2t / (1 + t)."""
    return math.log(2) + logsigmoid(log_ratio)


def alpha(log_ratio: Tensor, params: Mapping[str, float]) -> Tensor:
    """(t^(alpha - 1) - 1) / (alpha - 1)."""
    power = params["divergence_alpha"] - 1
    if abs(power) < NEARLY_REVERSE_KL:
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=EXPONENT_LIMIT)) / power


LINKS: dict[str, Callable[[Tensor, Mapping[str, float]], Tensor]] = {
    "forward_kl": forward_kl, "js": js, "alpha": alpha,
}  # fmt: skip


def linked(formula: LossFunction, divergence: str) -> LossFunction:
    """A loss of log-ratios, computed on f'(e^D) instead of D."""
    link = LINKS[divergence]

    def of_divergence(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
        none = torch.zeros_like(stats.reference_chosen)
        seen = replace(
            stats,
            policy_chosen=link(stats.drift_chosen, params), policy_rejected=link(stats.drift_rejected, params),
            reference_chosen=none, reference_rejected=none,
        )  # fmt: skip
        return formula(seen, params, state)

    return of_divergence

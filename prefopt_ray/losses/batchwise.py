"""Losses of a whole batch: sorting, a batch mean, a batch's own beta. Their mean over the batch is the loss.

A row's value depends on the other rows, so these see the whole optimizer batch or nothing.
"""

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_ray.losses.pairwise import smoothed
from prefopt_ray.losses.stats import LossState, PairStats

BETA_DPO_DECAY = 0.9  # of M0 and its deviation, from the authors' code
SMALLEST_BETA = 1e-3  # of a batch, from the authors' code
SMALLEST_DEVIATION = 1e-6  # nats; at the start all margins are equal


def kto(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """KTO, Eq. 7 of arXiv:2402.01306, both completions of a pair added. z0 has no gradient."""
    z0 = stats.mismatched_drift.detach().mean().clamp(min=0)
    chosen = (params["beta"] * (z0 - stats.drift_chosen)).sigmoid()  # 1 - sigma(x) = sigma(-x)
    rejected = (params["beta"] * (stats.drift_rejected - z0)).sigmoid()
    return params["desirable_weight"] * chosen + params["undesirable_weight"] * rejected, state


def aot(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Paired AOT, arXiv:2406.05882: policy margins against reference margins of the same rank."""
    policy = stats.policy_chosen - stats.policy_rejected
    reference = stats.reference_chosen - stats.reference_rejected
    return smoothed(params["beta"] * _against_same_rank(policy, reference), params["label_smoothing"]), state


def aot_unpaired(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Unpaired AOT, arXiv:2406.05882: chosen log-ratios against rejected ones of the same rank."""
    sorted_margin = _against_same_rank(stats.drift_chosen, stats.drift_rejected)
    return smoothed(params["beta"] * sorted_margin, params["label_smoothing"]), state


def beta_dpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """beta-DPO, arXiv:2407.08639 and its code: a filter around the usual margin, then a beta for the batch.

    Pairs left out have loss 0, kept ones weigh B / kept: the mean over the batch is the mean over kept pairs.
    """
    margins = stats.h.detach()
    state = _follow_margins(margins, state)
    kept = _keep_usual(margins, stats.row_ids, share=1 - params["rho"], state=state)
    surprise = margins[kept].mean() - state["margin_mean"]
    beta = (params["beta"] * (1 + params["a"] * surprise)).clamp(min=SMALLEST_BETA)
    weight = torch.zeros_like(margins)
    weight[kept] = len(margins) / len(kept)
    return -weight * logsigmoid(beta * stats.h), state


def _against_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """values[i] - (the one of `others` that has the rank of values[i]): (B,), in the rows' own order."""
    ranks = values.detach().argsort(stable=True).argsort(stable=True)
    return values - others.sort().values[ranks]


def _follow_margins(margins: Tensor, state: LossState) -> dict[str, float]:
    """M0 and its deviation, moved towards this batch, and the count of steps that a draw depends on."""
    before = state or {"margin_mean": 0.0, "margin_std": 0.0, "steps": 0.0}
    std = float(margins.std()) if len(margins) > 1 else 0.0
    return {
        "margin_mean": BETA_DPO_DECAY * before["margin_mean"] + (1 - BETA_DPO_DECAY) * float(margins.mean()),
        "margin_std": BETA_DPO_DECAY * before["margin_std"] + (1 - BETA_DPO_DECAY) * std,
        "steps": before["steps"] + 1,
    }


def _keep_usual(margins: Tensor, row_ids: Tensor, *, share: float, state: Mapping[str, float]) -> Tensor:
    """Rows drawn without replacement, weighted by a Gaussian around M0: indices (kept,).

    Gumbel top-k draws exactly so; its noise comes from (step, row id), so neither order nor resuming changes it.
    """
    # A batch that straddles two epochs can hold a row twice: both copies get the same noise, and are mostly kept or
    # left out together. Telling them apart by position would make the draw depend on the order of the batch.
    z = (margins - state["margin_mean"]) / max(state["margin_std"], SMALLEST_DEVIATION)
    noise = torch.tensor([_gumbel(int(state["steps"]), row) for row in row_ids.tolist()], dtype=torch.float64)
    count = max(1, int(len(margins) * share + 1e-9))
    return (noise.to(z.device) - z.double() ** 2 / 2).topk(count).indices


def _gumbel(step: int, row: int) -> float:
    """Standard Gumbel noise of one row at one step."""
    return -math.log(random.Random(f"{step}:{row}").expovariate(1.0))

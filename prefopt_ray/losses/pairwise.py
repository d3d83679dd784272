"""Losses of the margin between chosen and rejected: DPO, its variants, and their kin without a reference.

Notation as in `cards`: h = Dc - Dr and u = beta h, where D is a summed log-ratio to the reference.
Everything goes through `logsigmoid`, `relu`, a square or a held exponent, so float32 stays finite.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_ray.losses.card_parts import EXPONENT_LIMIT
from prefopt_ray.losses.stats import LossState, PairStats

# Beyond this mean token log-prob the odds p / (1 - p) leave float32's resolution.
LARGEST_MEAN_LOGP = -1e-6


def sigmoid(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """DPO, Eq. 7 of arXiv:2305.18290."""
    return -logsigmoid(params["beta"] * stats.h), state


def sigmoid_norm(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """DPO on log-ratios averaged over tokens (Tulu 3, arXiv:2411.15124)."""
    return -logsigmoid(params["beta"] * margin_per_token(stats)), state


def cdpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Conservative DPO: the cross-entropy when a share `label_smoothing` of the labels is flipped (Mitchell 2023)."""
    return smoothed(params["beta"] * stats.h, params["label_smoothing"]), state


def ipo_mean(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Eq. 17 of arXiv:2310.12036 on log-ratios averaged over tokens, as TRL computes it."""
    return (margin_per_token(stats) - 1 / (2 * params["beta"])) ** 2, state


def ipo_sum(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Eq. 17 of arXiv:2310.12036 as printed; beta is its tau."""
    return (stats.h - 1 / (2 * params["beta"])) ** 2, state


def hinge(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Hinge on the DPO margin (RSO, arXiv:2309.06657)."""
    return torch.relu(1 - params["beta"] * stats.h), state


def robust(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Robust DPO, arXiv:2403.00409: unbiased for the clean loss under flips, hence unbounded below."""
    u, flipped = params["beta"] * stats.h, params["label_smoothing"]
    return (-(1 - flipped) * logsigmoid(u) + flipped * logsigmoid(-u)) / (1 - 2 * flipped), state


def simpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """SimPO, Eq. 6 of arXiv:2405.14734, with gamma = gamma_ratio x beta as in its code."""
    margin = stats.policy_chosen / stats.chosen_tokens - stats.policy_rejected / stats.rejected_tokens
    return -logsigmoid(params["beta"] * (margin - params["gamma_ratio"])), state


def orpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """ORPO, arXiv:2403.07691: likelihood of chosen and the odds ratio of mean token probabilities."""
    odds_ratio = log_odds(stats.policy_chosen, stats.chosen_tokens) - log_odds(
        stats.policy_rejected, stats.rejected_tokens
    )
    return -stats.policy_chosen / stats.chosen_tokens - params["lambda"] * logsigmoid(odds_ratio), state


def cpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """CPO, arXiv:2401.08417: DPO with a uniform reference, and the likelihood of chosen."""
    u = params["beta"] * (stats.policy_chosen - stats.policy_rejected)
    return -logsigmoid(u) - params["alpha"] * stats.policy_chosen / stats.chosen_tokens, state


def slic(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """SLiC-HF, arXiv:2305.10425: hinge on sequence log-probs, and the likelihood of chosen."""
    calibration = torch.relu(params["delta"] - stats.policy_chosen + stats.policy_rejected)
    return calibration - params["lambda"] * stats.policy_chosen, state


def exo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """EXO, Eq. 16 of arXiv:2402.00856: reverse KL from the policy's preference to the smoothed label."""
    u, flipped = params["beta"] * stats.h, params["label_smoothing"]
    chosen = u.sigmoid() * (logsigmoid(u) - math.log1p(-flipped))
    return chosen + (-u).sigmoid() * (logsigmoid(-u) - math.log(flipped)), state


def discopop(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """DiscoPOP, Eq. 5 of arXiv:2406.08414. m e^-u is taken as one exponent, which for tau <= 1 cannot overflow."""
    u = params["beta"] * stats.h
    log_m, log_rest = logsigmoid(u / params["tau"]), logsigmoid(-u / params["tau"])
    return -log_rest.exp() * logsigmoid(u) + (log_m - u).exp(), state


def dpop(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """DPO-Positive, arXiv:2402.13228: a chosen completion below its reference likelihood costs lambda times."""
    fall = torch.relu(-stats.drift_chosen)
    return -logsigmoid(params["beta"] * (stats.h - params["lambda"] * fall)), state


def rdpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """R-DPO, arXiv:2403.19159: the reward explained by length alone is taken out of what is learned."""
    longer = (stats.chosen_tokens - stats.rejected_tokens).to(stats.h.dtype)  # a number x int64 would be float32
    return -logsigmoid(params["beta"] * stats.h + params["alpha"] * longer), state


def chipo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Chi-PO, Algorithm 1 of arXiv:2407.13399: DPO with phi(z) = z + log z in place of log z, clipped."""
    ratios = _ratio(stats.drift_chosen) - _ratio(stats.drift_rejected)  # first, lest h is lost beside e^D
    margin = params["beta"] * (ratios + stats.h)
    return -logsigmoid(margin.clamp(-2 * params["r_max"], 2 * params["r_max"])), state


def tdpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """TDPO2, arXiv:2404.11999: the token-wise KL to the reference enters the margin, chosen's without gradient."""
    wider = stats.rejected_kl - stats.chosen_kl.detach()
    return -logsigmoid(params["beta"] * (stats.h - params["alpha"] * wider)), state


def wpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """WPO, Eq. 2 of arXiv:2406.11827, sampled alignment: DPO weighted by how likely the policy writes the pair."""
    chosen = (stats.policy_chosen - stats.chosen_token_sq) / stats.chosen_tokens
    rejected = (stats.policy_rejected - stats.rejected_token_sq) / stats.rejected_tokens
    weight = (chosen + rejected).detach().clamp(max=0.0).exp()
    return -weight * logsigmoid(params["beta"] * stats.h), state


def ld_dpo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """LD-DPO, arXiv:2409.06411: the policy's tokens beyond the shorter length count alpha, the reference's fully."""
    alpha = params["alpha"]
    chosen = alpha * stats.policy_chosen + (1 - alpha) * stats.policy_chosen_prefix
    rejected = alpha * stats.policy_rejected + (1 - alpha) * stats.policy_rejected_prefix
    margin = (chosen - stats.reference_chosen) - (rejected - stats.reference_rejected)
    return -logsigmoid(params["beta"] * margin), state


def rebel(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """REBEL, arXiv:2404.16767: least squares of the margin on the difference in score."""
    return (stats.h - params["eta"] * (stats.chosen_score - stats.rejected_score)) ** 2, state


def smoothed(u: Tensor, flipped: float) -> Tensor:
    """-log sigma(u) when a share `flipped` of the labels is wrong. (B,)"""
    return -(1 - flipped) * logsigmoid(u) - flipped * logsigmoid(-u)


def margin_per_token(stats: PairStats) -> Tensor:
    """Difference of log-ratios averaged over tokens: (B,)."""
    return stats.drift_chosen / stats.chosen_tokens - stats.drift_rejected / stats.rejected_tokens


def log_odds(logp: Tensor, tokens: Tensor) -> Tensor:
    """log p / (1 - p) of the mean token probability p = e^(logp / tokens): (B,)."""
    mean = (logp / tokens).clamp(max=LARGEST_MEAN_LOGP)
    return mean - (-torch.expm1(mean)).log()


def _ratio(log_ratio: Tensor) -> Tensor:
    """e^log_ratio, for any log_ratio."""
    return log_ratio.clamp(max=EXPONENT_LIMIT).exp()

"""Losses that look at chosen and rejected separately, so that each has its own anchor. D as in `cards`."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_ray.losses.stats import LossState, PairStats


def nll(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """Negative log-likelihood of chosen per token; a part of mixtures."""
    return -stats.policy_chosen / stats.chosen_tokens, state


def nca(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """NCA for pairs, arXiv:2402.05369."""
    chosen, rejected = _rewards(stats, params)
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2, state


def bco(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """BCO, arXiv:2404.04656: a classifier of rewards above or below a running mean.

    The shift used is the state before this step, so a row's loss does not depend on its batch; the state handed
    back has moved towards the mean reward of the rows given.
    """
    chosen, rejected = _rewards(stats, params)
    shift = state["shift"] if state else 0.0
    mean = float((chosen.mean() + rejected.mean()).detach()) / 2
    moved = params["shift_decay"] * shift + (1 - params["shift_decay"]) * mean
    return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected), {"shift": moved}


def sppo(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """SPPO with hard labels, Eq. 4.7 of arXiv:2405.00675 at winning probabilities 1 and 0."""
    target = 1 / (2 * params["beta"])
    return (stats.drift_chosen - target) ** 2 + (stats.drift_rejected + target) ** 2, state


def apo_zero(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """APO-zero, Eq. 7 of arXiv:2408.06266."""
    chosen, rejected = _rewards(stats, params)
    return (-chosen).sigmoid() + rejected.sigmoid(), state


def apo_down(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
    """APO-down, Eq. 8 of arXiv:2408.06266."""
    chosen, rejected = _rewards(stats, params)
    return chosen.sigmoid() + (rejected - chosen).sigmoid(), state


def _rewards(stats: PairStats, params: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    return params["beta"] * stats.drift_chosen, params["beta"] * stats.drift_rejected

"""The losses' maths: statistics of B pairs in, one loss per pair out. Knows no model, batch or optimizer.

Each formula is one pure function of (PairStats, params, state); stateless losses hand `state` back as it
came. They stand in `pairwise`, `pointwise` and `batchwise`; this module finds, composes and rewards them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prefopt_ray.losses import batchwise, pairwise, pointwise, registry
from prefopt_ray.losses.cards import LossCard, find_card
from prefopt_ray.losses.compositions import weight_name
from prefopt_ray.losses.links import linked
from prefopt_ray.losses.stats import LossFunction, LossState, PairStats

__all__ = ["FORMULAS", "LossFunction", "LossState", "implicit_margin", "implicit_reward", "loss_function"]

REWARDS = ("sum", "per_token", "policy_sum", "policy_per_token", "log_odds")


def loss_function(name: str) -> LossFunction:
    """The formula of a full name, alias, composition or registered loss. Returns (loss (B,), state).

    Raises KeyError for an unknown name.
    """
    parts = find_card(name).name.split("+")
    if len(parts) == 1:
        return _part(parts[0])
    return _mixture({part: _part(part) for part in parts})


def implicit_reward(stats: PairStats, card: LossCard) -> tuple[Tensor, Tensor]:
    """The reward the loss itself trains, without beta: chosen (B,), rejected (B,).

    Nats for `sum`, `policy_sum` and `log_odds`, nats per token for `per_token` and `policy_per_token`. Gain and
    accuracy of a trial are measured on the margin its own loss orders, not on another's. Raises ValueError for
    an unknown kind.
    """
    if card.reward == "sum":
        return stats.drift_chosen, stats.drift_rejected
    if card.reward == "per_token":
        return stats.drift_chosen / stats.chosen_tokens, stats.drift_rejected / stats.rejected_tokens
    if card.reward == "policy_sum":
        return stats.policy_chosen, stats.policy_rejected
    if card.reward == "policy_per_token":
        return stats.policy_chosen / stats.chosen_tokens, stats.policy_rejected / stats.rejected_tokens
    if card.reward == "log_odds":
        return (
            pairwise.log_odds(stats.policy_chosen, stats.chosen_tokens),
            pairwise.log_odds(stats.policy_rejected, stats.rejected_tokens),
        )
    raise ValueError(f"{card.name}: reward {card.reward!r} must be one of {', '.join(REWARDS)}")


def implicit_margin(stats: PairStats, card: LossCard) -> Tensor:
    """Chosen minus rejected implicit reward, without beta: (B,)."""
    chosen, rejected = implicit_reward(stats, card)
    return chosen - rejected


FORMULAS: dict[str, LossFunction] = {
    formula.__name__: formula
    for formula in (
        pairwise.sigmoid, pairwise.cdpo, pairwise.ipo_mean, pairwise.ipo_sum, pairwise.hinge, pairwise.robust,
        pairwise.simpo, pairwise.sigmoid_norm, batchwise.kto, pairwise.orpo,
        pointwise.nll, pointwise.nca, pointwise.bco, pointwise.sppo, pointwise.apo_zero, pointwise.apo_down,
        pairwise.exo, pairwise.discopop, pairwise.dpop, pairwise.rdpo, pairwise.chipo, pairwise.tdpo, pairwise.wpo,
        pairwise.ld_dpo, pairwise.rebel, batchwise.aot, batchwise.aot_unpaired, batchwise.beta_dpo,
        pairwise.cpo, pairwise.slic,
    )
}  # fmt: skip


def _part(name: str) -> LossFunction:
    """The formula of a plain full name or of `<loss>:<divergence>`."""
    plain, _, divergence = name.partition(":")
    formula = FORMULAS[plain] if plain in FORMULAS else registry.find_registered(plain)[1]
    return linked(formula, divergence) if divergence else formula


def _mixture(parts: Mapping[str, LossFunction]) -> LossFunction:
    """The weighted sum of the parts; each part's state lives under its name in the mixture's."""

    def of_parts(stats: PairStats, params: Mapping[str, float], state: LossState) -> tuple[Tensor, LossState]:
        total, states = torch.zeros_like(stats.policy_chosen), {}
        for name, formula in parts.items():
            losses, after = formula(stats, params, _state_of(name, state))
            total = total + params[weight_name(name)] * losses
            states |= {f"{name}.{key}": value for key, value in (after or {}).items()}
        return total, states or state

    return of_parts


def _state_of(part: str, state: LossState) -> LossState:
    own = {key.removeprefix(f"{part}."): value for key, value in (state or {}).items() if key.startswith(f"{part}.")}
    return own or None

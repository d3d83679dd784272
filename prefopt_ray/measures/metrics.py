"""Metrics of one set of pairs, under the names used everywhere, without the train/, probe/ or eval/ prefix.

Every mean is over pairs, so values of a whole step or evaluation never depend on how it was batched.
Computed in float64 on the CPU. Finite statistics give finite metrics, and always the same keys; what is
not finite stays so here and ends the trial in `verdicts`. Knows no history and no trial.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from prefopt_ray.losses.cards import LossCard
from prefopt_ray.losses.formulas import LossState, implicit_margin, implicit_reward, loss_function
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.measures.gain import calibrated_gain

# A rejected completion has collapsed below a thousandth of its reference probability, and when it is long
# below one nat per token, so that a slight drift over many tokens does not count.
COLLAPSE_NATS = math.log(1000.0)
COLLAPSE_NATS_PER_TOKEN = 1.0

_PAIR_KEYS = (
    "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy",
    "logps/chosen", "logps/rejected", "logps/chosen/per_token", "logps/rejected/per_token",
    "drift/chosen", "drift/rejected", "drift/chosen/per_token", "drift/rejected/per_token",
    "h/mean", "h/std", "h/p05", "h/p50", "h/p95",
    "collapse/rejected_frac",
    "displacement/chosen_down_frac", "displacement/both_down_frac", "displacement/leak",
)  # fmt: skip
_SELECT_KEYS = (
    "gain", "gain_se", "gain_sum", "gain_per_token", "ece",
    "accuracy_by_length/short", "accuracy_by_length/mid", "accuracy_by_length/long",
    "length_correlation", "effect_size",
)  # fmt: skip
_GAP_KEYS = ("gap/accuracy", "gap/gain", "gap/nll")


def metric_keys() -> tuple[str, ...]:
    """The keys of `pair_metrics`, for train, probe and eval alike."""
    return _PAIR_KEYS


def select_metric_keys() -> tuple[str, ...]:
    """The further keys of `select_metrics`, for eval only."""
    return _SELECT_KEYS


def gap_metric_keys() -> tuple[str, ...]:
    """The keys of `gap_metrics`; complete names, they take no prefix."""
    return _GAP_KEYS


# A diverged trial is measured once more before it ends; its NaN belong in the numbers, not in warnings.
_quiet = np.errstate(invalid="ignore")


@_quiet
def pair_metrics(stats: PairStats, card: LossCard, params: Mapping[str, float]) -> dict[str, float]:
    """What train, probe and eval all report (`metric_keys()`).

    Rewards are beta x the loss's own implicit reward, and accuracy is of its own margin, a tie counting one
    half. `logps`, `drift` and `h` are sums over tokens in nats, `per_token` divided by each completion's own
    length. `h/std` is over pairs (not of a sample). `leak` is the mean of -log (pi_c + pi_r) / (ref_c + ref_r):
    above zero, mass has left both completions. Drift and h are against the reference even for a loss that
    does not read it. Raises ValueError for no pairs.
    """
    exact = _exact(stats)
    margin = _numpy(implicit_margin(exact, card))
    chosen, rejected = (reward_scale(params) * _numpy(reward) for reward in implicit_reward(exact, card))
    p05, p50, p95 = np.percentile(_numpy(exact.h), [5, 50, 95])
    values = (
        chosen.mean(), rejected.mean(), (chosen - rejected).mean(), _wins(margin).mean(),
        *_sums_and_per_token(exact.policy_chosen, exact.policy_rejected, exact),
        *_sums_and_per_token(exact.drift_chosen, exact.drift_rejected, exact),
        _numpy(exact.h).mean(), _numpy(exact.h).std(), p05, p50, p95,
        collapsed_rejected(exact).mean(),
        *_displacement(exact),
    )  # fmt: skip
    return {key: float(value) for key, value in zip(_PAIR_KEYS, values, strict=True)}


@_quiet
def select_metrics(
    stats: PairStats, card: LossCard, params: Mapping[str, float], *, groups: np.ndarray | None
) -> dict[str, float]:
    """What only the select part reports (`select_metric_keys()`); groups (N,) cluster the error of the gain.

    `gain` is on the loss's own margin; `gain_sum` on h and `gain_per_token` on per-token log-ratios are
    the same for every loss. `ece` reads sigma(beta x margin) for Bradley-Terry losses, sigma(a* margin) else.
    `length_correlation` is of the margin with |chosen| - |rejected| tokens, 0 where either is constant;
    `effect_size` is mean over standard deviation of the margin, a cheap twin of the gain, 0 where all are equal.
    """
    exact = _exact(stats)
    margin = _numpy(implicit_margin(exact, card))
    gain = calibrated_gain(margin, groups)
    per_token = exact.drift_chosen / exact.chosen_tokens - exact.drift_rejected / exact.rejected_tokens
    values = (
        gain.gain, gain.se,
        calibrated_gain(_numpy(exact.h), groups).gain,
        calibrated_gain(_numpy(per_token), groups).gain,
        calibration_error(margin * (reward_scale(params) if card.bradley_terry else gain.scale)),
        *accuracy_by_length(exact, card),
        length_correlation(exact, card),
        _ratio(margin.mean(), margin.std()),
    )  # fmt: skip
    return {key: float(value) for key, value in zip(_SELECT_KEYS, values, strict=True)}


@_quiet
def gap_metrics(
    probe: PairStats, select: PairStats, card: LossCard, *, params: Mapping[str, float]
) -> dict[str, float]:
    """Train probe minus select (`gap_metric_keys()`): accuracy, gain, and -log sigma(beta x margin) in nats.

    Memorising shows as accuracy and gain above zero and nll below.
    """
    values = [a - b for a, b in zip(_fit(probe, card, params), _fit(select, card, params), strict=True)]
    return dict(zip(_GAP_KEYS, values, strict=True))


def margins(stats: PairStats, card: LossCard) -> np.ndarray:
    """The loss's own implicit margin without beta, (N,) float64: what gain and verdicts read."""
    return _numpy(implicit_margin(_exact(stats), card))


def collapsed_rejected(stats: PairStats) -> np.ndarray:
    """Whether each rejected completion has collapsed: Dr < -max(ln 1000, 1 nat x tokens). (N,) bool."""
    exact = _exact(stats)
    limit = np.maximum(COLLAPSE_NATS, COLLAPSE_NATS_PER_TOKEN * _numpy(exact.rejected_tokens))
    return _numpy(exact.drift_rejected) < -limit


def saturation(
    stats: PairStats, card: LossCard, params: Mapping[str, float], *, state: LossState = None
) -> float:
    """How hard the mean pair still pulls: `train/grad_weight`. Below about .02 the pairs are spent.

    |slope of the loss| in u = beta x margin, the mean of what chosen and rejected feel: sigma(-u) for DPO. Where a
    Bradley-Terry loss starts is its own: at the defaults and margin 0 it is .50 for DPO, .40 for cdpo, .625 for
    robust, .73 for simpo. A loss that is not a Bradley-Terry likelihood has no natural unit, so its slope is
    relative to the one where policy and reference agree: |h - target| / target for IPO, 1[u < 1] for hinge. Taken by
    autograd, so a new loss needs nothing here. `state` is what a stateful loss carried into this step.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        exact = _exact(stats)
        slope = _mean_slope(exact, card, params, state=state)
        if card.bradley_terry:
            return slope
        start = _mean_slope(_at_the_reference(exact), card, params, state=None)
    return slope / start if start > 0 else slope  # a hinge may be met before training: then there is no such unit


def reward_scale(params: Mapping[str, float]) -> float:
    """What implicit rewards are multiplied by: beta, or 1 for a loss without one."""
    return params.get("beta", 1.0)


def ipo_h_over_target(stats: PairStats, card: LossCard, params: Mapping[str, float]) -> float:
    """Median margin over IPO's target 1/(2 beta), in the reduction's own unit: 1.00 -+ .02 once interpolated.

    Raises ValueError for a loss without such a target.
    """
    if card.name not in ("ipo_mean", "ipo_sum"):
        raise ValueError(f"{card.name} has no target margin; ipo_mean and ipo_sum have")
    return float(np.median(margins(stats, card))) * 2 * params["beta"]


def accuracy_by_length(stats: PairStats, card: LossCard) -> tuple[float, float, float]:
    """Accuracy (ties one half) in thirds of the pairs by |chosen| - |rejected| tokens: short, mid, long.

    `long` holds the pairs whose chosen completion is longest against its rejected one; a policy that only
    learned length is right there and wrong in `short`. Thirds are by rank, equal differences in order of
    row id, so the same pairs make the same thirds in every trial. An empty third (fewer than three pairs)
    counts one half.
    """
    exact = _exact(stats)
    wins = _wins(_numpy(implicit_margin(exact, card)))
    difference = _numpy(exact.chosen_tokens) - _numpy(exact.rejected_tokens)
    order = np.lexsort((exact.row_ids.numpy(), difference))
    short, mid, long = (float(wins[third].mean()) if len(third) else 0.5 for third in np.array_split(order, 3))
    return short, mid, long


def length_correlation(stats: PairStats, card: LossCard) -> float:
    """Pearson's correlation of the loss's own margin with |chosen| - |rejected| tokens: what length explains."""
    exact = _exact(stats)
    margin = _numpy(implicit_margin(exact, card))
    difference = _numpy(exact.chosen_tokens) - _numpy(exact.rejected_tokens)
    covariance = ((margin - margin.mean()) * (difference - difference.mean())).mean()
    return _ratio(covariance, margin.std() * difference.std())


def calibration_error(u: np.ndarray) -> float:
    """Expected calibration error of p = sigma(u), u (N,), in ten equal bins; 0 to 1.

    Every pair enters twice, as (p, chosen won) and (1 - p, rejected lost): otherwise a label that is always
    one would make confidence itself look like calibration. NaN when an u is.
    """
    if np.isnan(u).any():
        return math.nan
    u = np.concatenate([u, -u])
    probability = np.exp(-np.logaddexp(0.0, -u))
    won = np.arange(len(u)) < len(u) // 2
    bins = np.minimum((probability * 10).astype(int), 9)
    surplus = np.bincount(bins, weights=won - probability, minlength=10)  # (accuracy - confidence) x count
    return float(np.abs(surplus).sum() / len(u))


def _exact(stats: PairStats) -> PairStats:
    """A float64 CPU copy, outside any graph. Copies always, because inference tensors cannot be differentiated."""
    if len(stats) == 0:
        raise ValueError("no pairs to measure")
    def exact(value: torch.Tensor) -> torch.Tensor:
        copied = value.detach().to("cpu", copy=True)
        return copied.double() if copied.is_floating_point() else copied

    return stats.map(exact)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().numpy().astype(np.float64)


def _ratio(value: float, scale: float) -> float:
    """0 where there is no spread. Below rounding's 1e-12 there is none, and equal margins would give anything."""
    return float(value / scale) if not scale <= 1e-12 else 0.0


def _wins(margin: np.ndarray) -> np.ndarray:
    """1 where the chosen completion is ahead, one half on a tie. (N,)"""
    return (margin > 0) + 0.5 * (margin == 0)


def _sums_and_per_token(chosen: torch.Tensor, rejected: torch.Tensor, stats: PairStats) -> tuple[float, ...]:
    """Means of (chosen, rejected, chosen per token, rejected per token)."""
    columns = (chosen, rejected, chosen / stats.chosen_tokens, rejected / stats.rejected_tokens)
    return tuple(float(_numpy(column).mean()) for column in columns)


def _displacement(stats: PairStats) -> tuple[float, float, float]:
    """Share of pairs whose chosen fell, share where both fell, and the leak in nats."""
    chosen_down, rejected_down = _numpy(stats.drift_chosen) < 0, _numpy(stats.drift_rejected) < 0
    before = np.logaddexp(_numpy(stats.reference_chosen), _numpy(stats.reference_rejected))
    after = np.logaddexp(_numpy(stats.policy_chosen), _numpy(stats.policy_rejected))
    return float(chosen_down.mean()), float((chosen_down & rejected_down).mean()), float((before - after).mean())


def _fit(stats: PairStats, card: LossCard, params: Mapping[str, float]) -> tuple[float, float, float]:
    """Accuracy, gain and nll of the loss's own margin."""
    margin = margins(stats, card)
    gain = calibrated_gain(margin, None).gain
    return float(_wins(margin).mean()), gain, float(np.logaddexp(0.0, -reward_scale(params) * margin).mean())


def _mean_slope(stats: PairStats, card: LossCard, params: Mapping[str, float], *, state: LossState) -> float:
    """Mean over pairs and both sides of |d loss / d u|, each side moving u through its own reward."""
    sides = tuple(side.clone().requires_grad_() for side in (stats.policy_chosen, stats.policy_rejected))
    free = replace(stats, policy_chosen=sides[0], policy_rejected=sides[1])
    losses, _ = loss_function(card.name)(free, params, state)
    pull = torch.autograd.grad(losses.sum(), sides, materialize_grads=True)
    reach = torch.autograd.grad(reward_scale(params) * implicit_margin(free, card).sum(), sides)
    slopes = [torch.where(moved == 0, 0.0, pulled / moved).abs() for pulled, moved in zip(pull, reach, strict=True)]
    return float(torch.stack(slopes).mean())


def _at_the_reference(stats: PairStats) -> PairStats:
    """The same pairs before the first step: every policy field is the reference's, nothing has drifted."""
    return replace(
        stats,
        policy_chosen=stats.reference_chosen, policy_rejected=stats.reference_rejected,
        policy_chosen_prefix=stats.reference_chosen_prefix, policy_rejected_prefix=stats.reference_rejected_prefix,
        chosen_kl=_zero(stats.chosen_kl), rejected_kl=_zero(stats.rejected_kl),
        mismatched_drift=_zero(stats.mismatched_drift),
    )  # fmt: skip


def _zero(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else torch.zeros_like(values)

"""Every number that a verdict compares with, its default and the reason for it.

Standard library only: the spec checks them (`verdicts:`) without torch, the worker judges with them, and
`prefopt explain --verdicts` asks what others would have said. Knows no rule.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """What the rules of `measures.verdicts` read. `loss_norm` is loss / L0: one limit serves all losses and betas."""

    # diverged. An IPO trial sat at 1.7 x L0 for twenty steps and recovered: 2 is on the right side of it.
    loss_norm_limit: float = 2.0
    loss_ema_decay: float = 0.95  # a batch's loss is noisy; this averages about twenty of them
    loss_steps: int = 20  # consecutive, so that one bad batch is forgiven
    loss_evaluations: int = 2  # consecutive; the probe's loss is not noisy
    grad_spike_ratio: float = 1000.0  # a blow-up passes any ratio within steps; an outlier hardly this one
    grad_median_steps: int = 200
    grad_start_steps: int = 20  # a spike must also exceed the median of these: a converged trial's usual one is tiny
    grad_spikes: int = 3  # two can be two odd batches
    grad_spike_steps: int = 50
    unbounded_loss_norm: float = -1.0  # a loss unbounded below runs away downwards
    # broken: what the policy writes is no longer language. Shares are of the reference's own, so that a task of
    # one-word answers, or samples cut at the token limit, are no failure.
    broken_unique_frac: float = 0.5
    broken_kl_per_token: float = 2.0
    broken_logp_room: float = 2.0  # nats per token; a reference this close to uniform says nothing when it is passed
    broken_eos_frac: float = 0.5
    broken_eos_z: float = 3.0  # a rate of one in ten on 128 samples halves by chance now and then
    # memorised: nine of ten trained pairs are right, and held-out ones never were by more than their error.
    memorised_accuracy: float = 0.9
    # overfit. Real differences at 512 pairs are 1 to 2.8 standard errors: less than 2 must not stop a trial.
    overfit_z: float = 2.0
    overfit_evaluations: int = 2  # consecutive
    # Of the drift limit. Chosen on the gold table (docs/experiments), where the limit is .5: policies whose pairs were
    # overfit mostly kept their true reward up to .16 nats per token, and had lost some from .27 on.
    overfit_drift_frac: float = 0.4
    fitted_nats: float = 0.01  # a probe with a lower loss is memorised: it cannot visibly fall further
    # over_optimised: the same caution, for the win rate on the policy's own samples.
    over_optimised_z: float = 2.0
    over_optimised_evaluations: int = 2  # consecutive ones that drew samples
    # collapsed_rejected: a fifth of the train probe's rejected completions have all but vanished. Chosen on three seeds
    # of the gold table: trials that kept their true reward ended with .12 or less, those that lost it with more.
    collapsed_frac: float = 0.2
    # likelihood_displaced. A falling chosen log-prob alone is what a reference tuned on the chosen texts shows.
    displaced_z: float = 2.0
    displaced_frac: float = 0.8
    displaced_nats_per_token: float = 0.5
    displaced_leak_per_token: float = 0.5
    # underfit: not before half of the budget, since a warm-up may take long.
    underfit_budget_frac: float = 0.5
    underfit_probe_gain: float = 0.05  # bits per pair; any fit of 512 pairs by a moving policy is above it
    underfit_kl_per_token: float = 0.005
    # healthy, memorised and underfit: the same caution as for overfit.
    learned_z: float = 2.0
    # A starting point for language models, nothing measured; .5 fits the embedded gold task.
    drift_limit_per_token: float = 0.3

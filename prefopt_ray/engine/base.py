"""The seam between trials and whatever computes them: Engine, and what it asks of a trial.

An engine knows weights, slots and optimizers. It does not know schedules, losses, evaluations,
files of a sweep, Ray or MLflow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prefopt_ray.losses.cards import LossCard
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.pairs.tokens import PairTokens, Ragged
from prefopt_ray.trial import ExecutionPlan, TrialConfig

REFERENCE = -1  # the slot number that means "the reference, not a trial's policy"


@dataclass(frozen=True)
class Share:
    """Every `of`-th of the forward passes of a scoring, from `number` on."""

    number: int
    of: int


WHOLE = Share(0, 1)


@dataclass(frozen=True)
class ReferencedPairs:
    """A part of the data with its reference log-probs, row by row."""

    tokens: PairTokens
    reference: np.ndarray  # (N, 2) float32: chosen, rejected; summed nats
    # Where a loss needs them, by the need's name (see engine.extras): derived pairs of the same rows.
    derived: Mapping[str, "ReferencedPairs"] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: np.ndarray) -> "ReferencedPairs":
        derived = {need: pairs.take(indices) for need, pairs in self.derived.items()}
        return ReferencedPairs(self.tokens.take(indices), self.reference[indices], derived)


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, gathered over its micro-batches. CPU tensors."""

    stats: PairStats  # (B,) every pair of the step
    losses: Tensor  # (B,) float32
    grad_norm: float  # before clipping
    clipped: bool
    update_ratio: float | None  # ||dW|| / ||W|| of the trainable weights, where it was asked for
    applied: bool  # False: loss or gradient was not finite and the weights were left alone


@dataclass(frozen=True)
class Samples:
    """M completions drawn from a policy, with exact per-position divergences from the reference."""

    completions: Ragged  # M sequences of sampled tokens, without the end-of-turn token
    finished: np.ndarray  # (M,) bool: an end-of-turn token was drawn before the limit
    kl: np.ndarray  # (M,) float64: sum over positions of KL(pi || ref), nats (Rao-Blackwell estimate)
    entropy: np.ndarray  # (M,) float64: sum over positions of the policy's entropy, nats
    positions: np.ndarray  # (M,) int64: positions summed over (sampled tokens and the end-of-turn token)


class SteppedTrial(Protocol):
    """What an engine asks of a trial while it steps it."""

    slot: int
    config: TrialConfig
    card: LossCard  # what its loss needs, and whether it looks at pairs one by one or at the whole batch

    @property
    def learning_rate(self) -> float:
        """The schedule's rate for the step about to be made."""
        ...

    @property
    def measures_update(self) -> bool:
        """Whether ||dW|| / ||W|| is wanted for the step about to be made (it costs a copy)."""
        ...

    def next_batch(self) -> ReferencedPairs:
        """The pairs of the step about to be made."""
        ...

    def loss(self, stats: PairStats) -> Tensor:
        """(b,) loss of each pair, differentiable in the policy's statistics. A loss of batch scope is given the
        whole step's pairs."""
        ...

    def finish_step(self, outcome: StepOutcome) -> None: ...


class Engine(Protocol):
    """Owns the base model, adapter slots and optimizers. Slots are numbered from 0."""

    plan: ExecutionPlan
    vocabulary: int  # tokens that a position chooses from

    def open(self, slot: int, config: TrialConfig) -> None:
        """A fresh policy (equal to the reference `start`) and optimizer, bit-equal to a new process."""
        ...

    def plan_of(self, slot: int) -> ExecutionPlan:
        """How the slot's trial is computed: `plan`, and what was kept of the plan that it began with."""
        ...

    def keep_plan(self, slot: int, begun: Mapping[str, Any]) -> None:
        """Go on as a trial began under `begun` (ExecutionPlan.to_dict()), as far as that is the engine's to choose and
        fits: its batches are cut as they were, so that the same bits follow."""
        ...

    def step(self, trials: Sequence[SteppedTrial]) -> None:
        """One optimizer step of each trial."""
        ...

    def score(
        self, slot: int, pairs: PairTokens, *, advance: Callable[[int], None] | None = None, share: Share = WHOLE
    ) -> np.ndarray:
        """(N, 2) float32 summed log-probs of chosen and rejected, in pair order; slot REFERENCE for the reference.

        `advance` is told how many pairs each forward has scored. Of several shares each scores other forward passes of
        the same grouping and leaves the other pairs 0, so that they add up to the whole, bit by bit.
        """
        ...

    def sample(self, slot: int, prompts: Ragged, *, max_new_tokens: int, seed: int) -> Samples:
        """One completion per prompt at temperature 1 from the whole distribution."""
        ...

    def state(self, slot: int) -> dict[str, Tensor]:
        """Weights and optimizer by parameter name, CPU copies; any engine of the same model loads it."""
        ...

    def load(self, slot: int, tensors: dict[str, Tensor]) -> None: ...

    def export(self, slot: int, folder: Path) -> None:
        """An adapter folder that `peft` loads, or a model folder that `transformers` loads."""
        ...


def pair_stats(pairs: ReferencedPairs, policy: Tensor, **extras: Tensor) -> PairStats:
    """PairStats of pairs and their policy log-probs (B, 2), on the policy tensor's device.

    `extras` are the optional fields that the engine computed; those that come from the data or the reference alone
    are added here.
    """
    def on_device(array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.array(array), device=policy.device)  # a copy: stored arrays are read-only

    reference, tokens = on_device(pairs.reference), pairs.tokens
    if "per_token" in pairs.derived:
        prefix = on_device(pairs.derived["per_token"].reference)
        extras |= {"reference_chosen_prefix": prefix[:, 0], "reference_rejected_prefix": prefix[:, 1]}
    if tokens.scores is not None:
        scores = on_device(tokens.scores)
        extras |= {"chosen_score": scores[:, 0], "rejected_score": scores[:, 1]}
    return PairStats(
        row_ids=on_device(tokens.row_ids),
        policy_chosen=policy[:, 0],
        policy_rejected=policy[:, 1],
        reference_chosen=reference[:, 0],
        reference_rejected=reference[:, 1],
        chosen_tokens=on_device(tokens.chosen.lengths),
        rejected_tokens=on_device(tokens.rejected.lengths),
        **extras,
    )

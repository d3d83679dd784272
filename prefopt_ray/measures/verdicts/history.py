"""What a trial has stored so far, as the rules read it: optimizer steps and evaluations.

Plain numbers and numpy arrays, built alike while a trial runs and from its folder years later. Knows neither
models nor files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from prefopt_ray.measures.gain import Gain, calibrated_gain


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, counted from 1. `grad_norm` before clipping; `loss_norm` = loss / L0."""

    step: int
    loss: float
    loss_norm: float
    grad_norm: float
    finite: bool  # loss, gradients and log-probs all were


@dataclass(frozen=True, eq=False)
class ChosenRecord:
    """What became of the select part's chosen completions. Nats; means are over pairs."""

    drift: np.ndarray  # (N,) summed log-ratio to the reference, Dc
    drift_per_token: float  # mean of Dc / |yc|
    leak_per_token: float  # mean of -log((pi_c + pi_r) / (ref_c + ref_r)) over the pair's mean length
    logp_per_token: float  # mean of log pi / |yc|
    reference_logp_per_token: float

    @property
    def down_frac(self) -> float:
        return float((self.drift < 0).mean())


@dataclass(frozen=True, eq=False)
class Scores:
    """What a scorer gave one completion per prompt: of the policy, and of the reference to the same prompt."""

    policy: np.ndarray  # (M,) float64
    reference: np.ndarray  # (M,)

    @property
    def wins(self) -> np.ndarray:
        """1 where the policy's is better, one half on a tie. (M,)"""
        return (self.policy > self.reference) + 0.5 * (self.policy == self.reference)


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """The policy's own completions at an evaluation, one for each of `count` prompts, and the reference's."""

    count: int
    kl: float  # nats per completion, mean over completions
    kl_per_token: float
    unique_frac: float  # distinct completions / completions
    eos_rate: float  # share that ended by itself
    reference_unique_frac: float = 1.0
    reference_eos_rate: float = 1.0
    scores: Mapping[str, Scores] = field(default_factory=dict)  # by scorer


@dataclass(frozen=True, eq=False)
class EvaluationRecord:
    """One evaluation. Margins are the loss's own implicit ones without beta, always of the same pairs."""

    step: int  # optimizer steps done; 0 = before training
    select_margins: np.ndarray  # (N,)
    groups: np.ndarray | None  # (N,) equal for pairs of one prompt
    probe_margins: np.ndarray  # (M,), fixed train pairs
    probe_collapsed_frac: float  # share of the probe's rejected completions that collapsed
    probe_loss_norm: float | None = None  # of the probe: on select an overfit trial's loss grows without end
    chosen: ChosenRecord | None = None
    samples: SampleRecord | None = None  # where some were drawn
    pair_drift_per_token: float | None = None  # nats, mean over pairs and sides of |log-ratio| / tokens

    @property
    def moved_per_token(self) -> float | None:
        """How far the policy is from its reference: KL on its samples, or the drift on pairs where none were drawn."""
        return self.pair_drift_per_token if self.samples is None else self.samples.kl_per_token

    @property
    def moved_by(self) -> str:
        """What `moved_per_token` is."""
        return "drift on pairs (no samples)" if self.samples is None else "KL on samples"

    @cached_property
    def gain(self) -> Gain:
        """On the select part."""
        return calibrated_gain(self.select_margins, self.groups)

    @cached_property
    def probe_gain(self) -> Gain:
        return calibrated_gain(self.probe_margins, None)

    @property
    def probe_accuracy(self) -> float:
        return float(((self.probe_margins > 0) + 0.5 * (self.probe_margins == 0)).mean())

    @property
    def valid(self) -> bool:
        return self.gain.valid and self.probe_gain.valid


@dataclass(frozen=True)
class TrialHistory:
    """In order of steps. What is None is unknown, and a rule that needs it does not fire."""

    loss: str  # card name
    warmup_steps: int
    steps: Sequence[StepRecord]
    evaluations: Sequence[EvaluationRecord]
    beta: float | None = None  # of a Bradley-Terry loss, where -log sigma(beta x margin) is a likelihood
    budget_steps: int | None = None  # where the trial ends when nothing stops it
    steps_per_epoch: float | None = None
    vocabulary: int | None = None  # tokens

    def until(self, step: int) -> "TrialHistory":
        """The history as it was after the evaluation at `step`: the verdict at the best step is judged on it."""
        return replace(
            self,
            steps=[record for record in self.steps if record.step <= step],
            evaluations=[record for record in self.evaluations if record.step <= step],
        )

    @property
    def trained(self) -> list[EvaluationRecord]:
        """Sound evaluations after the first optimizer step: as for best-so-far, none before it counts."""
        return [record for record in self.evaluations if record.step > 0 and record.valid]

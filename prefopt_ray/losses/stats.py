"""PairStats: what an engine computes per pair, and all that losses and measures ever see; and a loss's signature.

A few floats per pair, so statistics gathered over micro-batches and ranks are exact and cheap.
Notation of the DPO paper, and the drift D = log pi(y|x) - log pi_ref(y|x), summed over the
completion's tokens, in nats; h = D(chosen) - D(rejected).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairStats:
    """B pairs. Log-probs are float32 sums over completion tokens, in nats.

    The fields from `policy_chosen_prefix` on are there only where a card `needs` them (named beside each); a loss
    that reads one which is None is a bug of its card.
    """

    row_ids: Tensor  # (B,) int64
    policy_chosen: Tensor  # (B,)
    policy_rejected: Tensor  # (B,)
    reference_chosen: Tensor  # (B,)
    reference_rejected: Tensor  # (B,)
    chosen_tokens: Tensor  # (B,) int64, counted from the structure, >= 1
    rejected_tokens: Tensor  # (B,)
    # per_token: log-probs summed over the first min(|yc|, |yr|) completion tokens only
    policy_chosen_prefix: Tensor | None = None  # (B,)
    policy_rejected_prefix: Tensor | None = None  # (B,)
    reference_chosen_prefix: Tensor | None = None  # (B,)
    reference_rejected_prefix: Tensor | None = None  # (B,)
    # token_sq: sum over completion positions of log sum_v pi(v)^2, without gradient
    chosen_token_sq: Tensor | None = None  # (B,)
    rejected_token_sq: Tensor | None = None  # (B,)
    # distribution: sum over completion positions of KL(pi_ref || pi), differentiable
    chosen_kl: Tensor | None = None  # (B,)
    rejected_kl: Tensor | None = None  # (B,)
    # mismatched: drift D of another row's completion after this row's prompt, without gradient
    mismatched_drift: Tensor | None = None  # (B,)
    # scores: what the data says each completion is worth, in the scorer's unit
    chosen_score: Tensor | None = None  # (B,)
    rejected_score: Tensor | None = None  # (B,)

    def __len__(self) -> int:
        return self.row_ids.shape[0]

    @property
    def drift_chosen(self) -> Tensor:  # (B,)
        return self.policy_chosen - self.reference_chosen

    @property
    def drift_rejected(self) -> Tensor:  # (B,)
        return self.policy_rejected - self.reference_rejected

    @property
    def h(self) -> Tensor:  # (B,)
        return self.drift_chosen - self.drift_rejected

    def map(self, change: Callable[[Tensor], Tensor]) -> "PairStats":
        """Every field that is there, changed."""
        return PairStats(**{name: change(value) for name, value in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def detach(self) -> "PairStats":
        return self.map(Tensor.detach)

    def cpu(self) -> "PairStats":
        return self.map(Tensor.cpu)

    @staticmethod
    def gather(parts: list["PairStats"]) -> "PairStats":
        """Join micro-batches (or ranks) in order; all have the same fields."""
        columns = [part.present() for part in parts]
        return PairStats(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})


LossState = Mapping[str, float] | None  # what a stateful loss carries from step to step; None at its start
LossFunction = Callable[[PairStats, Mapping[str, float], LossState], tuple[Tensor, LossState]]

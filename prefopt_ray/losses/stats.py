"""PairStats: what an engine computes per pair, and all that losses and measures ever see.

A few floats per pair, so statistics gathered over micro-batches and ranks are exact and cheap.
Notation of SCIENCE and the DPO paper: drift D = log pi(y|x) - log pi_ref(y|x), summed over the
completion's tokens, in nats; h = D(chosen) - D(rejected).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairStats:
    """B pairs. Log-probs are float32 sums over completion tokens, in nats."""

    row_ids: Tensor  # (B,) int64
    policy_chosen: Tensor  # (B,)
    policy_rejected: Tensor  # (B,)
    reference_chosen: Tensor  # (B,)
    reference_rejected: Tensor  # (B,)
    chosen_tokens: Tensor  # (B,) int64, counted from the structure, >= 1
    rejected_tokens: Tensor  # (B,)

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

    def detach(self) -> "PairStats":
        return PairStats(**{f.name: getattr(self, f.name).detach() for f in fields(self)})

    def cpu(self) -> "PairStats":
        return PairStats(**{f.name: getattr(self, f.name).cpu() for f in fields(self)})

    @staticmethod
    def gather(parts: list["PairStats"]) -> "PairStats":
        """Join micro-batches (or ranks) in order."""
        return PairStats(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(PairStats)})

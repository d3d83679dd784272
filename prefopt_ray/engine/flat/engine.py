"""The flat engine: one list of tokens without padding, the prompt once per pair, on transformers' own modules.

Of the model only attention (by registration), the LoRA linears and the head are ours. See `engine.choose` for the
models it serves.
"""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt_ray.engine.agreement import agrees
from prefopt_ray.engine.batches import Batch, shared_lengths
from prefopt_ray.engine.flat.attention import flat_attention_in
from prefopt_ray.engine.flat.head import FrozenHeadLogps
from prefopt_ray.engine.flat.layout import flat_pairs, flat_sequences
from prefopt_ray.engine.flat.lora import use_two_passes
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.trial import TrialConfig


class LayoutError(RuntimeError):
    """The model's modules do not take the layout."""


class FlatEngine(LocalEngine):
    """LocalEngine (see engine.local) on flat batches (1, S)."""

    padded = False

    def __init__(self, model: PreTrainedModel, **settings: object) -> None:
        """Raises LayoutError when the model does not compute the same on a flat batch as on rows."""
        super().__init__(model, **settings)
        if not agrees(model, self._decoder, self._pair_batch, within=flat_attention_in(model)):
            raise LayoutError("a flat batch gives other hidden states than rows")

    def open(self, slot: int, config: TrialConfig) -> None:
        super().open(slot, config)
        if self._slots.peft is not None:
            use_two_passes(self._slots.peft)

    def _lengths(self, pairs: PairTokens) -> np.ndarray:
        return shared_lengths(pairs)

    def _pair_batch(self, pairs: PairTokens) -> Batch:
        return flat_pairs(pairs, device=self.device)

    def _sequence_batch(self, prompts: list[np.ndarray], completions: list[np.ndarray]) -> Batch:
        return flat_sequences(prompts, completions, device=self.device)

    def _computing(self, model: PreTrainedModel) -> AbstractContextManager:
        return flat_attention_in(model)

    def _logps(self, model: PreTrainedModel, hidden: Tensor, batch: Batch) -> Tensor:
        head = model.get_output_embeddings()
        if torch.is_grad_enabled() and head.weight.requires_grad:  # full fine-tuning: the head has a gradient too
            return super()._logps(model, hidden, batch)
        states = hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # (N, d)
        return FrozenHeadLogps.apply(states, head.weight, head.bias, batch.targets)

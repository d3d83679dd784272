"""The flat engine: one list of tokens without padding, the prompt once per pair, on transformers' own modules.

Of the model only attention (by registration), the LoRA linears and the head are ours. See `engine.choose` for the
models it serves.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt_ray.engine.agreement import disagreement
from prefopt_ray.engine.batches import Batch, shared_lengths
from prefopt_ray.engine.flat.attention import NAME, flat_attention_in
from prefopt_ray.engine.flat.head import FrozenHeadLogps, chunk_bytes
from prefopt_ray.engine.flat.layout import flat_pairs, flat_sequences
from prefopt_ray.engine.flat.lora import use_two_passes
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.errors import ModelError, Problem
from prefopt_ray.pairs.tokens import PairTokens


class LayoutError(RuntimeError):
    """The model's modules do not take the layout."""


class FlatEngine(LocalEngine):
    """LocalEngine (see engine.local) on flat batches (1, S)."""

    padded = False

    def __init__(self, model: PreTrainedModel, **settings: object) -> None:
        """Raises LayoutError when the model does not compute the same on a flat batch as on rows."""
        super().__init__(model, **settings)
        self._own_attention = model.config._attn_implementation
        why = disagreement(
            model, self._decoder, self._pair_batch, within=flat_attention_in(model), autocast=self._autocast
        )
        if why:
            raise LayoutError(f"flat batches do not suit its modules ({why})")
        self._bare_head = _is_bare(self._head, model.get_output_embeddings())
        self._reference_has_bare_head: bool | None = None  # None: it was not used yet, or is the model itself

    def _prepare_adapters(self) -> None:
        if self._slots.peft is not None:
            use_two_passes(self._slots.peft)

    def _logits_bytes(self) -> int:
        return max(super()._logits_bytes(), chunk_bytes(self._model.get_output_embeddings().weight))

    def _lengths(self, pairs: PairTokens) -> np.ndarray:
        return shared_lengths(pairs)

    def _pair_batch(self, pairs: PairTokens) -> Batch:
        return flat_pairs(pairs, device=self.device)

    def _sequence_batch(self, prompts: list[np.ndarray], completions: list[np.ndarray]) -> Batch:
        return flat_sequences(prompts, completions, device=self.device)

    def _computing(self, model: PreTrainedModel) -> AbstractContextManager:
        if model is not self._model and self._reference_has_bare_head is None:
            self._admit(model)
        return flat_attention_in(model)

    def _admit(self, reference: PreTrainedModel) -> None:
        """A reference model of its own, once. Raises ModelError when it does not take flat batches."""
        if reference.config._attn_implementation == NAME:  # a copy of the policy, made while that computed
            reference.config._attn_implementation = self._own_attention
        decoder = reference.get_decoder()
        why = disagreement(
            reference, decoder, self._pair_batch, within=flat_attention_in(reference), autocast=self._autocast
        )
        if why:
            raise ModelError(Problem(
                place=str(reference.config._name_or_path), key="model.reference", found=reference.config.model_type,
                rule=f"flat batches do not suit its modules ({why})", fix="set engine: plain",
            ))
        self._reference_has_bare_head = _is_bare(self._head_of(reference), reference.get_output_embeddings())

    def _logps(self, model: PreTrainedModel, hidden: Tensor, batch: Batch) -> Tensor:
        head = model.get_output_embeddings()
        trained = torch.is_grad_enabled() and head.weight.requires_grad  # full fine-tuning: the head has a gradient too
        bare = self._bare_head if model is self._model else self._reference_has_bare_head
        if trained or not bare or type(head) is not nn.Linear:  # scaled, capped, or under a LoRA
            return super()._logps(model, hidden, batch)
        states = hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # (N, d)
        return FrozenHeadLogps.apply(states, head.weight, head.bias, batch.targets)


def _is_bare(head: Callable[[Tensor], Tensor], linear: nn.Module) -> bool:
    """Whether a model's logits are its last linear's, without a scale or cap behind it."""
    weight = linear.weight
    states = torch.linspace(-100, 100, weight.shape[1], device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        return torch.equal(head(states), linear(states))

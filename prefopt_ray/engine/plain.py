"""The plain engine: transformers' own forward on padded batches, for any causal LM that transformers loads.

Where the model honours a mask and places of our own, both completions of a pair share one row and its prompt;
otherwise each has a row. Whether it does is found out by asking it, once.
"""

from contextlib import nullcontext

import numpy as np
from transformers import PreTrainedModel

from prefopt_ray.engine.agreement import shares_prompts
from prefopt_ray.engine.batches import Batch, pair_rows, sequence_rows, shared_lengths, shared_rows
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.pairs.tokens import PairTokens


class PlainEngine(LocalEngine):
    """LocalEngine (see engine.local) on padded rows. `share_prompt`: None = where the model can."""

    padded = True

    def __init__(self, *args: object, share_prompt: bool | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if share_prompt is None:
            share_prompt = shares_prompts(self._model, self._decoder)
        self._shared = share_prompt

    def _lengths(self, pairs: PairTokens) -> np.ndarray:
        return shared_lengths(pairs) if self._shared else 2 * pairs.longest

    def _pair_batch(self, pairs: PairTokens) -> Batch:
        if self._shared:
            dtype = self._autocast or self._model.dtype
            return shared_rows(pairs, pad_id=self._pad_id, device=self.device, dtype=dtype)
        return pair_rows(pairs, pad_id=self._pad_id, device=self.device)

    def _sequence_batch(self, prompts: list[np.ndarray], completions: list[np.ndarray]) -> Batch:
        return sequence_rows(prompts, completions, pad_id=self._pad_id, device=self.device)

    def _computing(self, model: PreTrainedModel) -> nullcontext:
        return nullcontext()

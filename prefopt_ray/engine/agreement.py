"""Whether a model computes the same for tokens laid out in another way, asked on one small pair.

Two rows, one per completion, are the layout every causal LM was made for; the others must give its hidden states.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt_ray.engine.batches import Batch, example_pair, pair_rows, shared_rows
from prefopt_ray.pairs.tokens import PairTokens

ROUNDINGS = 32  # of the model's precision, times the largest hidden value


def shares_prompts(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Whether both completions of a pair may lie in one row: the model honours places and a mask that are given."""
    if getattr(model.config, "sliding_window", None) is not None:
        return False  # a given mask replaces the window's
    return agrees(
        model, decoder, lambda pair: shared_rows(pair, pad_id=0, device=model.device, dtype=model.dtype)
    )


def agrees(
    model: PreTrainedModel,
    decoder: nn.Module,
    lay_out: Callable[[PairTokens], Batch],
    *,
    within: AbstractContextManager = nullcontext(),
) -> bool:
    """Whether the hidden states at the completions' positions, computed `within`, are those of one row per completion.

    A model that cannot take the layout's inputs at all does not agree.
    """
    pair = example_pair(prompt=5, chosen=6, rejected=4, vocabulary=model.get_input_embeddings().weight.shape[0])
    with torch.inference_mode():
        expected = _hidden(decoder, pair_rows(pair, pad_id=0, device=model.device))
        try:
            with within:
                found = _hidden(decoder, lay_out(pair))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
    limit = ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(torch.isfinite(found).all()) and bool((found - expected).abs().max() <= limit)


def _hidden(decoder: nn.Module, batch: Batch) -> Tensor:
    """(N, d) at the positions, completion by completion."""
    out = decoder(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs).last_hidden_state
    return out.reshape(-1, out.shape[-1])[batch.positions]

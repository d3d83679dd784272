"""Whether a model computes the same for tokens laid out in another way, asked on one small pair.

Two rows, one per completion, are the layout every causal LM was made for; the others must give its hidden states.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prefopt_ray.engine.batches import Batch, example_pair, pair_rows, shared_rows
from prefopt_ray.pairs.tokens import PairTokens

# How much the hidden states may differ, in roundings of the model's precision times the largest of them. Measured on
# 24 architectures: layouts that the model takes stay below 6 in float32 and 1 in bfloat16 (deeper models: more), those
# that it does not begin at 1,700 and 13.
ROUNDINGS = {torch.float32: 128, torch.bfloat16: 8}
# What a configuration calls a layer's limited view of what came before.
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
BATCH_DEPENDENT = frozenset({"dynamic", "longrope"})  # rotary frequencies that follow the longest row of a batch

log = logging.getLogger(__name__)


def shares_prompts(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Whether both completions of a pair may lie in one row: the model honours places and a mask that are given."""
    why = _own_view(model.config) or disagreement(
        model, decoder, lambda pair: shared_rows(pair, pad_id=0, device=model.device, dtype=model.dtype)
    )
    if why:
        log.info("each completion has a row with its own copy of the prompt: %s", why)
    return not why


def follows_the_batch(config: PretrainedConfig) -> str:
    """The kind of rotary frequencies that depend on the longest row of a batch; empty when they do not."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    return next((p["rope_type"] for p in each if p.get("rope_type") in BATCH_DEPENDENT), "")


def _own_view(config: PretrainedConfig) -> str:
    """Why a mask of ours would replace what the model masks itself: a small pair would not show it."""
    limits = [f"{name} {value}" for name in WINDOWS if (value := getattr(config, name, None)) is not None]
    others = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    return ", ".join([*limits, *dict.fromkeys(others), *filter(None, [follows_the_batch(config)])])


def disagreement(
    model: PreTrainedModel,
    decoder: nn.Module,
    lay_out: Callable[[PairTokens], Batch],
    *,
    within: AbstractContextManager = nullcontext(),
    autocast: torch.dtype | None = None,
) -> str:
    """How the hidden states at the completions' positions, computed `within`, differ from those of one row per
    completion; empty when they are the same to rounding. Both are computed as training will: under `autocast`, if any.

    A model that cannot take the layout's inputs at all does not agree either. Raises torch.OutOfMemoryError.
    """
    pair = example_pair(prompt=5, chosen=6, rejected=4, vocabulary=model.get_input_embeddings().weight.shape[0])
    precision = torch.autocast(model.device.type, autocast) if autocast else nullcontext()
    with torch.inference_mode(), precision:
        expected = _hidden(decoder, pair_rows(pair, pad_id=0, device=model.device))
        try:
            with within:
                found = _hidden(decoder, lay_out(pair))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    largest = expected.abs().max()
    apart = float(((found - expected).abs().max() / largest).nan_to_num(nan=float("inf")))
    dtype = autocast or expected.dtype
    allowed = ROUNDINGS.get(dtype, ROUNDINGS[torch.float32]) * torch.finfo(dtype).eps
    return "" if apart <= allowed else f"hidden states differ by {apart:.1g} of the largest, rounding by {allowed:.1g}"


def _hidden(decoder: nn.Module, batch: Batch) -> Tensor:
    """(N, d) at the positions, completion by completion."""
    out = decoder(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs).last_hidden_state
    return out.reshape(-1, out.shape[-1])[batch.positions]

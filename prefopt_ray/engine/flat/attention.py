"""Attention over a flat batch, as a function that transformers' own modules call.

Registered under NAME; without an entry of the same name among transformers' mask functions the modules build no
mask. On CUDA torch's varlen kernel, elsewhere one scaled_dot_product_attention per segment.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from prefopt_ray.engine.flat.layout import Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

NAME = "prefopt_flat"
VARLEN, BY_SEGMENT = "varlen", "sdpa by segment"


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """(1, S, H, D) from query (1, H, S, D), key and value (1, G, S, D). What cannot be computed here raises."""
    if attention_mask is not None or dropout or softcap is not None or s_aux is not None:
        raise ValueError("flat attention knows neither masks nor dropout, caps or sinks")
    query, key, value = (_as_autocast(t) for t in (query, key, value))
    keys, values = (t.index_select(2, segments.key_index) for t in (key, value))
    if attention_kernel(query.device) == VARLEN and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, keys, values, segments, scale=scaling, window=sliding_window), None
    return _by_segment(query, keys, values, segments, scale=scaling, window=sliding_window), None


def attention_kernel(device: torch.device) -> str:
    """What computes it there; float32 has no varlen kernel and goes by segment on every device."""
    return VARLEN if device.type == "cuda" and varlen_attn is not None else BY_SEGMENT


@contextmanager
def flat_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's modules call `flat_attention`; they must be given `segments=`."""
    config = model.config
    own, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = own


AttentionInterface.register(NAME, flat_attention)


def _as_autocast(tensor: Tensor) -> Tensor:
    """As autocast would for scaled_dot_product_attention: rotation leaves float32 queries and keys beside bfloat16
    values, and torch's varlen kernel is not on autocast's list."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None, window: int | None
) -> Tensor:
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (S, H, D)
    settings: dict[str, object] = {"scale": scale} if "scale" in _varlen_parameters() else {}
    if not settings and scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in _varlen_parameters():
        settings["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        settings["is_causal"] = True
    else:
        raise ValueError("this torch's varlen attention has no sliding window")
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in _varlen_parameters():
            settings["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    out = varlen_attn(
        q, k, v, segments.query_starts, segments.key_starts,
        max(segments.query_lengths), max(segments.key_lengths), **settings,
    )
    return out[None]


@cache
def _varlen_parameters() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters)


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None, window: int | None
) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    runs = zip(
        query.split(segments.query_lengths, dim=2), key.split(segments.key_lengths, dim=2),
        value.split(segments.key_lengths, dim=2), strict=True,
    )
    outputs = []
    for q, k, v in runs:
        square = q.shape[2] == k.shape[2] and (window is None or k.shape[2] <= window)
        mask = None if square else _bottom_right(q.shape[2], k.shape[2], window=window, device=q.device)
        outputs.append(scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
        ))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _bottom_right(queries: int, keys: int, *, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) True where a query sees a key: the last query sees the last key, each at most `window` back."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)

"""Padded batches of sequences and where their completions are. Masks come from lengths, never from ids."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefopt_ray.pairs.tokens import PairTokens, Ragged


@dataclass(frozen=True)
class Batch:
    """Tokens as a decoder takes them, and the N positions whose next token is a completion token.

    Completions are numbered: of B pairs first all chosen, then all rejected.
    """

    input_ids: Tensor  # (R, T) int64
    model_inputs: Mapping[str, object]  # what else the decoder is given: masks, position ids, segments
    positions: Tensor  # (N,) int64 into the flattened (R * T); the logits there predict `targets`
    targets: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64: which completion a position belongs to
    places: Tensor  # (N,) int64: which token of its completion it predicts, from 0
    row_count: int  # completions
    longest: int  # tokens of the longest completion


@dataclass(frozen=True)
class Completion:
    """Where one completion's tokens are predicted, while a batch is laid out."""

    row: int
    positions: np.ndarray  # (tokens,) into the flattened batch
    tokens: np.ndarray  # (tokens,)


def make_batch(
    ids: np.ndarray, completions: list[Completion], *, model_inputs: Mapping[str, object], device: torch.device
) -> Batch:
    """ids (R, T); `model_inputs` are on the device already."""
    lengths = [len(completion.tokens) for completion in completions]
    columns = (
        np.concatenate([completion.positions for completion in completions]),
        np.concatenate([completion.tokens for completion in completions]),
        np.repeat([completion.row for completion in completions], lengths),
        np.concatenate([np.arange(length) for length in lengths]),
    )
    positions, targets, rows, places = (on_device(column, device) for column in columns)
    return Batch(
        on_device(ids, device), model_inputs, positions, targets, rows, places,
        row_count=len(completions), longest=max(lengths),
    )


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def pair_rows(pairs: PairTokens, *, pad_id: int, device: torch.device) -> Batch:
    """(2B, T): a row for each completion, the prompt in both."""
    prompts = [pairs.prompt[i] for i in range(len(pairs))]
    completions = [pairs.chosen[i] for i in range(len(pairs))] + [pairs.rejected[i] for i in range(len(pairs))]
    return sequence_rows(prompts + prompts, completions, pad_id=pad_id, device=device)


def sequence_rows(
    prompts: list[np.ndarray], completions: list[np.ndarray], *, pad_id: int, device: torch.device
) -> Batch:
    """(R, T) from R prompts and R completions. Raises ValueError when one of them is empty."""
    require_tokens(prompts, completions)
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    width = max(lengths)
    ids, mask = (np.full((len(prompts), width), fill, dtype=np.int64) for fill in (pad_id, 0))
    found = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), lengths[row]
        ids[row, :start], ids[row, start:end] = prompt, completion
        mask[row, :end] = 1
        found.append(Completion(row, np.arange(start - 1, end - 1) + row * width, completion))
    return make_batch(ids, found, model_inputs={"attention_mask": on_device(mask, device)}, device=device)


def shared_rows(pairs: PairTokens, *, pad_id: int, device: torch.device, dtype: torch.dtype) -> Batch:
    """(B, T): a row for each pair, prompt + chosen + rejected, the completions without their last tokens, which
    predict nothing. A mask (B, 1, T, T) to be added to the scores hides the chosen from the rejected completion."""
    require_tokens(pairs.prompt, pairs.chosen, pairs.rejected)
    count, width = len(pairs), int(shared_lengths(pairs).max())
    ids, places = np.full((count, width), pad_id, dtype=np.int64), np.zeros((count, width), dtype=np.int64)
    chosen_found, rejected_found = [], []
    for row in range(count):
        prompt, chosen, rejected = pairs.prompt[row], pairs.chosen[row], pairs.rejected[row]
        fork, branch = len(prompt), len(prompt) + len(chosen) - 1
        end = branch + len(rejected) - 1
        ids[row, :end] = np.concatenate([prompt, chosen[:-1], rejected[:-1]])
        places[row, :branch], places[row, branch:end] = np.arange(branch), np.arange(fork, fork + end - branch)
        flat = np.arange(end) + row * width
        chosen_found.append(Completion(row, flat[fork - 1 : branch], chosen))
        rejected_found.append(Completion(count + row, np.concatenate([flat[fork - 1 : fork], flat[branch:]]), rejected))
    inputs = {"position_ids": on_device(places, device), "attention_mask": _forked_mask(pairs, width, device, dtype)}
    return make_batch(ids, chosen_found + rejected_found, model_inputs=inputs, device=device)


def shared_lengths(pairs: PairTokens) -> np.ndarray:
    """(N,) tokens of each pair with its prompt once and without the two tokens that predict nothing."""
    return pairs.prompt.lengths + pairs.chosen.lengths + pairs.rejected.lengths - 2


def _forked_mask(pairs: PairTokens, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) 0 where a query sees a key, the dtype's lowest number elsewhere: every row of it stays finite."""
    fork = on_device(pairs.prompt.lengths, device)[:, None, None]
    branch = on_device(pairs.prompt.lengths + pairs.chosen.lengths - 1, device)[:, None, None]
    query = torch.arange(width, device=device)[None, :, None]
    key = torch.arange(width, device=device)[None, None, :]
    hidden = (key > query) | ((query >= branch) & (key >= fork) & (key < branch))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None]


def require_tokens(*columns: Ragged | list[np.ndarray]) -> None:
    """Raise ValueError for an empty sequence, or columns of different lengths."""
    if len({len(column) for column in columns}) != 1:
        raise ValueError("every prompt needs its completion")
    if not all(_all_filled(column) for column in columns):
        raise ValueError("every prompt and every completion needs at least one token")


def _all_filled(column: Ragged | list[np.ndarray]) -> bool:
    return bool(column.lengths.all()) if isinstance(column, Ragged) else all(map(len, column))


def example_pair(*, prompt: int, chosen: int, rejected: int, vocabulary: int) -> PairTokens:
    """One pair of so many tokens, to try a model on; the completions differ from their first token on."""
    ids = np.arange(1, prompt + chosen + rejected + 1) % vocabulary
    prompt_ids, chosen_ids, rejected_ids = np.split(ids, [prompt, prompt + chosen])
    zero = np.zeros(1, dtype=np.int64)
    return PairTokens(zero, zero, *(ragged([part]) for part in (prompt_ids, chosen_ids, rejected_ids)))


def scoring_order(lengths: np.ndarray, *, token_budget: int, padded: bool) -> list[np.ndarray]:
    """Index groups of similar length, longest first, each within `token_budget` (one row at least); `padded`: every
    row of a group counts as its longest.

    Depends on the lengths alone, so the reference pass and every evaluation of a part see the same
    shapes: on CPU an untrained policy then equals its reference to the last bit.
    """
    order = np.argsort(lengths, kind="stable")[::-1]
    return [order[span] for span in runs_within(lengths[order], token_budget=token_budget, padded=padded)]


def runs_within(lengths: np.ndarray, *, token_budget: int, padded: bool) -> list[slice]:
    """Consecutive rows as slices, each within `token_budget` (one row at least)."""
    spans, start, longest, total = [], 0, 0, 0
    for row, length in enumerate(lengths.tolist()):
        longest, total = max(longest, length), total + length
        size = longest * (row + 1 - start) if padded else total
        if size > token_budget and row > start:
            spans.append(slice(start, row))
            start, longest, total = row, length, length
    return [*spans, slice(start, len(lengths))] if len(lengths) else []


def left_padded(prompts: list[np.ndarray], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, T) ids and mask for generation, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def ragged(sequences: list[np.ndarray]) -> Ragged:
    return Ragged.from_rows(sequences)

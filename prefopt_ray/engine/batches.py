"""Padded batches of sequences and where their completions are. Masks come from lengths, never from ids."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefopt_ray.pairs.tokens import PairTokens, Ragged


@dataclass(frozen=True)
class SequenceBatch:
    """R right-padded sequences of T tokens, and the N positions whose next token is a completion token."""

    input_ids: Tensor  # (R, T) int64
    attention_mask: Tensor  # (R, T) int64
    positions: Tensor  # (N,) int64 into the flattened (R * T); the logits there predict `targets`
    targets: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64: which sequence a position belongs to
    places: Tensor  # (N,) int64: which token of its completion it predicts, from 0

    @property
    def row_count(self) -> int:
        return self.input_ids.shape[0]


def pair_batch(pairs: PairTokens, *, pad_id: int, device: torch.device) -> SequenceBatch:
    """(2B, T), all chosen first, then all rejected."""
    prompts = [pairs.prompt[i] for i in range(len(pairs))]
    completions = [pairs.chosen[i] for i in range(len(pairs))] + [pairs.rejected[i] for i in range(len(pairs))]
    return sequence_batch(prompts + prompts, completions, pad_id=pad_id, device=device)


def sequence_batch(
    prompts: list[np.ndarray], completions: list[np.ndarray], *, pad_id: int, device: torch.device
) -> SequenceBatch:
    """(R, T) from R prompts and R completions. Raises ValueError when one of them is empty."""
    if not all(len(p) and len(c) for p, c in zip(prompts, completions, strict=True)):
        raise ValueError("every prompt and every completion needs at least one token")
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    width = max(lengths)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    positions, targets, rows, places = [], [], [], []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt)
        ids[row, :start], ids[row, start : lengths[row]] = prompt, completion
        mask[row, : lengths[row]] = 1
        positions.append(np.arange(start - 1, lengths[row] - 1) + row * width)
        targets.append(completion.astype(np.int64))
        rows.append(np.full(len(completion), row, dtype=np.int64))
        places.append(np.arange(len(completion)))
    arrays = (ids, mask, *(np.concatenate(column) for column in (positions, targets, rows, places)))
    return SequenceBatch(*(torch.from_numpy(a).to(device) for a in arrays))


def scoring_order(lengths: np.ndarray, *, token_budget: int) -> list[np.ndarray]:
    """Index groups of similar length whose padded size stays within `token_budget` (one row at least).

    Depends on the lengths alone, so the reference pass and every evaluation of a part see the same
    shapes: on CPU an untrained policy then equals its reference to the last bit.
    """
    order = np.argsort(lengths, kind="stable")[::-1]
    groups: list[np.ndarray] = []
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        groups.append(order[start : start + rows])
        start += rows
    return groups


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
    return Ragged.from_lists([s.tolist() for s in sequences])

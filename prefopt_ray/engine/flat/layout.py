"""Pairs and sequences as one flat list of tokens: no padding, a pair's prompt once for both its completions.

A pair lies as prompt, chosen, rejected, each completion without its last token, which predicts nothing. Attention
sees it as two segments: prompt + chosen looks back on itself, rejected on prompt + rejected. Knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prefopt_ray.engine.batches import Batch, Completion, make_batch, on_device, require_tokens
from prefopt_ray.pairs.tokens import PairTokens


@dataclass(frozen=True)
class Segments:
    """M runs of queries, in the order of the flat tokens, and the keys that each run ends on: query i of a run with
    q queries and k keys sees keys 0 .. k - q + i (causality aligned at the bottom right)."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]  # each at least its run's queries
    key_index: Tensor  # (K,) int64: which flat token each key is, run after run

    @cached_property
    def query_starts(self) -> Tensor:  # (M + 1,) int32
        return _starts(self.query_lengths, self.key_index.device)

    @cached_property
    def key_starts(self) -> Tensor:  # (M + 1,) int32
        return _starts(self.key_lengths, self.key_index.device)


def flat_pairs(pairs: PairTokens, *, device: torch.device) -> Batch:
    """(1, S) of B pairs."""
    require_tokens(pairs.prompt, pairs.chosen, pairs.rejected)
    count = len(pairs)
    forks = [(pairs.prompt[i], ((i, pairs.chosen[i]), (count + i, pairs.rejected[i]))) for i in range(count)]
    return _laid_out(forks, device)


def flat_sequences(prompts: list[np.ndarray], completions: list[np.ndarray], *, device: torch.device) -> Batch:
    """(1, S) of R prompts, each with one completion."""
    require_tokens(prompts, completions)
    return _laid_out([(p, ((i, c),)) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))], device)


# A prompt and its completions, each with its number.
_Fork = tuple[np.ndarray, tuple[tuple[int, np.ndarray], ...]]


def _laid_out(forks: Sequence[_Fork], device: torch.device) -> Batch:
    ids, places, keys, found = [], [], [], []
    query_lengths, key_lengths = [], []
    end = 0
    for prompt, branches in forks:
        prompt_tokens, end = np.arange(end, end + len(prompt)), end + len(prompt)
        ids.append(prompt)
        places.append(np.arange(len(prompt)))
        for branch, (row, completion) in enumerate(branches):
            own, end = np.arange(end, end + len(completion) - 1), end + len(completion) - 1
            ids.append(completion[:-1])
            places.append(np.arange(len(prompt), len(prompt) + len(own)))
            found.append(Completion(row, np.concatenate([prompt_tokens[-1:], own]), completion))
            queries = len(own) if branch else len(prompt) + len(own)  # the first branch's run holds the prompt too
            if queries:  # a completion of one token is predicted by the prompt alone
                keys += [prompt_tokens, own]
                query_lengths.append(queries)
                key_lengths.append(len(prompt) + len(own))
    segments = Segments(tuple(query_lengths), tuple(key_lengths), on_device(np.concatenate(keys), device))
    inputs = {"position_ids": on_device(np.concatenate(places), device)[None], "segments": segments}
    return make_batch(np.concatenate(ids)[None], found, model_inputs=inputs, device=device)


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)

"""Tokenised preference pairs as flat numpy arrays: what every engine trains on.

Flat arrays with offsets pass through Ray's object store without a copy (one per node) and store
without padding. Knows nothing of text, templates or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """N variable-length integer sequences: `values[offsets[i]:offsets[i + 1]]` is the i-th."""

    values: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (N + 1,) int64

    @classmethod
    def from_lists(cls, sequences: list[list[int]]) -> "Ragged":
        flat = [token for sequence in sequences for token in sequence]
        return cls(np.asarray(flat, dtype=np.int32), _offsets([len(sequence) for sequence in sequences]))

    @classmethod
    def from_rows(cls, sequences: Sequence[np.ndarray]) -> "Ragged":
        values = np.concatenate([np.empty(0, dtype=np.int32), *sequences], dtype=np.int32, casting="same_kind")
        return cls(values, _offsets([len(sequence) for sequence in sequences]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:  # (N,) int64
        return np.diff(self.offsets)

    def take(self, indices: np.ndarray) -> "Ragged":
        """Sequences by index, an index as often as it is given."""
        lengths = self.lengths[indices]
        offsets = _offsets(lengths)
        # A value's place: where its sequence begins here, and how far into it the value is.
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(self.offsets[:-1][indices], lengths) + within], offsets)


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N + 1,) int64"""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class PairTokens:
    """N pairs. The prompt's tokens are shared by both completions; completions end with their end-of-turn
    token unless they were cut."""

    row_ids: np.ndarray  # (N,) int64: row number in the source, unique within a part
    groups: np.ndarray  # (N,) int64: equal for pairs of the same first human turn (clusters standard errors)
    prompt: Ragged
    chosen: Ragged
    rejected: Ragged
    scores: np.ndarray | None = None  # (N, 2) float32, finite: chosen, rejected, in the scorer's unit

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def longest(self) -> np.ndarray:
        """(N,) tokens of the longer of prompt + chosen and prompt + rejected."""
        return self.prompt.lengths + np.maximum(self.chosen.lengths, self.rejected.lengths)

    def take(self, indices: np.ndarray) -> "PairTokens":
        indices = np.asarray(indices)
        return PairTokens(
            self.row_ids[indices], self.groups[indices],
            self.prompt.take(indices), self.chosen.take(indices), self.rejected.take(indices),
            None if self.scores is None else self.scores[indices],
        )

    def first_of_groups(self, wanted: int) -> np.ndarray:
        """Indices of the first pair of each of the first `wanted` prompts, in pair order."""
        _, first = np.unique(self.groups, return_index=True)
        return np.sort(first)[:wanted]

    def arrays(self) -> dict[str, np.ndarray]:
        """Flat named arrays, for storage and hashing; `scores` only where there are some."""
        out = {"row_ids": self.row_ids, "groups": self.groups}
        if self.scores is not None:
            out["scores"] = self.scores
        for name in ("prompt", "chosen", "rejected"):
            ragged = getattr(self, name)
            out[f"{name}.values"], out[f"{name}.offsets"] = ragged.values, ragged.offsets
        return out

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "PairTokens":
        ragged = {n: Ragged(arrays[f"{n}.values"], arrays[f"{n}.offsets"]) for n in ("prompt", "chosen", "rejected")}
        return cls(arrays["row_ids"], arrays["groups"], **ragged, scores=arrays.get("scores"))


@dataclass(frozen=True)
class SweepData:
    """Three parts, disjoint by first human turn: train on one, select on one, quote the third."""

    train: PairTokens
    select: PairTokens
    test: PairTokens
    pad_id: int  # fills the right side of a batch; masks come from lengths, so any valid id serves
    eos_ids: tuple[int, ...] = ()  # what ends a sampled completion
    digest: str = ""  # content hash over token ids, rows and truncation

    @property
    def parts(self) -> dict[str, PairTokens]:
        return {"train": self.train, "select": self.select, "test": self.test}

"""Pairs of random tokens whose lengths are those of real preference data, or fixed.

Padding, and so what a batch costs, depends on how lengths spread, not on what the tokens say.
"""

from dataclasses import dataclass

import numpy as np

from prefopt_ray.pairs.tokens import PairTokens, Ragged

FIRST_WORD = 3  # ids below it pad, begin and end


@dataclass(frozen=True)
class LengthShape:
    """How many tokens prompts and completions have: log-normal around their means, or exactly the means.

    `spread` is the standard deviation of the logarithm; 0 = every pair alike. Both completions of a pair are drawn
    apart, and each pair is cut to `max_tokens`: the prompt down to a quarter of it at most, then the completions.
    """

    name: str
    prompt: float  # mean tokens
    chosen: float
    rejected: float
    batch_pairs: int
    prompt_spread: float = 0.0
    completion_spread: float = 0.0
    padding: float = 1.0  # padded over real tokens, in random batches of `batch_pairs`
    max_tokens: int = 1024

    def draw(self, count: int, *, seed: int = 0) -> np.ndarray:
        """(count, 3) int64 tokens of prompt, chosen, rejected; each at least 2."""
        rng = np.random.default_rng(seed)
        means = np.array([self.prompt, self.chosen, self.rejected])
        spreads = np.array([self.prompt_spread, self.completion_spread, self.completion_spread])
        drawn = means * np.exp(spreads * rng.standard_normal((count, 3)) - spreads**2 / 2)
        return _cut(np.maximum(2, np.rint(drawn)).astype(np.int64), self.max_tokens)

    def draw_typical(self, batches: int, *, tries: int = 300) -> np.ndarray:
        """(batches x batch_pairs, 3): of many draws the one whose mean lengths and padding are nearest to what they
        should be. A handful of batches is all that is timed, and one long pair would decide what they cost."""
        wanted = np.array([self.prompt, self.chosen, self.rejected, self.padding])
        draws = [self.draw(batches * self.batch_pairs, seed=seed) for seed in range(tries)]

        def distance(lengths: np.ndarray) -> float:
            found = np.append(lengths.mean(0), padding_factor(lengths, batch=self.batch_pairs))
            return float(np.abs(np.log(found / wanted)).sum())

        return min(draws, key=distance)


SHAPES = {
    shape.name: shape
    for shape in (
        # Means of Anthropic's hh-rlhf; the spreads give the padding factors measured on its harmless-base test rows in
        # random order: 1.5, 2.0, 2.6, 3.2 at batches of 2, 4, 8, 16 (tests/test_benchmark_measures.py).
        LengthShape("hh", 116, 40, 50, batch_pairs=8, prompt_spread=0.92, completion_spread=0.92, padding=2.6),
        LengthShape("160-96", 160, 96, 96, batch_pairs=4),
        LengthShape("512-256", 512, 256, 256, batch_pairs=8),
        # As 300 chat pairs from a few words to thousands of characters, cut at 1024 tokens of an 8k vocabulary.
        LengthShape("sharegpt", 254, 328, 358, batch_pairs=4, prompt_spread=0.9, completion_spread=0.7, padding=1.7),
    )
}


def random_pairs(lengths: np.ndarray, *, vocabulary: int, seed: int = 0) -> PairTokens:
    """Pairs of (N, 3) lengths and uniformly drawn tokens, each completion with an end token."""
    rng = np.random.default_rng(seed)
    rows = np.arange(len(lengths))
    prompt, chosen, rejected = (_tokens(rng, column, vocabulary) for column in lengths.T)
    return PairTokens(rows, rows, prompt, _ended(chosen), _ended(rejected))


def padding_factor(lengths: np.ndarray, *, batch: int) -> float:
    """Padded over real tokens where both rows of every pair are padded to their batch's longest. (N, 3), N >= batch."""
    whole = lengths[: len(lengths) // batch * batch].reshape(-1, batch, 3)
    longest = (whole[..., 0] + whole[..., 1:].max(-1)).max(-1)  # (batches,)
    return float(2 * batch * longest.sum() / (2 * whole[..., 0] + whole[..., 1] + whole[..., 2]).sum())


def pair_lengths(pairs: PairTokens) -> np.ndarray:
    """(N, 3) tokens of prompt, chosen, rejected."""
    return np.stack([pairs.prompt.lengths, pairs.chosen.lengths, pairs.rejected.lengths], axis=1)


def _cut(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    longest = lengths[:, 1:].max(1)
    keep = np.minimum(lengths[:, 0], np.maximum(max_tokens // 4, max_tokens - longest))
    return np.column_stack([keep, np.minimum(lengths[:, 1:], (max_tokens - keep)[:, None])])


def _tokens(rng: np.random.Generator, lengths: np.ndarray, vocabulary: int) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(rng.integers(FIRST_WORD, vocabulary, offsets[-1]).astype(np.int32), offsets)


def _ended(ragged: Ragged) -> Ragged:
    values = ragged.values.copy()
    values[ragged.offsets[1:] - 1] = 2
    return Ragged(values, ragged.offsets)

"""The gold language: sixteen words, a fixed Markov chain that speaks it, and the true reward r* of a completion.

Because r* is known, over-optimisation can be seen against the truth instead of against another model's opinion.
Numpy only; knows nothing of models, tokenizers or files. Scale: the language's own completions have a mean reward of
1.1 (sd 1.3), those of the base model trained on it 0.9 (sd 1.4); 4.7 is the most there is.
"""

from functools import cache

import numpy as np

WORDS: tuple[str, ...] = tuple("abcdefghijklmnop")
BOS, SEP, EOS, PAD = "<s>", ">", "</s>", "<pad>"
VOCABULARY: tuple[str, ...] = (*WORDS, BOS, SEP, EOS, PAD)  # position = token id; content words are 0..15
TOKEN_IDS: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}

PROMPT_WORDS = 4
MIN_WORDS, MAX_WORDS = 5, 13  # of a corpus completion
MAX_NEW_TOKENS = 16  # enough for every corpus completion and its EOS, with room to run on

_CHAIN_SEED = 0
_CHAIN_SCALE = 1.5  # sd of the transition logits
_COPY_CHANCE = 0.2  # a corpus word is taken from the prompt instead of from the chain


@cache
def chain_logp() -> np.ndarray:
    """(16, 16) float64: log P(next word | word) of the language. One fixed draw; rows sum to 1. Read-only."""
    logits = np.random.default_rng(_CHAIN_SEED).normal(0.0, _CHAIN_SCALE, size=(len(WORDS), len(WORDS)))
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logp.setflags(write=False)
    return logp


def prompt_words(indices: np.ndarray) -> np.ndarray:
    """(N,) numbers in [0, 16^4) -> (N, 4) word ids: every possible prompt has one number."""
    powers = len(WORDS) ** np.arange(PROMPT_WORDS - 1, -1, -1)
    return (np.asarray(indices)[:, None] // powers) % len(WORDS)


def draw_corpus(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the supervised model learns from: uniform prompts and completions of the chain.

    Returns prompts (count, 4), completions (count, 13) and lengths (count,), int64; words past the length are filler.
    The chain starts from the prompt's last word; each word is a random prompt word with chance 0.2.
    """
    cumulative = np.exp(chain_logp()).cumsum(axis=1)
    rows = np.arange(count)
    prompts = prompt_words(rng.integers(len(WORDS) ** PROMPT_WORDS, size=count))
    lengths = rng.integers(MIN_WORDS, MAX_WORDS + 1, size=count)
    completions = np.empty((count, MAX_WORDS), dtype=np.int64)
    previous = prompts[:, -1]
    for position in range(MAX_WORDS):
        spoken = (rng.random(count)[:, None] > cumulative[previous]).sum(axis=1)
        spoken = np.minimum(spoken, len(WORDS) - 1)  # rounding can leave a row's sum a hair under 1
        copied = prompts[rows, rng.integers(PROMPT_WORDS, size=count)]
        previous = np.where(rng.random(count) < _COPY_CHANCE, copied, spoken)
        completions[:, position] = previous
    return prompts, completions, lengths


def gold_rewards(
    prompts: np.ndarray, completions: np.ndarray, *, lengths: np.ndarray, finished: np.ndarray
) -> np.ndarray:
    """r* of N completions, (N,) float64, at most 4.7.

    r* = distinct prompt words covered - 0.5 (words equal to the word before) - 0.5 (uses of a word beyond its second)
         + 0.7 min(mean chain log-prob + 3, 1) - 0.35 |length - 8| - 2 [no EOS]

    prompts (N, 4) word ids, completions (N, L) token ids, lengths (N,) <= L without EOS, finished (N,) bool = EOS came.
    The chain starts from the prompt's last word. A token that is no word (a policy may emit SEP) counts like one in
    length and repeats, and its transitions are as unlikely as the chain's least likely one. Without any word the
    chain term is 0.
    """
    inside = np.arange(completions.shape[1]) < lengths[:, None]  # (N, L)
    before = np.concatenate([prompts[:, -1:], completions], axis=1)[:, :-1]  # (N, L) the token each one follows
    counts = _token_counts(completions, inside)
    covered = _distinct_prompt_words(prompts) & (counts[:, : len(WORDS)] > 0)
    repeated = (completions[:, 1:] == completions[:, :-1]) & inside[:, 1:]
    return (
        covered.sum(axis=1)
        - 0.5 * repeated.sum(axis=1)
        - 0.5 * np.maximum(counts - 2, 0).sum(axis=1)
        + 0.7 * _fluency(before, completions, inside=inside)
        - 0.35 * np.abs(lengths - 8)
        - 2.0 * ~np.asarray(finished, dtype=bool)
    )


def _token_counts(completions: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(N, 20): how often each token is used within the length."""
    return np.stack([((completions == token) & inside).sum(axis=1) for token in range(len(VOCABULARY))], axis=1)


def _distinct_prompt_words(prompts: np.ndarray) -> np.ndarray:
    """(N, 16) bool: the word occurs in the prompt (a prompt may hold a word twice; it is covered once)."""
    return (prompts[:, :, None] == np.arange(len(WORDS))).any(axis=1)


def _fluency(before: np.ndarray, completions: np.ndarray, *, inside: np.ndarray) -> np.ndarray:
    """(N,) min(mean chain log-prob + 3, 1); 0 for an empty completion."""
    words = len(WORDS)
    logp = np.full((len(VOCABULARY), len(VOCABULARY)), chain_logp().min())
    logp[:words, :words] = chain_logp()
    spoken = inside.sum(axis=1)
    total = np.where(inside, logp[before, completions], 0.0).sum(axis=1)
    return np.where(spoken > 0, np.minimum(total / np.maximum(spoken, 1) + 3.0, 1.0), 0.0)

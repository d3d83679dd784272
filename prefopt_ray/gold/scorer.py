"""The gold reward as a scorer of the policy's own samples: text in, r* out.

Knows the language's text form only; nothing of models or of how completions were sampled.
"""

from collections.abc import Sequence

import numpy as np

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.gold.language import BOS, PAD, PROMPT_WORDS, SEP, TOKEN_IDS, VOCABULARY, WORDS, gold_rewards
from prefopt_ray.train.scorers import Completion


class GoldScorer:
    """r* of (prompt text, completion): a `Scorer`."""

    name = "gold"

    def score(self, prompts: Sequence[str], completions: Sequence[Completion]) -> np.ndarray:
        """(N,) float64, higher is better. Raises DataError for text that is not of the gold language."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
        if not prompts:
            return np.zeros(0)
        words = np.stack([_prompt_ids(prompt) for prompt in prompts])  # (N, 4)
        tokens = [_completion_ids(completion) for completion in completions]
        lengths = np.array([len(row) for row in tokens])
        padded = np.full((len(tokens), max(1, lengths.max())), TOKEN_IDS[PAD])  # (N, L)
        for row, ids in zip(padded, tokens):
            row[: len(ids)] = ids
        finished = np.array([completion.finished for completion in completions])
        return gold_rewards(words, padded, lengths=lengths, finished=finished)


def _prompt_ids(prompt: str) -> list[int]:
    """Four word ids. BOS and SEP may be there or not, as the decoder left them."""
    words = [word for word in prompt.split() if word not in (BOS, SEP)]
    if len(words) != PROMPT_WORDS or not set(words) <= set(WORDS):
        raise DataError(_not_gold("prompt", prompt, f"{PROMPT_WORDS} words of {WORDS[0]} to {WORDS[-1]}, then {SEP}"))
    return [TOKEN_IDS[word] for word in words]


def _completion_ids(completion: Completion) -> list[int]:
    words = completion.text.split()
    if not set(words) <= set(VOCABULARY):
        raise DataError(_not_gold("completion", completion.text, f"words of {WORDS[0]} to {WORDS[-1]}"))
    # A decoder that skips special tokens hides sampled <pad>s; the policy must not get them for free.
    hidden = max(0, completion.tokens - len(words))
    return [TOKEN_IDS[word] for word in words] + [TOKEN_IDS[PAD]] * hidden


def _not_gold(key: str, text: str, expected: str) -> Problem:
    fix = "the gold reward knows no other language"
    return Problem("gold scorer", key, repr(text[:80]), f"must be {expected}", fix)

"""Preference pairs of the gold language: two samples of the base model, labelled at random by the true reward.

Labels follow Bradley-Terry at temperature 1, so about a quarter disagree with r*: no model can rank them all, and one
that does on its training pairs has memorised noise. Knows nothing of tokenised pairs or training.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.gold.base import one_thread, prompt_ids
from prefopt_ray.gold.language import (
    BOS,
    EOS,
    MAX_NEW_TOKENS,
    PAD,
    PROMPT_WORDS,
    SEP,
    TOKEN_IDS,
    WORDS,
    gold_rewards,
    prompt_words,
)

SPLITS: tuple[str, ...] = ("train", "select", "test")

_ROWS_VERSION = 3  # raise it when the rows of a base model change: their cache files carry it
GoldRow = dict[str, str | float]

_CHUNK_PROMPTS = 256  # fixed, so that fewer pairs are always the first of more pairs
_PROMPT_SHARES = {"train": (0.0, 0.5), "select": (0.5, 0.75), "test": (0.75, 1.0)}


def gold_rows(base: Path, *, split: str, pairs: int, seed: int = 0) -> list[GoldRow]:
    """`pairs` rows of text {prompt, chosen, rejected}, such as "a c f b >", " d e a c f", " b b d k p", and the
    completions' true rewards {chosen_score, rejected_score}.

    The same arguments give the same rows. Prompts are distinct within a split, and splits share none whatever the
    seeds. Both completions are finished, not empty and not equal. Cached in `base/rows/`. Raises DataError for an
    unknown split or more pairs than prompts.
    """
    _check(split, pairs)
    file = Path(base) / "rows" / f"v{_ROWS_VERSION}-{split}-{pairs}-seed{seed}.json"
    if not file.is_file():
        _write_whole(file, json.dumps(_draw_rows(Path(base), split=split, pairs=pairs, seed=seed)))
    return json.loads(file.read_text(encoding="utf-8"))


def with_flipped_labels(rows: Sequence[GoldRow], share: float, *, seed: int = 0) -> list[GoldRow]:
    """The rows with chosen and rejected turned around in round(share N) of them, whichever was truly better.

    Noise on top of the labels' own: those are flips a Bradley-Terry rater makes, most where the rewards are close.
    """
    turned = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    out = [dict(row) for row in rows]
    for index in turned:
        for ending in ("", "_score"):
            for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
                out[index][side + ending] = rows[index][other + ending]
    return out


def prompt_text(words: np.ndarray) -> str:
    """(4,) word ids -> "a c f b >"."""
    return " ".join([*(WORDS[word] for word in words), SEP])


def _check(split: str, pairs: int) -> None:
    if split not in SPLITS:
        raise DataError(Problem("gold", "split", repr(split), f"must be one of {', '.join(SPLITS)}"))
    # A few prompts in a hundred give no pair (equal or unfinished samples), so not every prompt can be promised.
    most = int(0.9 * len(_split_prompts(split)))
    if not 1 <= pairs <= most:
        raise DataError(Problem("gold", "pairs", str(pairs), f"the gold language has 1 to {most} pairs in {split!r}"))


def _split_prompts(split: str) -> np.ndarray:
    """The numbers of a split's prompts. The division is fixed: rows of different seeds never leak across splits."""
    shuffled = np.random.default_rng(0).permutation(len(WORDS) ** PROMPT_WORDS)
    first, last = (int(share * len(shuffled)) for share in _PROMPT_SHARES[split])
    return shuffled[first:last]


def _draw_rows(base: Path, *, split: str, pairs: int, seed: int) -> list[GoldRow]:
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    prompts = prompt_words(rng.permutation(_split_prompts(split)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows: list[GoldRow] = []
    for start in range(0, len(prompts), _CHUNK_PROMPTS):
        rows += _pairs_of(model, prompts[start : start + _CHUNK_PROMPTS], rng=rng, generator=generator)
        if len(rows) >= pairs:
            return rows[:pairs]
    raise DataError(
        Problem(str(base), "pairs", f"{len(rows)} usable pairs of {pairs}", "the base model must finish its samples",
                "delete the folder so that it is built again")
    )


def _pairs_of(
    model: PreTrainedModel, prompts: np.ndarray, *, rng: np.random.Generator, generator: torch.Generator
) -> list[GoldRow]:
    """Rows of the prompts (N, 4) whose two samples make a pair, in order."""
    twice = np.repeat(prompts, 2, axis=0)
    tokens, lengths, finished = _sample(model, twice, generator=generator)
    rewards = gold_rewards(twice, tokens, lengths=lengths, finished=finished).reshape(-1, 2)  # (N, 2)
    first_wins = rng.random(len(prompts)) < 1.0 / (1.0 + np.exp(rewards[:, 1] - rewards[:, 0]))
    # With a space in front, as any text that follows a prompt.
    texts = ["".join(f" {WORDS[token]}" for token in row[:length]) for row, length in zip(tokens, lengths)]
    rows = []
    for index, prompt in enumerate(prompts):
        first, second = texts[2 * index], texts[2 * index + 1]
        if finished[2 * index] and finished[2 * index + 1] and first and second and first != second:
            chosen, rejected = (0, 1) if first_wins[index] else (1, 0)
            rows.append({
                "prompt": prompt_text(prompt), "chosen": texts[2 * index + chosen],
                "rejected": texts[2 * index + rejected], "chosen_score": float(rewards[index, chosen]),
                "rejected_score": float(rewards[index, rejected]),
            })
    return rows


@torch.no_grad()
def _sample(
    model: PreTrainedModel, prompts: np.ndarray, *, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One completion at temperature 1 for each prompt (N, 4): tokens (N, 16), lengths (N,) without EOS, finished (N,).

    Only words and EOS are drawn: the base model gives the other three tokens next to no mass, and in a row's text
    they would be markup instead of language.
    """
    never = [TOKEN_IDS[token] for token in (BOS, SEP, PAD)]
    next_ids, cache, drawn = prompt_ids(prompts), DynamicCache(), []
    with one_thread():
        for _ in range(MAX_NEW_TOKENS):
            logits = model(input_ids=next_ids, past_key_values=cache, use_cache=True).logits[:, -1]  # (N, 20)
            logits[:, never] = -torch.inf
            next_ids = torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)  # (N, 1)
            drawn.append(next_ids)
    return _until_eos(torch.cat(drawn, dim=1))


def _until_eos(drawn: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, T) drawn tokens -> the same, lengths before the first EOS (T where none came), and whether one came."""
    tokens = drawn.numpy()
    is_eos = tokens == TOKEN_IDS[EOS]
    finished = is_eos.any(axis=1)
    return tokens, np.where(finished, is_eos.argmax(axis=1), tokens.shape[1]), finished


def _write_whole(file: Path, text: str) -> None:
    """Appears at once and complete; a process that races writes the same content."""
    file.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, file)

"""The tiny base model of the gold language: supervised training from nothing, saved as an ordinary model folder.

`AutoModelForCausalLM` and `AutoTokenizer` load it like any other model; nothing downstream knows that it is special.
It is built once (about 15 s on one core) and cached. Knows the language, but neither its reward nor any pairs.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt_ray.gold.language import (
    BOS,
    EOS,
    MAX_WORDS,
    PAD,
    PROMPT_WORDS,
    SEP,
    TOKEN_IDS,
    VOCABULARY,
    chain_logp,
    draw_corpus,
)

Progress = Callable[[int, int], None]  # (done, total)

PROMPT_TOKENS = PROMPT_WORDS + 2  # BOS, four words, SEP


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides the base model, beside language and seed. A change makes a new cache entry."""

    version: int = 1  # raise it when `build_gold_base` changes in a way the fields below do not show
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    intermediate: int = 128  # 256 learns no more (2.24 nats per token) and steps half again as slowly
    steps: int = 700
    batch_rows: int = 64
    peak_learning_rate: float = 3e-3
    max_grad_norm: float = 1.0


RECIPE = BaseRecipe()


def ensure_gold_base(cache: Path, *, progress: Progress | None = None) -> Path:
    """The base model's folder `cache/gold/<recipe>`, built if it is not there yet.

    Processes that race both build; the first rename wins, and the other's identical copy is discarded.
    """
    folder = Path(cache) / "gold" / _recipe_key()
    if not folder.is_dir():  # folders only ever appear by rename, so one that exists is complete
        build_gold_base(folder, progress=progress)
    return folder


def build_gold_base(folder: Path, *, seed: int = 0, progress: Progress | None = None) -> None:
    """Train the base model and save model and tokenizer to `folder`; one that already exists is kept.

    Runs on one CPU thread, whatever the caller's setting, so that the same seed gives the same bytes. `progress` is
    called after each step. The global RNG and the thread count are as before when it returns.
    """
    with appearing_whole(folder) as building:
        model = _train(RECIPE, seed, progress=progress or _no_progress)
        model.save_pretrained(building)
        gold_tokenizer().save_pretrained(building)


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into; it becomes `folder` at once and complete, or not at all.

    One that appeared meanwhile is kept and what was written is discarded: racing processes write the same.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield building
        _publish(building, folder)
    finally:
        if building.exists():  # not when it was published
            shutil.rmtree(building)


def gold_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `"a c f b >"` -> BOS a c f b SEP. Adds BOS, never EOS; decodes to words joined by spaces.

    Spaces are optional around SEP only, so prompt text + completion text reads the same with or without one between.
    There is no unknown token: other words raise instead of turning into something the model was never trained on.
    """
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, TOKEN_IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        padding_side="right", clean_up_tokenization_spaces=False,
    )


def prompt_ids(prompts: np.ndarray) -> Tensor:
    """(N, 4) word ids -> (N, 6) int64 token ids: BOS, the words, SEP."""
    words = torch.from_numpy(np.asarray(prompts, dtype=np.int64))
    ends = [torch.full((len(words), 1), TOKEN_IDS[token]) for token in (BOS, SEP)]
    return torch.cat([ends[0], words, ends[1]], dim=1)


def corpus_nll(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per completion token (EOS counts), scalar.

    ids (N, T): prompt, completion, EOS, PAD. Padding is on the right, so causal attention needs no mask.
    """
    targets = ids[:, PROMPT_TOKENS:]  # (N, T - 6)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :]  # (N, T - 6, 20)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=TOKEN_IDS[PAD])


def corpus_ids(seed: int, rows: int) -> Tensor:
    """(rows, 20) int64: BOS, prompt, SEP, completion, EOS, PAD to the right."""
    prompts, completions, lengths = draw_corpus(np.random.default_rng(seed), rows)
    positions = np.arange(MAX_WORDS + 1)
    tail = np.pad(completions, ((0, 0), (0, 1)))
    tail = np.where(positions < lengths[:, None], tail, TOKEN_IDS[PAD])
    tail = np.where(positions == lengths[:, None], TOKEN_IDS[EOS], tail)
    return torch.cat([prompt_ids(prompts), torch.from_numpy(tail)], dim=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one CPU thread inside: the order of float sums, and so the bits, no longer depends on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _recipe_key() -> str:
    """16 hex digits over recipe, vocabulary and chain."""
    recipe = json.dumps([asdict(RECIPE), VOCABULARY], sort_keys=True).encode()
    return hashlib.sha256(recipe + chain_logp().round(9).tobytes()).hexdigest()[:16]


def _train(recipe: BaseRecipe, seed: int, *, progress: Progress) -> LlamaForCausalLM:
    ids = corpus_ids(seed, recipe.steps * recipe.batch_rows)  # every row is seen once
    with one_thread():
        model = _new_model(recipe, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.peak_learning_rate, total_steps=recipe.steps
        )
        for step, batch in enumerate(ids.split(recipe.batch_rows), start=1):
            optimizer.zero_grad()
            corpus_nll(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            progress(step, recipe.steps)
    return model.eval()


def _new_model(recipe: BaseRecipe, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=recipe.hidden, intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, max_position_embeddings=64,
        tie_word_embeddings=False,  # tied learned no better, and untied weights save and adapt without special cases
        bos_token_id=TOKEN_IDS[BOS], eos_token_id=TOKEN_IDS[EOS], pad_token_id=TOKEN_IDS[PAD],
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global RNG only
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().train()


def _publish(building: Path, folder: Path) -> None:
    """Make the finished folder appear at once and whole, or not at all."""
    for file in building.iterdir():
        file.chmod(0o644)  # mkdtemp and safetensors keep files to their owner; a cache may be shared
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    building.chmod(0o755)
    try:
        building.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _no_progress(done: int, total: int) -> None:
    pass

"""Tiny real models and random pairs, for every test that needs some. No downloads."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.engine.reference import ReferenceKey, reference_parts
from prefopt_ray.pairs.tokens import PairTokens, Ragged, SweepData
from prefopt_ray.train.worker import Worker, make_worker
from prefopt_ray.trial import AdapterConfig, EvaluationConfig, ExecutionPlan, TrainingConfig, TrialConfig

VOCABULARY = 64
PLAN = ExecutionPlan(
    engine="plain", device="cpu", dtype="float32", attention="sdpa", threads=1
)


def tiny_llama(seed: int = 0, *, layers: int = 2, hidden: int = 32) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def random_pairs(count: int, *, seed: int = 0, first_row: int = 0, longest: int = 12) -> PairTokens:
    rng = np.random.default_rng([seed, first_row])

    def ragged(low: int, high: int) -> Ragged:
        return Ragged.from_lists([rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist() for _ in range(count)])

    rows = np.arange(first_row, first_row + count)
    return PairTokens(rows, rows, ragged(2, longest), ragged(1, longest), ragged(1, longest))


def random_data(train: int = 64, held_out: int = 48, *, seed: int = 0) -> SweepData:
    return SweepData(
        train=random_pairs(train, seed=seed),
        select=random_pairs(held_out, seed=seed, first_row=10_000),
        test=random_pairs(held_out, seed=seed, first_row=20_000),
        pad_id=0, eos_ids=(2,), digest="random",
    )


def tiny_engine(model: PreTrainedModel | None = None) -> PlainEngine:
    return PlainEngine(model or tiny_llama(), plan=PLAN, pad_id=0, eos_ids=(2,))


def referenced(
    engine: PlainEngine, data: SweepData, *, needs: frozenset[str] = frozenset()
) -> dict[str, ReferencedPairs]:
    return reference_parts(engine, data, ReferenceKey("tiny", "float32", "sdpa", "cpu", "rows"), cache=None, needs=needs)


def tiny_worker(
    model: PreTrainedModel | None = None, data: SweepData | None = None, *, needs: frozenset[str] = frozenset()
) -> Worker:
    engine = tiny_engine(model)
    parts = referenced(engine, data or random_data(), needs=needs)
    return make_worker(engine, parts, decode=lambda ids: " ".join(map(str, ids)), probe_pairs=32, sample_prompts=16)


def trial_config(
    loss: str = "sigmoid", *, adapter: str = "lora", steps: int = 8, learning_rate: float = 1e-3,
    params: dict[str, float] | None = None, micro_batch_pairs: int = 8, seed: int = 0, **training: object,
) -> TrialConfig:
    return TrialConfig(
        loss=loss,
        loss_params=params if params is not None else {"beta": 0.1},
        learning_rate=learning_rate,
        training=TrainingConfig(
            total_steps=steps, stop_step=steps, batch_pairs=8, micro_batch_pairs=micro_batch_pairs, **training
        ),
        evaluation=EvaluationConfig(steps=(0, 1, steps // 2, steps), probe_pairs=32, sample_steps=(0, steps),
                                    sample_prompts=16, max_new_tokens=8),
        adapter=AdapterConfig(kind=adapter, rank=4, alpha=8),
        seed=seed,
    )


def save_model(folder: Path, *, seed: int = 0) -> Path:
    """A model folder without a tokenizer."""
    tiny_llama(seed).save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_model(folder: Path, *, seed: int = 0) -> Path:
    """A small Llama with a byte-level tokenizer and a ChatML template: the shape of a real chat model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator(["the user asks and the assistant answers in a few words"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Both completions of a pair in one row under a mask of ours: layouts that honour it, and those that do not."""

import logging

import pytest
import torch
from engine.exact import (
    ADAPTERS,
    PAIRS,
    SMALL,
    InFloat64,
    assert_gradients_agree,
    one_step,
    rough_model,
    rows,
    sgd_config,
    slow_gradients,
    small_config,
)
from engine.oracle import HandTrial
from tiny import VOCABULARY, tiny_engine
from transformers import (
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    Lfm2Config,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
)

GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARING: dict[str, PretrainedConfig] = {
    "llama": small_config("llama"),
    "gpt2": GPT2Config(**GPT2),
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32,
    ),
    "stablelm": small_config("stablelm", partial_rotary_factor=0.5),
    "nemotron": small_config("nemotron"),
    "falcon": FalconConfig(**FALCON),
    "codegen": CodeGenConfig(**GPT2, rotary_dim=4),
}
ATTENTION = [(name, kind) for name in SHARING for kind in ("eager", "sdpa") if (name, kind) != ("codegen", "sdpa")]
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
APART: dict[str, tuple[PretrainedConfig, str]] = {
    "mistral": (small_config("mistral", sliding_window=64), "sliding_window 64"),
    "gemma3": (small_config("gemma3_text", head_dim=8, sliding_window=64), "sliding_attention"),
    "gpt_neo": (
        GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
                     attention_types=[[["global", "local"], 1]], max_position_embeddings=512),
        "window_size 256",
    ),
    "lfm2": (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "conv"),
    "llama, dynamic rope": (small_config("llama", rope_parameters=ROPE), "dynamic"),
    "bloom": (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "ValueError"),
    "mpt": (
        MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=128), "hidden states differ"
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_gradients_in_float64_are_those_of_rows_and_of_one_sequence_at_a_time(
    name: str, attention: str, adapter: str
) -> None:
    config = sgd_config(adapter=ADAPTERS[adapter], micro_batch_pairs=3)
    engines = []
    with InFloat64():
        for make in (tiny_engine, rows):
            engines.append(make(rough_model(SHARING[name], dtype=torch.float64, attention=attention)))
        (found,), (expected,) = (one_step(engine, HandTrial(config, PAIRS)) for engine in engines)
        slow = slow_gradients(expected.policy, PAIRS)
    assert engines[0]._shared
    assert_gradients_agree(found.gradients, expected.gradients, relative=1e-10)
    assert_gradients_agree(found.gradients, slow, relative=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APART)
def test_a_layout_that_does_not_honour_the_mask_has_a_row_per_completion_and_says_why(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    config, reason = APART[name]
    model = rough_model(config, attention="eager").to(dtype)
    with caplog.at_level(logging.INFO):
        engine = tiny_engine(model)
    assert not engine._shared
    assert reason in caplog.text

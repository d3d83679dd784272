"""The flat engine on each family it serves, against one row per completion and one sequence at a time; and the models
that it leaves to the plain engine.
"""

import logging
import re

import numpy as np
import pytest
import torch
from engine.exact import (
    ADAPTERS,
    PAIRS,
    InFloat64,
    assert_gradients_agree,
    flat,
    one_step,
    rough_model,
    rows,
    sgd_config,
    slow_gradients,
    small_config,
)
from engine.oracle import HandTrial, slow_logps
from tiny import PLAN, random_pairs
from torch import nn
from transformers import GPT2Config, PretrainedConfig

from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.engine.choose import FAMILIES, EngineChoice, choose_engine, open_engine
from prefopt_ray.engine.flat.attention import NAME, flat_attention
from prefopt_ray.engine.flat.engine import FlatEngine, LayoutError
from prefopt_ray.errors import ModelError
from prefopt_ray.trial import AdapterConfig

LORA = ADAPTERS["lora"]
WINDOW = {"sliding_window": 6}  # far shorter than the pairs
UPPER_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 1e4,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
# model_type -> what its tiny models are: beside GQA, each trait of the family that could be got wrong.
SERVED: dict[str, list[dict[str, object]]] = {
    "llama": [
        {},
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN, "num_key_value_heads": 1},
    ],
    "mistral": [WINDOW, {"sliding_window": None, "head_dim": 12}],
    "qwen2": [{"use_sliding_window": False, "tie_word_embeddings": True}, UPPER_WINDOW],
    "qwen3": [{"head_dim": 12}, UPPER_WINDOW | {"attention_bias": True}],
    "apertus": [{}],
    "arcee": [{}],
    "cohere": [{"logit_scale": 0.25, "use_qk_norm": True}],
    "cohere2": [WINDOW | {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]}],
    "cwm": [WINDOW],
    "ernie4_5": [{"use_bias": True}],
    "exaone4": [WINDOW | {"sliding_window_pattern": 2}],
    "gemma": [{"head_dim": 8}],
    "gemma3_text": [WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}],
    "glm": [{"head_dim": 8}],
    "glm4": [{"head_dim": 8}],
    "gpt_neox": [{"use_parallel_residual": True}, {"use_parallel_residual": False, "tie_word_embeddings": True}],
    "granite": [{"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}],
    "helium": [{"head_dim": 8}],
    "hunyuan_v1_dense": [{"head_dim": 8}],
    "ministral3": [WINDOW],
    "olmo": [{"clip_qkv": 0.5}],
    "olmo2": [{}],
    "olmo3": [WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}],
    "phi": [{"partial_rotary_factor": 0.5, "qk_layernorm": True}],  # its head has a bias
    "phi3": [WINDOW],
    "seed_oss": [{"head_dim": 8}],
    "smollm3": [{"no_rope_layer_interval": 2}],
    "starcoder2": [WINDOW],
}
CASES = [
    pytest.param(kind, settings, id=f"{kind}{number or ''}")
    for kind, variants in SERVED.items() for number, settings in enumerate(variants)
]
EVERY_MODEL = pytest.mark.parametrize(("kind", "settings"), CASES)
REQUIRED = pytest.mark.parametrize(("kind", "settings"), CASES[:9])  # Llama, Mistral, Qwen2, Qwen3


def test_every_family_that_is_served_is_tested() -> None:
    assert set(SERVED) == set(FAMILIES)


@pytest.mark.parametrize("adapter", ADAPTERS)
@EVERY_MODEL
def test_gradients_in_float64_are_those_of_rows_and_of_one_sequence_at_a_time(
    kind: str, settings: dict[str, object], adapter: str
) -> None:
    config = small_config(kind, **settings)
    assert choose_engine("auto", config, ADAPTERS[adapter]).engine == "flat"
    with InFloat64():
        (found,), (expected,) = (
            one_step(
                make(rough_model(config, dtype=torch.float64)), HandTrial(sgd_config(adapter=ADAPTERS[adapter]), PAIRS)
            )
            for make in (flat, rows)
        )
        slow = slow_gradients(expected.policy, PAIRS)
    assert_gradients_agree(found.gradients, expected.gradients, relative=1e-10)
    assert_gradients_agree(found.gradients, slow, relative=1e-10)
    torch.testing.assert_close(found.outcome.losses, expected.outcome.losses, atol=1e-11, rtol=1e-10)


@REQUIRED
def test_losses_and_log_probs_in_float32_are_those_of_rows_and_of_float64(
    kind: str, settings: dict[str, object]
) -> None:
    config = small_config(kind, **settings)
    (found,), (expected,) = (
        one_step(make(rough_model(config)), HandTrial(sgd_config(), PAIRS)) for make in (flat, rows)
    )
    torch.testing.assert_close(found.outcome.losses, expected.outcome.losses, atol=1e-5, rtol=1e-5)
    assert found.outcome.grad_norm == pytest.approx(expected.outcome.grad_norm, rel=1e-4)
    exact = slow_logps(expected.policy, PAIRS.tokens)
    stats = found.outcome.stats
    assert torch.stack([stats.policy_chosen, stats.policy_rejected], dim=1).numpy() == pytest.approx(exact, abs=1e-4)


@REQUIRED
def test_scores_are_the_models_own_and_an_untrained_policy_is_its_reference_to_the_last_bit(
    kind: str, settings: dict[str, object]
) -> None:
    model = rough_model(small_config(kind, **settings))
    engine, pairs = flat(model), random_pairs(6, longest=20)
    expected = slow_logps(model, pairs)
    engine.open(0, sgd_config())
    scored = engine.score(0, pairs)
    assert scored == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(scored, engine.score(REFERENCE, pairs))


@pytest.mark.parametrize(("kind", "settings"), [("phi", {}), ("cohere", {"logit_scale": 0.25}), ("llama", {})])
def test_a_reference_that_is_another_model_scores_through_its_own_head(kind: str, settings: dict[str, object]) -> None:
    """Asked for its head, it is run once as transformers runs it, not on a flat batch."""
    model, other = (rough_model(small_config(kind, **settings)) for _ in range(2))
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.5)
    expected = slow_logps(other, PAIRS.tokens)
    engine = FlatEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,), separate_reference=lambda: other)
    assert engine.score(REFERENCE, PAIRS.tokens) == pytest.approx(expected, abs=1e-4)
    drawn = engine.sample(REFERENCE, random_pairs(3).prompt, max_new_tokens=4, seed=0)
    assert drawn.kl == pytest.approx(np.zeros(3), abs=1e-5)


def test_a_reference_of_another_family_is_served_where_it_takes_flat_batches_and_refused_where_not() -> None:
    others = {kind: rough_model(small_config(kind)) for kind in ("granite", "stablelm")}
    engines = {
        kind: FlatEngine(
            rough_model(small_config("llama")), plan=PLAN, pad_id=0, eos_ids=(2,), separate_reference=lambda m=other: m
        )
        for kind, other in others.items()
    }
    expected = slow_logps(others["granite"], PAIRS.tokens)
    assert engines["granite"].score(REFERENCE, PAIRS.tokens) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ModelError, match="model.reference.*stablelm.*engine: plain"):
        engines["stablelm"].score(REFERENCE, PAIRS.tokens)


# -- what the plain engine serves ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "adapter", "reason"),
    [
        (small_config("gemma2", head_dim=8), LORA, "gemma2 is not among the .* families"),  # caps attention scores
        (small_config("mixtral"), LORA, "mixtral is not among"),  # experts
        (small_config("gpt_oss", num_local_experts=2), LORA, "gpt_oss is not among"),  # sinks
        (small_config("stablelm"), LORA, "stablelm is not among"),  # its attention cannot be replaced
        (GPT2Config(), LORA, "gpt2 is not among"),
        (small_config("llama", rope_parameters=YARN | {"rope_type": "dynamic"}), LORA, "dynamic.*longest row"),
        (small_config("llama"), AdapterConfig(target=("q_proj", "lm_head")), "head changes every logit"),
        (small_config("llama"), AdapterConfig(target=r".*(q_proj|lm_head)"), "head changes every logit"),
    ],
)
def test_what_the_flat_engine_cannot_serve_has_a_plain_reason(
    config: PretrainedConfig, adapter: AdapterConfig, reason: str
) -> None:
    choice = choose_engine("auto", config, adapter)
    assert choice.engine == "plain"
    assert re.search(reason, choice.reason), choice.reason


@pytest.mark.parametrize("kind", ["gemma2", "stablelm", "nemotron", "gpt_oss"])
def test_a_model_whose_modules_compute_something_else_on_flat_batches_trains_on_rows(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out by asking the model, should one be called like a family that is served."""
    extra = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "gpt_oss" else {}
    model = rough_model(small_config(kind, head_dim=8, **extra), attention="eager")
    attention = model.config._attn_implementation
    with pytest.raises(LayoutError, match="do not suit its modules"):
        flat(model)
    with caplog.at_level(logging.WARNING):
        engine = open_engine(EngineChoice("flat", "served"), model, plan=PLAN, pad_id=0, eos_ids=(2,))
    assert engine.plan.engine == "plain" and "is not served" in engine.plan.reason
    assert engine.plan.reason in caplog.text
    assert model.config._attn_implementation == engine.plan.attention == attention


@pytest.mark.parametrize(
    ("trait", "value"),
    [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("dropout", 0.1), ("attention_mask", torch.ones(1))],
)
def test_attention_refuses_what_it_would_compute_wrongly(trait: str, value: object) -> None:
    query = torch.randn(1, 4, 3, 8)
    arguments = {"attention_mask": None, trait: value}
    with pytest.raises(ValueError, match="flat attention knows neither"):
        flat_attention(nn.Identity(), query, query, query, segments=None, **arguments)


def test_memory_that_runs_out_is_not_taken_for_a_layout_that_does_not_suit() -> None:
    model = rough_model(small_config("llama"))
    norm = model.model.norm
    calls: list[int] = []

    def fails_on_the_flat_batch(*unused: object) -> None:
        calls.append(model.config._attn_implementation == NAME)
        if calls[-1]:
            raise torch.OutOfMemoryError("no memory left")

    norm.register_forward_pre_hook(fails_on_the_flat_batch)
    with pytest.raises(torch.OutOfMemoryError):
        flat(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_lora_on_the_head_would_be_computed_all_the_same() -> None:
    """Which engine is chosen goes by the head's usual name; some have another one."""
    adapter = AdapterConfig(rank=4, alpha=8, target=("lm_head", "query_key_value"))
    with InFloat64():
        (found,), (expected,) = (
            one_step(
                make(rough_model(small_config("gpt_neox"), dtype=torch.float64)),
                HandTrial(sgd_config(adapter=adapter), PAIRS),
            )
            for make in (flat, rows)
        )
    assert any("lm_head" in name for name in found.gradients)
    assert_gradients_agree(found.gradients, expected.gradients, relative=1e-10)

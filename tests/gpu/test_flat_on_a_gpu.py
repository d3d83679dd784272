"""The flat engine on CUDA: torch's varlen attention against explicit masks, bfloat16 against float32, measured memory.

Needs torch, transformers, peft and pytest only: `python -m pytest tests/gpu`.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.exact import flat, one_step, ragged_pairs, referenced, rows, sgd_config
from engine.oracle import HandTrial
from tiny import trial_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefopt_ray.engine.base import REFERENCE, ReferencedPairs
from prefopt_ray.engine.flat.attention import VARLEN, attention_kernel, flat_attention, varlen_attn
from prefopt_ray.engine.flat.layout import Segments, flat_pairs
from prefopt_ray.engine.memory import MOST_TOKENS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
HEADS, SIZE = 4, 64
LENGTHS = [(1, 1, 1), (7, 5, 1), (40, 1, 30), (3, 90, 2), (130, 70, 65), (64, 64, 64)]
VARIED = [(int(p), int(c), int(r)) for p, c, r in np.random.default_rng(0).integers(1, 120, (24, 3))]


def model(dtype: torch.dtype = torch.bfloat16, *, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=1_024, bos_token_id=1, eos_token_id=2,
        attn_implementation=attention,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)
    return made.to(torch.bfloat16).to(CUDA, dtype)  # the same values in every precision


# -- attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_each_query_sees_the_keys_up_to_its_own_from_the_end(
    key_heads: int, window: int | None, scale: float | None
) -> None:
    """Runs with fewer queries than keys among them: causality is aligned at the bottom right."""
    if varlen_attn is None:
        pytest.skip("this torch has no varlen attention")
    assert attention_kernel(CUDA) == VARLEN
    segments = flat_pairs(ragged_pairs(LENGTHS), device=CUDA).model_inputs["segments"]
    assert any(q < k for q, k in zip(segments.query_lengths, segments.key_lengths, strict=True))
    found, expected = (
        outputs_and_gradients(compute, segments, key_heads=key_heads, window=window, scale=scale)
        for compute in (flat_attention, masked_attention)
    )
    for mine, exact in zip(found, expected, strict=True):
        assert float((mine - exact).norm() / exact.norm()) < 0.01


def outputs_and_gradients(
    compute: object, segments: Segments, *, key_heads: int, window: int | None, scale: float | None
) -> list[Tensor]:
    """The output and the gradients of query, key and value, in float64; all from bfloat16 inputs."""
    generator = torch.Generator(CUDA).manual_seed(0)
    tokens = sum(segments.query_lengths)
    inputs = [
        torch.randn(1, heads, tokens, SIZE, device=CUDA, generator=generator, dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, key_heads, key_heads)
    ]
    pull = torch.randn(1, tokens, HEADS, SIZE, device=CUDA, generator=generator, dtype=torch.bfloat16)
    out, _ = compute(
        nn.Identity(), *inputs, None, segments=segments, scaling=scale, sliding_window=window
    )
    out.backward(pull.to(out.dtype))
    return [out.detach().double(), *(tensor.grad.double() for tensor in inputs)]


def masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, segments: Segments,
    scaling: float | None, sliding_window: int | None,
) -> tuple[Tensor, None]:
    """By the definition, in float64, every run alone with its mask spelled out."""
    scale = SIZE**-0.5 if scaling is None else scaling
    key, value = (t.repeat_interleave(HEADS // t.shape[1], dim=1).double() for t in (key, value))
    outputs, first_query, first_key = [], 0, 0
    for queries, keys in zip(segments.query_lengths, segments.key_lengths, strict=True):
        index = segments.key_index[first_key : first_key + keys]
        scores = query[0, :, first_query : first_query + queries].double() @ key[0][:, index].transpose(1, 2) * scale
        last = torch.arange(queries, device=CUDA)[:, None] + keys - queries  # the last key that each query sees
        place = torch.arange(keys, device=CUDA)[None]
        seen = (place <= last) & (place > last - (sliding_window or keys))
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value[0][:, index])
        first_query, first_key = first_query + queries, first_key + keys
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


# -- precision ---------------------------------------------------------------------------------------


def test_float32_steps_are_those_of_rows() -> None:
    pairs = referenced(ragged_pairs(VARIED))
    (found,), (expected,) = (
        one_step(make(model(torch.float32)), HandTrial(sgd_config(pairs=len(VARIED)), pairs)) for make in (flat, rows)
    )
    torch.testing.assert_close(found.outcome.losses, expected.outcome.losses, atol=1e-4, rtol=1e-4)
    assert found.outcome.grad_norm == pytest.approx(expected.outcome.grad_norm, rel=1e-3)


def test_bfloat16_is_as_near_to_float32_as_the_plain_engine_with_either_kernel_and_batch() -> None:
    """Distances from the float32 step: of the flat engine at most half as much again as the plain engine's largest."""
    exact_logps, exact_gradient = numbers_of_a_step(rows(model(torch.float32)), micro_batch_pairs=8)
    plain = [
        numbers_of_a_step(rows(model(attention=attention)), micro_batch_pairs=size)
        for attention, size in (("sdpa", 24), ("sdpa", 3), ("eager", 24))
    ]
    ours = numbers_of_a_step(flat(model()), micro_batch_pairs=8)
    for found, exact, others in (
        (ours[0], exact_logps, [logps for logps, _ in plain]),
        (ours[1], exact_gradient, [gradient for _, gradient in plain]),
    ):
        spread = max(float((other - exact).norm()) for other in others)
        assert float((found - exact).norm()) < 1.5 * spread


def numbers_of_a_step(engine: object, *, micro_batch_pairs: int) -> tuple[Tensor, Tensor]:
    """Log-probs (2B,) and all gradients in one vector."""
    config = sgd_config(pairs=len(VARIED), micro_batch_pairs=micro_batch_pairs)
    (found,) = one_step(engine, HandTrial(config, referenced(ragged_pairs(VARIED))))
    stats = found.outcome.stats
    gradient = torch.cat([found.gradients[name].flatten() for name in sorted(found.gradients)])
    return torch.cat([stats.policy_chosen, stats.policy_rejected]), gradient.double()


def test_a_fresh_bfloat16_policy_starts_on_its_reference() -> None:
    engine, tokens = flat(model()), ragged_pairs(VARIED)
    pairs = ReferencedPairs(tokens, engine.score(REFERENCE, tokens))
    config = replace(
        trial_config(), training=replace(trial_config().training, batch_pairs=len(VARIED), micro_batch_pairs=5)
    )
    trial = HandTrial(config, pairs)
    engine.open(0, config)
    assert np.abs(engine.score(0, tokens) - pairs.reference).max() < 1e-2
    engine.step([trial])
    assert float(trial.outcomes[0].stats.h.abs().max()) < 1e-2
    assert {tensor.dtype for tensor in engine.state(0).values()} == {torch.float32}


# -- memory ------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A device with about one GiB left."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device=CUDA)
    yield
    del ballast
    torch.cuda.empty_cache()


def test_the_measured_token_budget_fits_into_what_is_free(little_memory: None) -> None:
    drawn = [(200, 60, 60)] * 160  # about 51,000 tokens
    engine, tokens = flat(model()), ragged_pairs(drawn)
    base = trial_config(micro_batch_pairs=8)
    config = replace(base, training=replace(base.training, batch_pairs=len(drawn), micro_batch_pairs=None))
    trial = HandTrial(config, ReferencedPairs(tokens, engine.score(REFERENCE, tokens)))
    engine.open(0, config)
    assert 256 <= engine.plan.micro_batch_tokens < MOST_TOKENS
    for _ in range(2):
        engine.step([trial])
    assert all(outcome.applied for outcome in trial.outcomes)


def test_what_a_step_takes_is_what_was_measured_per_token() -> None:
    engine, drawn = flat(model()), [(200, 60, 60)] * 24
    base = trial_config()
    config = replace(base, training=replace(base.training, batch_pairs=len(drawn), micro_batch_pairs=len(drawn)))
    trial = HandTrial(config, referenced(ragged_pairs(drawn)))
    engine.open(0, config)
    engine.step([trial])
    measured = engine.kept(0).per_token * sum(p + c + r - 2 for p, c, r in drawn)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine.step([trial])
    assert 0.9 * measured < torch.cuda.max_memory_allocated() - before < 1.5 * measured


# -- sampling ----------------------------------------------------------------------------------------


def test_samples_of_a_fresh_policy_are_its_references_and_repeat_with_their_seed() -> None:
    engine, prompts = flat(model()), ragged_pairs(VARIED).prompt
    engine.open(0, trial_config())
    first, again, other = (engine.sample(0, prompts, max_new_tokens=12, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.completions.values, again.completions.values)
    assert not np.array_equal(first.completions.values, other.completions.values)
    assert np.abs(first.kl).max() < 1e-2 and (first.entropy > 0).all()


def test_a_copy_on_the_cpu_scores_the_same() -> None:
    engine, tokens = flat(model(torch.float32)), ragged_pairs(VARIED)
    scored = engine.score(REFERENCE, tokens)
    assert flat(deepcopy(engine._model).cpu()).score(REFERENCE, tokens) == pytest.approx(scored, abs=5e-3)

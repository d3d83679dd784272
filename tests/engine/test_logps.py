"""Completion log-probs against the model's own full logits, whatever the architecture, padding or chunk."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.oracle import HandTrial, referenced_pairs, slow_logps, stepped
from tiny import VOCABULARY, random_pairs, tiny_engine, tiny_llama, trial_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from prefopt_ray.engine import head
from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.errors import ModelError
from prefopt_ray.pairs.tokens import PairTokens, Ragged

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.3, "pad_token_id": 1,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama with tied embeddings": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama with dynamic rope": LlamaConfig(
        **SMALL | {"max_position_embeddings": 8},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "gpt2": GPT2Config(**GPT2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "opt": OPTConfig(**OPT),
    "qwen2": Qwen2Config(**SMALL),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=6),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "gemma2, capped logits": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0, sliding_window=8),
    "cohere, scaled logits": CohereConfig(**SMALL, logit_scale=0.25),
    "granite, scaled logits": GraniteConfig(**SMALL, logits_scaling=4.0, residual_multiplier=0.5),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """With logits of a trained model's size, so that a forgotten cap or scale shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_the_models_own(name: str) -> None:
    model = random_model(ARCHITECTURES[name])
    pairs = random_pairs(6, longest=20)
    expected = slow_logps(model, pairs, exact=name != "mixtral")  # its grouped experts have no float64 kernel
    assert tiny_engine(model).score(REFERENCE, pairs) == pytest.approx(expected, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2, capped logits", "granite, scaled logits", "gpt2", "mixtral"])
def test_training_works_through_every_kind_of_head(name: str) -> None:
    _, trial = stepped(random_model(ARCHITECTURES[name]), steps=3, learning_rate=1e-2)
    losses = [float(outcome.losses.mean()) for outcome in trial.outcomes]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_hardly_shows_on_small_logits_is_not_overlooked(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0)
    engine = tiny_engine(AutoModelForCausalLM.from_config(config).eval().to(dtype))  # untrained: logits below 1
    states = torch.full((1, 32), 10_000.0, dtype=dtype)
    assert float(engine._head(states).detach().abs().max()) <= 30.0


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ModelError, match="depend on later tokens.*causal language model"):
        tiny_engine(AutoModelForCausalLM.from_config(config).eval())


def test_a_pair_scores_the_same_alone_and_beside_long_neighbours() -> None:
    engine = tiny_engine()
    pairs = PairTokens(
        np.arange(8), np.arange(8),
        *(Ragged.from_lists([part[i].tolist() * (1 if i == 0 else 6) for i in range(8)])
          for part in (random_pairs(8).prompt, random_pairs(8).chosen, random_pairs(8).rejected)),
    )
    together = engine.score(REFERENCE, pairs)
    alone = np.concatenate([engine.score(REFERENCE, pairs.take(np.array([i]))) for i in range(8)])
    assert together == pytest.approx(alone, abs=1e-4)


def test_row_order_and_batch_size_change_nothing() -> None:
    engine, pairs = tiny_engine(), random_pairs(24, longest=30)
    whole = engine.score(REFERENCE, pairs)
    order = np.random.default_rng(0).permutation(24)
    assert engine.score(REFERENCE, pairs.take(order)) == pytest.approx(whole[order], abs=1e-4)
    engine.plan = replace(engine.plan, scoring_tokens=100)
    assert engine.score(REFERENCE, pairs) == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("pad_id", [1, 2, 63])
def test_the_padding_token_does_not_matter_even_if_it_ends_turns(pad_id: int) -> None:
    pairs = random_pairs(8)
    padded = PlainEngine(tiny_llama(), plan=tiny_engine().plan, pad_id=pad_id, eos_ids=(2,))
    assert np.array_equal(padded.score(REFERENCE, pairs), tiny_engine().score(REFERENCE, pairs))


def test_log_probs_belong_to_the_next_token_and_to_the_completion_alone() -> None:
    """First completion token counts; the prompt's own tokens do not, beyond being what is conditioned on."""
    engine, pairs = tiny_engine(), random_pairs(1)
    prompt, chosen = pairs.prompt[0].tolist(), pairs.chosen[0].tolist()

    def score(prompt: list[int], chosen: list[int]) -> float:
        made = PairTokens(
            np.arange(1), np.arange(1), Ragged.from_lists([prompt]), Ragged.from_lists([chosen]), pairs.rejected
        )
        return float(engine.score(REFERENCE, made)[0, 0])

    other = chosen.copy()
    other[0] = (other[0] + 1) % VOCABULARY
    assert score(prompt, other) != score(prompt, chosen)
    # Moving the completion's first token into the prompt takes exactly its own log-prob away.
    first = score(prompt, chosen[:1])
    assert score(prompt + chosen[:1], chosen[1:]) == pytest.approx(score(prompt, chosen) - first, abs=1e-4)


@pytest.mark.parametrize("empty", ["prompt", "chosen", "rejected"])
def test_an_empty_prompt_or_completion_is_refused(empty: str) -> None:
    parts = {name: getattr(random_pairs(2), name) for name in ("prompt", "chosen", "rejected")}
    parts[empty] = Ragged.from_lists([[5], []])
    with pytest.raises(ValueError, match="at least one token"):
        tiny_engine().score(REFERENCE, PairTokens(np.arange(2), np.arange(2), **parts))


def test_token_counts_come_from_the_structure_not_from_values() -> None:
    """Equal tokens, tokens that pad, policy equal to reference: the length-averaged loss is still finite."""
    engine = tiny_engine()
    zeros = Ragged.from_lists([[0], [0, 0, 0]])
    pairs = PairTokens(np.arange(2), np.arange(2), zeros, zeros, Ragged.from_lists([[0, 0], [0]]))
    trial = HandTrial(trial_config(), referenced_pairs(engine))
    trial.pairs = type(trial.pairs)(pairs, engine.score(REFERENCE, pairs))
    trial.objective = lambda s: (s.drift_chosen / s.chosen_tokens - s.drift_rejected / s.rejected_tokens - 1) ** 2
    trial.next_batch = lambda: trial.pairs
    engine.open(0, trial.config)
    engine.step([trial])
    assert trial.outcomes[0].stats.chosen_tokens.tolist() == [1, 3]
    assert trial.outcomes[0].stats.rejected_tokens.tolist() == [2, 1]
    assert trial.outcomes[0].losses.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_log_softmax_and_sums_are_float32_under_a_bfloat16_model() -> None:
    """Against the same bfloat16 logits summed in float64: a thousand tokens lose less than a hundredth of a nat."""
    torch.manual_seed(0)
    model = tiny_llama(hidden=32).bfloat16()
    rng = np.random.default_rng(0)
    long = Ragged.from_lists([rng.integers(3, VOCABULARY, 1000).tolist()])
    pairs = PairTokens(np.arange(1), np.arange(1), Ragged.from_lists([[5, 6]]), long, Ragged.from_lists([[7]]))
    scored = tiny_engine(model).score(REFERENCE, pairs)
    assert scored.dtype == np.float32
    assert scored[0, 0] == pytest.approx(slow_logps(model, pairs, exact=False)[0, 0], rel=1e-4)
    assert scored[0, 1] == pytest.approx(slow_logps(model, pairs, exact=False)[0, 1], abs=1e-2)


def gradient_and_kept(run: Callable[[], Tensor], model: PreTrainedModel) -> tuple[list[Tensor], list[torch.Size]]:
    """Gradients, and the shapes of the tensors that were kept for the backward pass."""
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = run()
    total.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


def test_no_logits_of_all_positions_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vocabulary = 5000
    config = LlamaConfig(**SMALL | {"vocab_size": vocabulary})
    model = AutoModelForCausalLM.from_config(config).eval()
    engine, pairs = tiny_engine(model), random_pairs(8, longest=20)
    positions = int(pairs.chosen.lengths.sum() + pairs.rejected.lengths.sum())
    head_weight = torch.Size([SMALL["hidden_size"], vocabulary])

    def logits(shapes: list[torch.Size]) -> list[torch.Size]:
        return [shape for shape in shapes if shape[-1:] == (vocabulary,) and shape != head_weight]

    def run() -> Tensor:
        return engine._pair_logps(model, pairs).sum()

    whole, kept_whole = gradient_and_kept(run, model)
    assert (positions, vocabulary) in logits(kept_whole)  # one small chunk is kept, by decision
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 8 * vocabulary)
    chunked, kept = gradient_and_kept(run, model)
    assert logits(kept) == []
    for first, second in zip(whole, chunked, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_chunks_do_not_change_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pairs = tiny_engine(), random_pairs(8)
    whole = engine.score(REFERENCE, pairs)
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 3 * VOCABULARY)
    assert engine.score(REFERENCE, pairs) == pytest.approx(whole, abs=1e-5)

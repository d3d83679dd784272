"""What every engine owes a trial: one suite, run over each engine, with an adapter and with full fine-tuning.

A new engine adds a line to ENGINES.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.oracle import (
    HandTrial,
    assert_same_bits,
    largest_difference,
    referenced_pairs,
    slow_dpo_loss,
    slow_logps,
    stepped,
    weights,
)
from peft import PeftModel
from tiny import PLAN, VOCABULARY, random_pairs, tiny_engine, tiny_llama, trial_config
from torch import Tensor
from torch.nn.functional import softplus
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GradientCheckpointingLayer,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)

from prefopt_ray.engine.base import REFERENCE, Engine
from prefopt_ray.engine.flat.engine import FlatEngine
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.errors import ModelError
from prefopt_ray.trial import OptimizerConfig, TrialConfig

MakeEngine = Callable[[PreTrainedModel], Engine]
ENGINES: dict[str, MakeEngine] = {
    "plain": tiny_engine,
    "rows": lambda model: PlainEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,), share_prompt=False),
    "flat": lambda model: FlatEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,)),
}

EVERY_ENGINE = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())
EVERY_ADAPTER = pytest.mark.parametrize("adapter", ["lora", "none"])


def run(engine: Engine, config: TrialConfig, *, steps: int, slot: int = 0) -> HandTrial:
    """A fresh trial, some steps of it."""
    trial = HandTrial(config, referenced_pairs(engine), slot)
    engine.open(slot, config)
    for _ in range(steps):
        engine.step([trial])
    return trial


# -- a fresh slot ------------------------------------------------------------------------------------


@EVERY_ADAPTER
@EVERY_ENGINE
def test_a_fresh_policy_is_the_reference_to_the_last_bit(make: MakeEngine, adapter: str) -> None:
    engine, pairs = make(tiny_llama()), random_pairs(16)
    before = engine.score(REFERENCE, pairs)
    engine.open(0, trial_config(adapter=adapter))
    assert np.array_equal(engine.score(0, pairs), before)
    assert np.array_equal(engine.score(REFERENCE, pairs), before)


@EVERY_ADAPTER
@EVERY_ENGINE
def test_the_reference_stays_the_base_while_the_policy_trains(make: MakeEngine, adapter: str) -> None:
    base = tiny_llama()
    engine, pairs = make(deepcopy(base)), random_pairs(16)
    before = engine.score(REFERENCE, pairs)
    run(engine, trial_config(adapter=adapter, learning_rate=1e-2), steps=4)
    assert np.array_equal(engine.score(REFERENCE, pairs), before)
    assert before == pytest.approx(slow_logps(base, pairs), abs=1e-4)
    assert np.abs(engine.score(0, pairs) - before).max() > 0.1


@EVERY_ADAPTER
@EVERY_ENGINE
def test_the_same_trial_twice_gives_the_same_bits(make: MakeEngine, adapter: str) -> None:
    first, second = (make(tiny_llama()) for _ in range(2))
    for engine in (first, second):
        run(engine, trial_config(adapter=adapter, learning_rate=1e-2), steps=3)
    assert_same_bits(first.state(0), second.state(0))


@EVERY_ENGINE
def test_the_seed_decides_the_adapters_start(make: MakeEngine) -> None:
    starts = []
    for seed in (0, 0, 1):
        engine = make(tiny_llama())
        torch.manual_seed(np.random.default_rng(len(starts)).integers(1000))  # the global stream must not matter
        engine.open(0, trial_config(seed=seed))
        starts.append(engine.state(0))
    assert_same_bits(starts[0], starts[1])
    assert largest_difference(starts[0], starts[2]) > 0


@EVERY_ADAPTER
@EVERY_ENGINE
def test_a_second_trial_on_a_warm_engine_equals_one_in_a_new_process(make: MakeEngine, adapter: str) -> None:
    wanted = trial_config(adapter=adapter, learning_rate=1e-2, seed=1)
    fresh, warm = make(tiny_llama()), make(tiny_llama())
    run(warm, trial_config(adapter=adapter, learning_rate=3e-2, seed=5), steps=3)
    warm.sample(0, random_pairs(4).prompt, max_new_tokens=4, seed=0)
    expected, got = (run(engine, wanted, steps=3) for engine in (fresh, warm))
    assert_same_bits(fresh.state(0), warm.state(0))
    assert [o.grad_norm for o in expected.outcomes] == [o.grad_norm for o in got.outcomes]


@EVERY_ADAPTER
@EVERY_ENGINE
def test_a_trial_after_one_that_blew_up_equals_one_in_a_new_process(make: MakeEngine, adapter: str) -> None:
    fresh, warm = make(tiny_llama()), make(tiny_llama())
    blown = trial_config(
        adapter=adapter, learning_rate=1e30, optimizer=OptimizerConfig(kind="sgd"), max_grad_norm=0.0
    )
    assert not run(warm, blown, steps=3).outcomes[-1].applied
    wanted = trial_config(adapter=adapter, learning_rate=1e-2)
    for engine in (fresh, warm):
        run(engine, wanted, steps=3)
    assert_same_bits(fresh.state(0), warm.state(0))
    pairs = random_pairs(8)
    assert np.array_equal(fresh.score(REFERENCE, pairs), warm.score(REFERENCE, pairs))


@EVERY_ENGINE
def test_adapters_and_full_fine_tuning_do_not_share_an_engine(make: MakeEngine) -> None:
    """After full fine-tuning the base under an adapter would be another one."""
    for first, second in (("lora", "none"), ("none", "lora")):
        engine = make(tiny_llama())
        engine.open(0, trial_config(adapter=first))
        with pytest.raises(ValueError, match="either adapters or full fine-tuning"):
            engine.open(0, trial_config(adapter=second))


# -- two trials --------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["one call", "two calls"])
@EVERY_ENGINE
def test_two_interleaved_trials_each_equal_themselves_alone(make: MakeEngine, together: bool) -> None:
    """Different seeds, rates, losses, micro-batches and recomputation beside each other."""
    configs = [
        trial_config(learning_rate=1e-2, seed=1),
        trial_config(learning_rate=3e-3, seed=2, micro_batch_pairs=3, gradient_checkpointing=True),
    ]
    alone = []
    for config in configs:
        engine = make(tiny_llama())
        run(engine, config, steps=4)
        alone.append(engine.state(0))
    engine = make(tiny_llama())
    trials = [HandTrial(config, referenced_pairs(engine), slot) for slot, config in enumerate(configs)]
    for trial in trials:
        engine.open(trial.slot, trial.config)
    pairs = random_pairs(8, seed=3)
    for _ in range(4):
        for group in ([trials] if together else [[trials[1]], [trials[0]]]):
            engine.step(group)
        engine.score(0, pairs)
        engine.score(REFERENCE, pairs)
        engine.sample(1, pairs.prompt, max_new_tokens=3, seed=0)
    for slot in (0, 1):
        assert_same_bits(engine.state(slot), alone[slot])


@EVERY_ENGINE
def test_opening_a_slot_leaves_its_neighbour_alone(make: MakeEngine) -> None:
    alone, shared = make(tiny_llama()), make(tiny_llama())
    config = trial_config(learning_rate=1e-2, seed=1)
    run(alone, config, steps=4)
    trial = run(shared, config, steps=2)
    run(shared, trial_config(seed=2), steps=1, slot=1)
    shared.open(1, trial_config(seed=3))
    for _ in range(2):
        shared.step([trial])
    assert_same_bits(shared.state(0), alone.state(0))


# -- a step ------------------------------------------------------------------------------------------


@EVERY_ENGINE
def test_a_full_fine_tuning_step_follows_the_gradient_of_the_mean_loss(make: MakeEngine) -> None:
    """SGD without clipping against float64 autograd through full logits, one pair at a time."""
    base = tiny_llama()
    engine = make(deepcopy(base))
    sgd = OptimizerConfig(kind="sgd")
    trial = HandTrial(
        trial_config(adapter="none", learning_rate=0.5, max_grad_norm=0.0, optimizer=sgd), referenced_pairs(engine)
    )
    engine.open(0, trial.config)
    engine.step([trial])
    exact = deepcopy(base).double()
    loss = slow_dpo_loss(exact, trial.pairs.tokens, slow_logps(base, trial.pairs.tokens), beta=0.1)
    loss.backward()
    after = weights(engine.state(0))
    norm = 0.0
    for name, parameter in exact.named_parameters():
        wanted = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(after[f"weights/{name}"].double(), wanted, atol=1e-6, rtol=1e-5)
        norm += float((parameter.grad**2).sum())
    outcome = trial.outcomes[0]
    assert outcome.grad_norm == pytest.approx(norm**0.5, rel=1e-4)
    assert float(outcome.losses.mean()) == pytest.approx(loss.item(), rel=1e-5)
    total = sum(float((p.detach() ** 2).sum()) for p in exact.parameters())
    assert outcome.update_ratio == pytest.approx(0.5 * norm**0.5 / total**0.5, rel=1e-4)


@EVERY_ADAPTER
@EVERY_ENGINE
def test_accumulation_changes_nothing_but_rounding(make: MakeEngine, adapter: str) -> None:
    """8 pairs as 1x8, 2x4, 8x1 and 3+3+2, where the last micro-batch is partial."""
    config = {"adapter": adapter, "learning_rate": 1e-2, "optimizer": OptimizerConfig(kind="sgd")}
    whole = make(tiny_llama())
    expected = run(whole, trial_config(micro_batch_pairs=8, **config), steps=3)
    for micro in (4, 1, 3):
        engine = make(tiny_llama())
        trial = run(engine, trial_config(micro_batch_pairs=micro, **config), steps=3)
        assert largest_difference(engine.state(0), whole.state(0)) < 1e-5
        for mine, theirs in zip(trial.outcomes, expected.outcomes, strict=True):
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
            assert mine.stats.row_ids.tolist() == theirs.stats.row_ids.tolist()
            torch.testing.assert_close(mine.losses, theirs.losses, atol=1e-5, rtol=1e-5)


@EVERY_ENGINE
def test_clipping_bounds_the_step_and_reports_the_norm_before_it(make: MakeEngine) -> None:
    sgd = OptimizerConfig(kind="sgd")
    moved = {}
    for limit in (0.0, 1e-3):
        engine = make(tiny_llama())
        start = weights_after_open(engine, trial_config(adapter="none"))
        trial = run(
            engine, trial_config(adapter="none", learning_rate=1.0, max_grad_norm=limit, optimizer=sgd), steps=1
        )
        after = weights(engine.state(0))
        moved[limit] = sum(float(((after[n] - start[n]) ** 2).sum()) for n in start) ** 0.5
        assert trial.outcomes[0].clipped == (limit > 0)
        assert trial.outcomes[0].grad_norm == pytest.approx(moved[0.0], rel=1e-3)
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)


def weights_after_open(engine: Engine, config: TrialConfig) -> dict[str, Tensor]:
    engine.open(0, config)
    return weights(engine.state(0))


@EVERY_ADAPTER
@EVERY_ENGINE
def test_a_step_that_is_not_finite_leaves_the_weights_alone(make: MakeEngine, adapter: str) -> None:
    engine = make(tiny_llama())
    trial = run(engine, trial_config(adapter=adapter, learning_rate=1e-2), steps=1)
    before = engine.state(0)
    trial.objective = lambda stats: softplus(-stats.h) / (stats.row_ids != 3)  # one pair's loss is infinite
    engine.step([trial])
    assert not trial.outcomes[-1].applied
    assert_same_bits(engine.state(0), before)


@EVERY_ADAPTER
@EVERY_ENGINE
def test_an_error_in_the_middle_of_a_step_leaves_no_half_gradient(make: MakeEngine, adapter: str) -> None:
    """As out of memory would: the same step again equals a step that was never disturbed."""
    config = trial_config(adapter=adapter, learning_rate=1e-2, micro_batch_pairs=4, gradient_checkpointing=True)
    calm, disturbed = make(tiny_llama()), make(tiny_llama())
    run(calm, config, steps=2)
    trial = run(disturbed, config, steps=1)
    objective, calls = trial.objective, []

    def fails_at_the_second_micro_batch(stats: object) -> Tensor:
        calls.append(stats)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return objective(stats)

    trial.objective = fails_at_the_second_micro_batch
    with pytest.raises(torch.OutOfMemoryError):
        disturbed.step([trial])
    trial.objective = objective
    disturbed.step([trial])
    assert_same_bits(disturbed.state(0), calm.state(0))


def test_an_error_while_the_reference_computes_switches_the_adapter_on_again() -> None:
    engine, trial = stepped(tiny_llama(), learning_rate=1e-2)
    before = engine.score(0, trial.pairs.tokens)
    trainable = {name for name, p in engine._model.named_parameters() if p.requires_grad}
    with pytest.raises(ZeroDivisionError), engine._slots.policy(REFERENCE):
        raise ZeroDivisionError
    assert {name for name, p in engine._model.named_parameters() if p.requires_grad} == trainable
    assert np.array_equal(engine.score(0, trial.pairs.tokens), before)


# -- dropout, recomputation, precision ---------------------------------------------------------------


def llama_with_attention_dropout() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_dropout=0.5, max_position_embeddings=128,
    )).eval()


def gpt2_with_dropout() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
    )).eval()


def opt_with_dropout() -> PreTrainedModel:
    """Its decoder layers call functional dropout themselves."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5,
    )).eval()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("model", [llama_with_attention_dropout, gpt2_with_dropout, opt_with_dropout])
def test_nothing_is_ever_dropped_out(model: Callable[[], PreTrainedModel], recompute: bool) -> None:
    """The first step's margins are zero and a repeated step has the same bits, in training as in scoring."""
    first, trial = stepped(model(), steps=2, gradient_checkpointing=recompute, learning_rate=1e-2)
    assert trial.outcomes[0].stats.h.abs().max() < 1e-5
    second, _ = stepped(model(), steps=2, gradient_checkpointing=recompute, learning_rate=1e-2)
    assert_same_bits(first.state(0), second.state(0))


@pytest.mark.parametrize("model", [tiny_llama, opt_with_dropout, gpt2_with_dropout])
@EVERY_ADAPTER
def test_recomputing_layers_gives_the_same_weights_and_does_recompute(
    model: Callable[[], PreTrainedModel], adapter: str
) -> None:
    calls, states = {}, {}
    for recompute in (False, True):
        engine = tiny_engine(model())
        mlps = [m for name, m in engine._model.named_modules() if name.endswith(("mlp", "fc1"))]
        seen: list[int] = []
        for module in mlps:
            module.register_forward_pre_hook(lambda *args, seen=seen: seen.append(1))
        trial = HandTrial(
            trial_config(adapter=adapter, gradient_checkpointing=recompute, learning_rate=1e-2),
            referenced_pairs(engine),
        )
        engine.open(0, trial.config)
        seen.clear()
        engine.step([trial])
        calls[recompute], states[recompute] = len(seen), engine.state(0)
        seen.clear()
        engine.score(0, trial.pairs.tokens)
        assert len(seen) == len(mlps), "scoring never recomputes"
    assert len(states[True]) == len(states[False])
    assert calls[True] == 2 * calls[False] > 0
    assert largest_difference(states[True], states[False]) < 1e-6


def test_a_model_whose_layers_cannot_be_recomputed_says_so() -> None:
    model = tiny_llama()

    class Bare(torch.nn.Module):
        def __init__(self, layer: GradientCheckpointingLayer) -> None:
            super().__init__()
            self.attention_type = getattr(layer, "attention_type", None)
            self.self_attn, self.mlp = layer.self_attn, layer.mlp

        def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
            return hidden + self.mlp(self.self_attn(hidden_states=hidden, **kwargs)[0])

    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = Bare(layer)
    with pytest.raises(ModelError, match="layers cannot be recomputed"):
        stepped(model, gradient_checkpointing=True)


def test_adapters_of_a_bfloat16_base_are_float32_for_every_trial() -> None:
    engine = tiny_engine(tiny_llama().bfloat16())
    pairs = random_pairs(16)
    for seed in (0, 1):
        trial = run(engine, trial_config(learning_rate=1e-2, seed=seed), steps=1)
        assert {t.dtype for t in engine.state(0).values()} == {torch.float32}
        assert trial.outcomes[0].stats.h.abs().max() < 1e-2
    engine.open(0, trial_config())
    assert np.array_equal(engine.score(0, pairs), engine.score(REFERENCE, pairs))


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights() -> None:
    """Autocast computes in bfloat16; an update far below a bfloat16 weight's spacing is not lost."""
    base = tiny_llama()
    engine = PlainEngine(deepcopy(base), plan=PLAN, pad_id=0, eos_ids=(2,), autocast=torch.bfloat16)
    exact, pairs = slow_logps(base, random_pairs(16)), random_pairs(16)
    scored = engine.score(REFERENCE, pairs)
    assert 0 < np.abs(scored - exact).max() < 0.1, "bfloat16 arithmetic, float32 sums"
    start = weights_after_open(engine, trial_config(adapter="none"))
    assert np.array_equal(engine.score(0, pairs), scored)
    trial = run(engine, trial_config(adapter="none", learning_rate=1e-6), steps=1)
    after = weights(engine.state(0))
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert 0 < largest_difference(after, start) < 1e-5
    assert np.array_equal(engine.score(REFERENCE, pairs), scored)
    assert trial.outcomes[0].stats.h.abs().max() < 1e-1


@EVERY_ENGINE
def test_lora_on_an_embedding_is_trained_and_continued(make: MakeEngine) -> None:
    """peft names its weights otherwise than a linear's."""
    config = trial_config(learning_rate=0.1)
    config = replace(config, adapter=replace(config.adapter, target=("embed_tokens", "q_proj")))
    engine = make(tiny_llama())
    engine.open(0, config)
    start = weights(engine.state(0))
    assert sum("lora_embedding_" in name for name in start) == 2
    run(engine, config, steps=2)
    trained = engine.state(0)
    assert all(not torch.equal(before, weights(trained)[name]) for name, before in start.items())
    other = make(tiny_llama())
    other.open(0, replace(config, seed=config.seed + 1))
    other.load(0, trained)
    assert_same_bits(weights(other.state(0)), weights(trained))


def test_lora_on_the_head_is_trained() -> None:
    engine = tiny_engine()
    config = trial_config(learning_rate=1e-2)
    config = replace(config, adapter=replace(config.adapter, target=("q_proj", "lm_head")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(engine, config, steps=3)
    head = {name: t for name, t in weights(engine.state(0)).items() if "lm_head" in name and "lora_B" in name}
    assert len(head) == 1 and float(next(iter(head.values())).abs().max()) > 0


# -- keeping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@EVERY_ADAPTER
@EVERY_ENGINE
def test_a_new_engine_continues_from_a_state_to_the_last_bit(make: MakeEngine, adapter: str, kind: str) -> None:
    config = trial_config(
        adapter=adapter, learning_rate=1e-2, optimizer=OptimizerConfig(kind=kind, momentum=0.9, weight_decay=0.01)
    )
    whole, first, second = (make(tiny_llama()) for _ in range(3))
    run(whole, config, steps=5)
    run(first, config, steps=2)
    trial = run(second, config, steps=1)  # not where the state was taken: all of it must be replaced
    second.load(0, first.state(0))
    for _ in range(3):
        second.step([trial])
    assert_same_bits(second.state(0), whole.state(0))


@EVERY_ENGINE
def test_any_slot_loads_the_state_of_any_other(make: MakeEngine) -> None:
    engine, other = make(tiny_llama()), make(tiny_llama())
    run(engine, trial_config(learning_rate=1e-2), steps=2)
    other.open(0, trial_config())
    other.open(1, trial_config(seed=4))
    other.load(1, engine.state(0))
    assert_same_bits(other.state(1), engine.state(0))


@EVERY_ADAPTER
@EVERY_ENGINE
def test_a_state_is_a_copy(make: MakeEngine, adapter: str) -> None:
    engine = make(tiny_llama())
    trial = run(engine, trial_config(adapter=adapter, learning_rate=1e-2), steps=1)
    kept = engine.state(0)
    copies = {name: tensor.clone() for name, tensor in kept.items()}
    engine.step([trial])
    assert_same_bits(kept, copies)


@EVERY_ENGINE
def test_an_exported_adapter_loads_with_peft_and_gives_the_same_log_probs(make: MakeEngine, tmp_path: Path) -> None:
    base = tiny_llama()
    engine = make(deepcopy(base))
    run(engine, trial_config(seed=1), steps=1)
    run(engine, trial_config(learning_rate=1e-2), steps=3, slot=1)
    engine.export(1, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    pairs = random_pairs(8)
    assert engine.score(1, pairs) == pytest.approx(slow_logps(loaded, pairs), abs=1e-3)


@EVERY_ENGINE
def test_an_exported_model_loads_with_transformers_as_it_came(make: MakeEngine, tmp_path: Path) -> None:
    model = tiny_llama()
    model.generation_config.repetition_penalty = 1.3
    engine = make(model)
    run(engine, trial_config(adapter="none", learning_rate=1e-2), steps=3)
    engine.sample(0, random_pairs(4).prompt, max_new_tokens=3, seed=0)
    engine.export(0, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    pairs = random_pairs(8)
    assert engine.score(0, pairs) == pytest.approx(slow_logps(loaded, pairs), abs=1e-3)
    assert loaded.config.use_cache and loaded.generation_config.repetition_penalty == 1.3


@EVERY_ENGINE
def test_scoring_tells_how_far_it_is(make: MakeEngine) -> None:
    engine, told = make(tiny_llama()), []
    engine.plan = replace(engine.plan, scoring_tokens=64)
    engine.score(REFERENCE, random_pairs(10), advance=told.append)
    assert sum(told) == 10 and len(told) > 2

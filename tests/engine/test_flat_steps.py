"""Whatever the lengths, ranks, targets, losses, micro-batches and slots: a step of the flat engine is one of rows."""

from dataclasses import replace

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
    ragged_pairs,
    referenced,
    rough_model,
    rows,
    sgd_config,
    small_config,
)
from engine.oracle import HandTrial, assert_same_bits, largest_difference, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PLAN, random_pairs, trial_config
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PretrainedConfig

from prefopt_ray.engine.base import REFERENCE, ReferencedPairs
from prefopt_ray.engine.extras import cut_to_shorter, mismatched
from prefopt_ray.engine.flat.engine import FlatEngine
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.engine.memory import Kept
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.trial import AdapterConfig, TrialConfig

MODELS = {
    "llama": small_config("llama"),
    "qwen2": small_config("qwen2", tie_word_embeddings=True),
    "mistral": small_config("mistral", sliding_window=5),
    "granite": small_config("granite", logits_scaling=4.0),
}
TARGETS = ("all-linear", ("q_proj", "v_proj"), r".*layers\.1\..*(down|gate)_proj", ("embed_tokens", "k_proj"))
NEEDS = ("per_token", "token_sq", "distribution", "mismatched", "scores")

tokens = st.one_of(st.just(1), st.integers(1, 12), st.just(40))
lengths = st.lists(st.tuples(tokens, tokens, tokens), min_size=2, max_size=5)
adapters = st.one_of(
    st.builds(
        AdapterConfig, rank=st.integers(1, 16), alpha=st.sampled_from([1, 8, 32]), target=st.sampled_from(TARGETS)
    ),
    st.just(AdapterConfig(kind="none")),
)


def everything(stats: PairStats) -> Tensor:
    """A smooth loss of all statistics that are there, nowhere flat."""
    loss = softplus(-0.1 * stats.h) - 0.1 * stats.drift_chosen / stats.chosen_tokens
    if stats.policy_chosen_prefix is not None:
        prefix = stats.policy_chosen_prefix - stats.policy_rejected_prefix - stats.reference_chosen_prefix
        loss = loss + softplus(0.05 * prefix)
    if stats.chosen_token_sq is not None:
        loss = loss * (1 + 0.01 * (stats.chosen_token_sq - stats.rejected_token_sq).tanh())
    if stats.chosen_kl is not None:
        loss = loss + 0.05 * stats.rejected_kl.tanh() - 0.02 * stats.chosen_kl.tanh()
    if stats.mismatched_drift is not None:
        loss = loss * (1 + 0.1 * stats.mismatched_drift.tanh())
    if stats.chosen_score is not None:
        loss = loss * (stats.chosen_score - stats.rejected_score).sigmoid()
    return loss


def of_the_whole_batch(stats: PairStats) -> Tensor:
    return everything(stats) + softplus(0.1 * (stats.h - stats.h.mean()))


@st.composite
def trials(draw: st.DrawFn, *, recomputing: bool) -> list[HandTrial]:
    """One or two (full fine-tuning has one slot), each with its own pairs and settings; `recomputing`: it may be."""
    first = draw(adapters)
    both = [first] if first.kind == "none" or draw(st.booleans()) else [first, replace(draw(adapters), kind="lora")]
    return [draw(a_trial(adapter, slot, recomputing=recomputing)) for slot, adapter in enumerate(both)]


@st.composite
def a_trial(draw: st.DrawFn, adapter: AdapterConfig, slot: int, *, recomputing: bool) -> HandTrial:
    needs = frozenset(draw(st.sets(st.sampled_from(NEEDS))))
    whole = draw(st.booleans())
    drawn = draw(lengths)
    config = sgd_config(
        adapter=adapter, pairs=len(drawn), gradient_checkpointing=recomputing and draw(st.booleans()),
        micro_batch_pairs=draw(st.sampled_from([None, 1, 2, 8])),
    )
    return HandTrial(
        config, pairs_with(drawn, needs, seed=slot), slot, of_the_whole_batch if whole else everything, needs=needs,
        scope="batch" if whole else "pair",
    )


def pairs_with(drawn: list[tuple[int, int, int]], needs: frozenset[str], *, seed: int) -> ReferencedPairs:
    made = ragged_pairs(drawn, seed=seed)
    if "scores" in needs:
        made = replace(made, scores=np.random.default_rng(seed).normal(size=(len(drawn), 2)).astype(np.float32))
    derive = {"per_token": cut_to_shorter, "mismatched": mismatched}
    derived = {need: referenced(derive[need](made), seed=seed + 2) for need in sorted(needs & derive.keys())}
    return replace(referenced(made, seed=seed), derived=derived)


@settings(max_examples=25)
@given(model=st.sampled_from(sorted(MODELS)), made=trials(recomputing=False), budget=st.sampled_from([16, 64, 2_048]))
def test_a_step_is_one_of_rows_in_float64(model: str, made: list[HandTrial], budget: int) -> None:
    with InFloat64():
        found, expected = both_engines(MODELS[model], made, budget=budget, dtype=torch.float64)
    for mine, theirs in zip(found, expected, strict=True):
        assert_gradients_agree(mine.gradients, theirs.gradients, relative=1e-10)
        assert_same_statistics(mine.outcome.stats, theirs.outcome.stats, atol=1e-9)
        torch.testing.assert_close(mine.outcome.losses, theirs.outcome.losses, atol=1e-11, rtol=1e-10)


@settings(max_examples=10)
@given(model=st.sampled_from(sorted(MODELS)), made=trials(recomputing=True), budget=st.sampled_from([16, 2_048]))
def test_a_step_is_one_of_rows_in_float32(model: str, made: list[HandTrial], budget: int) -> None:
    found, expected = both_engines(MODELS[model], made, budget=budget, dtype=torch.float32)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.outcome.grad_norm == pytest.approx(theirs.outcome.grad_norm, rel=1e-4, abs=1e-6)
        assert_same_statistics(mine.outcome.stats, theirs.outcome.stats, atol=2e-4)
        torch.testing.assert_close(mine.outcome.losses, theirs.outcome.losses, atol=2e-5, rtol=1e-5)


def both_engines(config: PretrainedConfig, made: list[HandTrial], *, budget: int, dtype: torch.dtype) -> list[list]:
    """The same trials stepped by the flat engine and by rows."""
    found = []
    for make in (flat, rows):
        engine = make(rough_model(config, dtype=dtype))
        engine.plan = replace(engine.plan, micro_batch_tokens=budget)
        found.append(one_step(engine, *[replace(trial, outcomes=[]) for trial in made]))
    return found


def assert_same_statistics(found: PairStats, expected: PairStats, *, atol: float) -> None:
    mine, theirs = found.present(), expected.present()
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        torch.testing.assert_close(mine[name], values, atol=atol, rtol=1e-6, msg=name)


def test_a_reference_that_is_copied_while_the_policy_computes_keeps_the_models_own_attention() -> None:
    """Full fine-tuning with a loss that needs the reference's distributions, before anything was scored."""
    engine = flat(rough_model(MODELS["llama"]))
    trial = HandTrial(
        sgd_config(adapter=ADAPTERS["none"]), PAIRS, objective=everything, needs=frozenset({"distribution"})
    )
    engine.open(0, trial.config)
    engine.step([trial])
    assert trial.outcomes[0].applied
    prompts = random_pairs(2).prompt
    drawn, expected = (
        made.sample(REFERENCE, prompts, max_new_tokens=4, seed=0)
        for made in (engine, flat(rough_model(MODELS["llama"])))
    )
    assert np.array_equal(drawn.completions.values, expected.completions.values)


# -- adapters on some layers only --------------------------------------------------------------------


def opened(layers: int, *, target: str) -> LocalEngine:
    engine = flat(rough_model(small_config("llama", num_hidden_layers=layers)))
    engine.open(0, sgd_config(adapter=AdapterConfig(rank=4, alpha=8, target=target)))
    return engine


def test_below_the_first_adapter_nothing_is_kept_for_the_backward_pass() -> None:
    """Two layers under one with adapters keep as much as none; adapters on all keep more with every layer."""
    top = [opened(n, target=rf".*layers\.{n - 1}\..*_proj").kept(0).per_token for n in (1, 3)]
    assert top[0] == top[1]
    every = [opened(n, target=r".*layers\..*_proj").kept(0).per_token for n in (1, 3)]
    assert every[1] > 2 * every[0]


def test_a_constant_part_is_no_part_of_every_token() -> None:
    assert Kept.of((10, 1_050), (30, 1_150)) == Kept(1_000, 5)
    assert Kept.of((10, 40), (30, 180)) == Kept(0, 7)  # attention that keeps its weights grows faster than the tokens


def test_recomputing_keeps_inputs_and_one_layer_at_a_time() -> None:
    few, many = (opened(n, target="all-linear") for n in (2, 6))
    whole, recomputed = many.kept(0), many.kept(0, recompute=True)
    layer = (whole.per_token - few.kept(0).per_token) / 4
    assert layer < recomputed.per_token < 0.5 * whole.per_token


def test_copies_of_weights_in_another_precision_are_counted_once() -> None:
    """Under autocast every weight has one, whatever the batch."""
    model = rough_model(small_config("llama"))
    engine = FlatEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,), autocast=torch.bfloat16)
    engine.open(0, sgd_config(adapter=AdapterConfig(kind="none")))
    linears = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    kept = engine.kept(0)
    assert kept.constant == pytest.approx(2 * linears, rel=0.1)


def test_only_adapters_have_gradients() -> None:
    engine = opened(3, target=r".*layers\.2\..*_proj")
    seen: list[str] = []
    for name, parameter in engine._model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: seen.append(name))
    engine.step([HandTrial(sgd_config(), PAIRS)])
    assert len(seen) == 14 and all("layers.2." in name and ".lora_" in name for name in seen)


# -- from one engine to the other --------------------------------------------------------------------


def adam_config(kind: str) -> TrialConfig:
    return replace(trial_config(learning_rate=1e-3, micro_batch_pairs=None), adapter=ADAPTERS[kind])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_trial_continues_on_the_other_engine_as_if_it_had_always_been_there(kind: str) -> None:
    """Weights and AdamW's moments by parameter name, in float64: two steps here, two there."""
    config = adam_config(kind)
    with InFloat64():
        ends = []
        for before, after in ((rows, rows), (flat, rows), (rows, flat)):
            first, second = (make(rough_model(MODELS["qwen2"], dtype=torch.float64)) for make in (before, after))
            trial = HandTrial(config, PAIRS)
            for engine in (first, second):
                engine.open(0, config)
            for engine in (first, first):
                engine.step([trial])
            second.load(0, first.state(0))
            for engine in (second, second):
                engine.step([trial])
            ends.append(second.state(0))
    assert ends[0].keys() == ends[1].keys() == ends[2].keys()
    assert any(name.startswith("optimizer/exp_avg_sq/") for name in ends[0])
    for end in ends[1:]:
        assert largest_difference(weights(end), weights(ends[0])) < 1e-9


@pytest.mark.parametrize("kind", ADAPTERS)
def test_both_engines_export_the_same_files(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    config, folders = adam_config(kind), []
    source = flat(rough_model(MODELS["llama"]))
    source.open(0, config)
    source.step([HandTrial(config, PAIRS)])
    for make in (flat, rows):
        engine = make(rough_model(MODELS["llama"]))
        engine.open(0, config)
        engine.load(0, source.state(0))
        engine.sample(0, random_pairs(2).prompt, max_new_tokens=2, seed=0)
        folders.append(tmp_path_factory.mktemp("export"))
        engine.export(0, folders[-1])
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and any(name.endswith(".safetensors") for name in files[0])
    assert not any(b"prefopt_flat" in content for name, content in files[0].items() if name.endswith(".json"))


def test_a_slot_opened_again_on_other_linears_equals_one_in_a_new_process() -> None:
    """peft takes the first adapter away and leaves its layers wrapped, with no adapter of that name in them."""
    first, second = (AdapterConfig(rank=4, alpha=8, target=target) for target in (("q_proj", "up_proj"), ("v_proj",)))
    fresh, warm = (flat(rough_model(MODELS["llama"])) for _ in range(2))
    one_step(warm, HandTrial(sgd_config(adapter=first), PAIRS))
    ends = [one_step(engine, HandTrial(sgd_config(adapter=second), PAIRS))[0].gradients for engine in (fresh, warm)]
    assert_same_bits(*ends)

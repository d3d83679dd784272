"""A base in 4 bits: every number is that of its unpacked weights, the reference is that base, and only a LoRA learns.

The unpacked twin, a plain float32 model with the dequantised weights in it, is the oracle.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.oracle import HandTrial, assert_same_bits, referenced_pairs, slow_logps, weights
from engine.test_loading import save_adapter
from journeys.journey import spec_text, write_pairs
from peft import PeftModel
from tiny import random_pairs, save_chat_model, tiny_engine, tiny_llama, trial_config
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from prefopt_ray.engine.agreement import shares_prompts
from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.engine.choose import PLAIN, choose_engine
from prefopt_ray.engine.loading import ModelSource, load_model, source_digest
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.engine.quantised import NF4, loading_in_four_bits, make_differentiable, require_base_fits
from prefopt_ray.errors import ModelError
from prefopt_ray.prepare import open_worker, prepare
from prefopt_ray.spec import SweepSpec, parse_spec
from prefopt_ray.train import train
from prefopt_ray.trial import AdapterConfig, OptimizerConfig

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install '.[qlora]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora") / "model"
    tiny_llama(hidden=64).save_pretrained(folder)  # NF4 scales blocks of 64 weights
    return folder


def source(folder: Path, *adapters: Path, dtype: str = "float32") -> ModelSource:
    return ModelSource(str(folder), adapters=tuple(map(str, adapters)), dtype=dtype, quantisation=NF4)


def in_four_bits(folder: Path) -> PreTrainedModel:
    return load_model(source(folder), device=CPU)


def unpacked(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """A plain model whose linears hold what the 4-bit weights of `model` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, packed in four_bit_linears(model).items():
            weight = twin.get_submodule(name).weight
            weight.copy_(dequantize_4bit(packed.weight.data, packed.weight.quant_state).view_as(weight))
    return twin


def four_bit_linears(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def trained(engine: PlainEngine, *, steps: int, seed: int = 0, **training: object) -> HandTrial:
    config = trial_config(adapter="qlora", learning_rate=1e-2, seed=seed, **training)
    trial = HandTrial(config, referenced_pairs(engine))
    engine.open(0, config)
    for _ in range(steps):
        engine.step([trial])
    return trial


# -- the base ----------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_the_linears_beside_the_head_are_kept_in_four_bits(folder: Path) -> None:
    model = in_four_bits(folder)
    assert {name.rpartition(".")[2] for name in four_bit_linears(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }
    packed = sum(linear.weight.numel() for linear in four_bit_linears(model).values())  # bytes
    whole = sum(module.in_features * module.out_features for module in four_bit_linears(model).values())
    assert packed == whole / 2
    assert model.get_output_embeddings().weight.shape == model.get_input_embeddings().weight.shape


@needs_bitsandbytes
def test_log_probs_are_those_of_the_unpacked_weights(folder: Path) -> None:
    model, pairs = in_four_bits(folder), random_pairs(8)
    expected = slow_logps(unpacked(folder, model), pairs)
    assert tiny_engine(model).score(REFERENCE, pairs) == pytest.approx(expected, abs=1e-3)
    assert np.abs(slow_logps(tiny_llama(hidden=64), pairs) - expected).max() > 0.01  # not those of the whole ones


@needs_bitsandbytes
def test_both_completions_share_a_row_as_on_a_whole_base(folder: Path) -> None:
    model = in_four_bits(folder)
    assert shares_prompts(model, model.get_decoder())


@needs_bitsandbytes
def test_a_start_adapter_is_merged_in_float32_before_the_weights_are_packed(folder: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    adapter = save_adapter(tmp_path / "adapter", hidden=64)
    model = load_model(source(folder, adapter), device=CPU)
    merged = load_model(ModelSource(str(folder), adapters=(str(adapter),), dtype="float32"), device=CPU)
    for name, linear in four_bit_linears(model).items():
        expected, _ = quantize_4bit(
            merged.get_submodule(name).weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(linear.weight.data, expected), name
    plain = {name: p for name, p in merged.named_parameters() if not any(q in name for q in four_bit_linears(model))}
    for name, parameter in plain.items():
        assert torch.equal(parameter, model.get_parameter(name)), name
    for (name, mine), (_, theirs) in zip(model.named_buffers(), merged.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert model.config._name_or_path == str(folder)


def test_the_digest_names_the_quantisation(folder: Path) -> None:
    assert source_digest(source(folder)) != source_digest(ModelSource(str(folder)))


def test_a_base_in_four_bits_trains_on_the_plain_engine(folder: Path) -> None:
    choice = choose_engine("auto", AutoConfig.from_pretrained(folder), AdapterConfig(kind="qlora"))
    assert choice.engine == PLAIN and "quantised" in choice.reason


# -- training ----------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_are_those_of_a_lora_on_the_unpacked_weights(folder: Path, checkpointing: bool) -> None:
    """Scoring comes first: on CPUs with AVX512-BF16 bitsandbytes would then repack and drop the base's gradient."""
    model = in_four_bits(folder)
    engine, twin = tiny_engine(model), tiny_engine(unpacked(folder, model))
    sgd = OptimizerConfig(kind="sgd")  # AdamW turns the rounding of small gradients into steps of full size
    ours, theirs = (
        trained(each, steps=3, optimizer=sgd, gradient_checkpointing=checkpointing) for each in (engine, twin)
    )
    for mine, other in zip(ours.outcomes, theirs.outcomes, strict=True):
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert torch.allclose(mine.losses, other.losses, atol=1e-5)
    expected = weights(twin.state(0))
    for name, tensor in weights(engine.state(0)).items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


@needs_bitsandbytes
def test_a_fresh_policy_is_the_reference_to_the_last_bit(folder: Path) -> None:
    engine, pairs = tiny_engine(in_four_bits(folder)), random_pairs(16)
    reference = engine.score(REFERENCE, pairs)
    trial = trained(engine, steps=1)
    assert float(trial.outcomes[0].stats.h.abs().max()) == 0
    engine.open(0, trial.config)
    assert np.array_equal(engine.score(0, pairs), reference)


@needs_bitsandbytes
def test_only_the_adapter_learns(folder: Path) -> None:
    model, pairs = in_four_bits(folder), random_pairs(16)
    engine = tiny_engine(model)
    reference = engine.score(REFERENCE, pairs)
    trained(engine, steps=3)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if "lora_" in name)
    assert np.array_equal(engine.score(REFERENCE, pairs), reference)
    assert np.abs(engine.score(0, pairs) - reference).max() > 0.01


@needs_bitsandbytes
def test_a_new_engine_continues_from_a_state_to_the_last_bit(folder: Path) -> None:
    whole, first, second = (tiny_engine(in_four_bits(folder)) for _ in range(3))
    trained(whole, steps=4)
    trained(first, steps=2)
    trial = trained(second, steps=1)
    second.load(0, first.state(0))
    for _ in range(2):
        second.step([trial])
    assert_same_bits(second.state(0), whole.state(0))


@needs_bitsandbytes
def test_a_second_trial_on_a_warm_engine_equals_one_in_a_new_process(folder: Path) -> None:
    warm, cold = tiny_engine(in_four_bits(folder)), tiny_engine(in_four_bits(folder))
    trained(warm, steps=2, seed=1)
    trained(warm, steps=2)
    trained(cold, steps=2)
    assert_same_bits(warm.state(0), cold.state(0))


@needs_bitsandbytes
def test_a_bfloat16_base_samples_and_trains_with_float32_adapters(folder: Path) -> None:
    engine = tiny_engine(load_model(source(folder, dtype="bfloat16"), device=CPU))
    trial = trained(engine, steps=2)
    assert all(outcome.applied for outcome in trial.outcomes)
    assert all(tensor.dtype == torch.float32 for tensor in weights(engine.state(0)).values())
    samples = engine.sample(0, random_pairs(4).prompt, max_new_tokens=4, seed=0)
    assert (samples.kl > -1e-6).all() and len(samples.completions) == 4


@needs_bitsandbytes
def test_an_exported_adapter_loads_with_peft_on_the_base_in_four_bits_and_on_the_whole_one(
    folder: Path, tmp_path: Path
) -> None:
    model, pairs = in_four_bits(folder), random_pairs(8)
    base, engine = unpacked(folder, model), tiny_engine(model)
    trained(engine, steps=3)
    engine.export(0, tmp_path / "adapter")
    twin = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert engine.score(0, pairs) == pytest.approx(slow_logps(twin, pairs), abs=1e-3)
    packed = PeftModel.from_pretrained(in_four_bits(folder), tmp_path / "adapter").eval()
    assert slow_logps(packed, pairs, exact=False) == pytest.approx(engine.score(0, pairs), abs=1e-1)  # in bfloat16
    whole = PeftModel.from_pretrained(tiny_llama(hidden=64), tmp_path / "adapter")
    assert np.isfinite(slow_logps(whole, pairs)).all()


@needs_bitsandbytes
def test_a_base_that_is_stored_in_four_bits_trains_with_a_lora(folder: Path, tmp_path: Path) -> None:
    packed = in_four_bits(folder)
    packed.save_pretrained(tmp_path / "stored")
    stored = load_model(ModelSource(str(tmp_path / "stored"), dtype="float32"), device=CPU)
    from_stored, from_whole = tiny_engine(stored), tiny_engine(packed)
    trained(from_stored, steps=2)
    trained(from_whole, steps=2)
    assert_same_bits(from_stored.state(0), from_whole.state(0))


# -- a whole trial -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora-spec")
    save_chat_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=40)
    return folder


def spec(home: Path, **model: object) -> SweepSpec:
    written = parse_spec(spec_text(home / "model", home / "pairs.jsonl", storage=str(home / "results"))).to_dict()
    adapter = {"adapter": {"kind": "qlora", "rank": 4}}
    return SweepSpec.from_dict(written | {"model": written["model"] | adapter | model})


@needs_bitsandbytes
def test_a_spec_with_qlora_trains_and_its_reference_is_not_that_of_the_whole_base(home: Path) -> None:
    worker, prepared = open_worker(spec(home))
    whole, _ = open_worker(spec(home, adapter={"kind": "lora", "rank": 4}))
    plan = worker.engine.plan
    assert plan.engine == PLAIN and "quantised" in plan.reason and "bitsandbytes" in plan.versions
    assert not np.array_equal(worker.parts["select"].reference, whole.parts["select"].reference)
    ((loss, values), *_) = prepared.spec.grid()
    first, *_, last = train(prepared.trial_config(loss, values), worker)
    assert first.metrics["eval/h/mean"] == 0 and last.end_state == "completed"


# -- what is refused ---------------------------------------------------------------------------------


def test_a_missing_package_is_named_before_any_work(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as an import system without it answers
    stages: list[str] = []
    with pytest.raises(ModelError, match=r"pip install 'prefopt_ray\[qlora\]'") as refused:
        prepare(spec(home), stage=_noted(stages), device="cpu", threads=1)
    assert refused.value.exit_code == 2 and not stages
    with pytest.raises(ModelError, match=r"prefopt_ray\[qlora\]"):
        load_model(source(home / "model"), device=CPU)


def _noted(stages: list[str]) -> Callable[[str], Callable[[int, int], None]]:
    def stage(name: str) -> Callable[[int, int], None]:
        stages.append(name)
        return lambda done, total: None

    return stage


@pytest.mark.parametrize(
    ("kind", "merges", "rule"),
    [
        ("qlora", False, "quantises whole weights"),
        ("none", False, "full fine-tuning needs whole weights"),
        ("lora", True, "a start adapter is merged in float32"),
    ],
)
def test_a_base_stored_in_few_bits_is_refused_where_whole_weights_are_needed(
    folder: Path, kind: str, merges: bool, rule: str
) -> None:
    config = AutoConfig.from_pretrained(folder)
    require_base_fits(config, adapter_kind=kind, merges=merges)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match=rule):
        require_base_fits(config, adapter_kind=kind, merges=merges)


def test_a_lora_on_a_base_stored_in_few_bits_is_accepted(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    require_base_fits(config, adapter_kind="lora", merges=False)


@needs_bitsandbytes
def test_a_model_of_another_family_is_packed_too(tmp_path: Path) -> None:
    """GPT-2 keeps its linears transposed."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path)
    model, pairs = in_four_bits(tmp_path), random_pairs(6)
    assert len(four_bit_linears(model)) == 8
    engine = tiny_engine(model)
    assert engine.score(REFERENCE, pairs) == pytest.approx(slow_logps(model, pairs, exact=False), abs=1e-3)


@needs_bitsandbytes
def test_a_base_whose_gradient_bitsandbytes_drops_is_refused(folder: Path) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("only CPUs with AVX512-BF16 repack weights")
    how = loading_in_four_bits(torch.float32, device=CPU)
    repacked = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    with torch.no_grad():
        repacked(torch.zeros((1, 3), dtype=torch.long))
    with pytest.raises(ModelError, match="no gradient"):
        make_differentiable(repacked)


@needs_bitsandbytes
def test_a_model_without_linears_in_four_bits_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layers"):
        make_differentiable(tiny_llama())

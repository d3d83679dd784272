"""A base in 4 bits on a CUDA device, in bfloat16: what the CPU tests say of it in float32, and what it saves there.

Needs CUDA and bitsandbytes, and nothing of Ray, MLflow, pydantic or datasets.
"""

import gc
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.oracle import HandTrial, assert_same_bits, referenced_pairs
from tiny import PLAN, random_pairs, tiny_llama, trial_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.engine.loading import ModelSource, load_model
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.engine.quantised import NF4

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="needs CUDA and bitsandbytes",
)
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora-gpu") / "model"
    tiny_llama(layers=4, hidden=1024).save_pretrained(folder)
    return folder


def loaded(folder: Path, *, quantisation: str | None = NF4) -> PreTrainedModel:
    return load_model(ModelSource(str(folder), dtype="bfloat16", quantisation=quantisation), device=CUDA)


def unpacked(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model whose linears hold what the 4-bit weights of `model` stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(CUDA).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                weight = twin.get_submodule(name).weight
                weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state).view_as(weight))
    return twin


def engine_of(model: PreTrainedModel) -> PlainEngine:
    return PlainEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,))


def trained(engine: PlainEngine, *, steps: int) -> HandTrial:
    trial = HandTrial(trial_config(adapter="qlora", learning_rate=1e-3), referenced_pairs(engine))
    engine.open(0, trial.config)
    for _ in range(steps):
        engine.step([trial])
    return trial


def test_log_probs_are_as_near_to_the_unpacked_weights_as_bfloat16_allows(folder: Path) -> None:
    """Measured against the same weights in float32: no further away than three times what bfloat16 alone is."""
    model, pairs = loaded(folder), random_pairs(32)
    exact = engine_of(unpacked(folder, model, torch.float32)).score(REFERENCE, pairs)
    rounded = engine_of(unpacked(folder, model, torch.bfloat16)).score(REFERENCE, pairs)
    packed = engine_of(model).score(REFERENCE, pairs)
    assert np.abs(packed - exact).max() <= 3 * np.abs(rounded - exact).max()


def test_step_0_has_no_margin_and_the_first_gradient_is_that_of_the_unpacked_weights(folder: Path) -> None:
    model = loaded(folder)
    twin = unpacked(folder, model, torch.bfloat16)
    ours, theirs = (trained(engine_of(each), steps=1).outcomes[0] for each in (model, twin))
    assert float(ours.stats.h.abs().max()) < 1e-2
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.05)


def test_only_the_adapter_learns_and_the_reference_stays(folder: Path) -> None:
    model, pairs = loaded(folder), random_pairs(16)
    engine = engine_of(model)
    reference = engine.score(REFERENCE, pairs)
    trial = trained(engine, steps=4)
    assert float(trial.outcomes[-1].losses.mean()) < float(trial.outcomes[0].losses.mean())
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    assert np.array_equal(engine.score(REFERENCE, pairs), reference)


def test_a_state_is_loaded_to_the_last_bit(folder: Path) -> None:
    first, second = engine_of(loaded(folder)), engine_of(loaded(folder))
    trained(first, steps=2)
    trained(second, steps=1)
    second.load(0, first.state(0))
    assert_same_bits(second.state(0), first.state(0))


def test_the_base_takes_less_than_a_third_of_its_bfloat16_memory(folder: Path) -> None:
    whole, packed = (allocated(folder, quantisation=kind) for kind in (None, NF4))
    assert packed < whole / 3


def test_what_a_token_keeps_for_the_backward_pass_is_that_of_a_whole_base(folder: Path) -> None:
    """The budget of a forward pass is made from it: unpacked weights must not be kept."""
    kept = []
    for model in (loaded(folder), loaded(folder, quantisation=None)):
        engine = engine_of(model)
        engine.open(0, trial_config(adapter="qlora"))
        kept.append(engine.kept(0).per_token)
    assert kept[0] == pytest.approx(kept[1], rel=0.1)


def allocated(folder: Path, *, quantisation: str | None) -> int:
    """Bytes that a loaded model holds on the device."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = loaded(folder, quantisation=quantisation)
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    del model
    return held

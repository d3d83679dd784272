"""The two products that the flat engine computes itself, against finite differences and peft's own; and its adapters
in bfloat16.
"""

import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from engine.exact import ADAPTERS, PAIRS, flat, one_step, rough_model, rows, sgd_config, small_config
from engine.oracle import HandTrial, assert_same_bits, slow_logps
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import PLAN, trial_config
from torch import Tensor, nn

from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.engine.flat import head
from prefopt_ray.engine.flat.attention import flat_attention_in
from prefopt_ray.engine.flat.engine import FlatEngine
from prefopt_ray.engine.flat.head import FrozenHeadLogps
from prefopt_ray.engine.flat.lora import LoraProduct, use_two_passes
from prefopt_ray.engine.plain import PlainEngine


def doubles(*shape: int, seed: int = 0, learned: bool = True) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(learned)


@pytest.mark.parametrize("biased", [False, True])
def test_the_adapters_product_has_the_gradient_of_finite_differences(biased: bool) -> None:
    weight, bias = doubles(5, 4, seed=1, learned=False), doubles(5, seed=2, learned=False) if biased else None
    inputs = (doubles(3, 4), weight, bias, doubles(2, 4, seed=3), doubles(5, 2, seed=4), 1.7)
    assert torch.autograd.gradcheck(LoraProduct.apply, inputs)


@pytest.mark.parametrize("biased", [False, True])
def test_the_heads_log_probs_have_the_gradient_of_finite_differences(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.CHUNK_ROWS, "cpu", 2)
    weight, bias = doubles(7, 4, seed=1, learned=False), doubles(7, seed=2, learned=False) if biased else None
    targets = torch.tensor([3, 0, 6, 3, 3])
    assert torch.autograd.gradcheck(FrozenHeadLogps.apply, (doubles(5, 4), weight, bias, targets))
    expected = torch.log_softmax(nn.functional.linear(doubles(5, 4), weight, bias), dim=-1)[torch.arange(5), targets]
    torch.testing.assert_close(FrozenHeadLogps.apply(doubles(5, 4), weight, bias, targets), expected)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    weight, targets = doubles(7, 4, seed=1, learned=False), torch.tensor([1, 2, 3])
    states = doubles(3, 4)
    squares = FrozenHeadLogps.apply(states, weight, None, targets).pow(2).sum()
    (slope,) = torch.autograd.grad(squares, states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


class TwoLinears(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 64, dtype=dtype), nn.Linear(64, 48, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).clamp_(-2, 2))  # in place, as OLMo clips its projections


def with_loras(dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False)
    return get_peft_model(TwoLinears(dtype), settings)


def input_and_gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    x = doubles(2, 9, 48).detach().to(dtype).requires_grad_()
    model(x).double().pow(2).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: gradient.double() for name, gradient in (named | {"x": x.grad}).items()}


def test_two_passes_give_pefts_own_output_and_gradients() -> None:
    model = with_loras(torch.float64)
    own, expected = model(doubles(2, 9, 48)), input_and_gradients(model, torch.float64)
    model.zero_grad()
    use_two_passes(model)
    torch.testing.assert_close(model(doubles(2, 9, 48)), own, atol=1e-12, rtol=1e-12)
    found = input_and_gradients(model, torch.float64)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-12, name
    with model.disable_adapter():
        torch.testing.assert_close(model(doubles(2, 9, 48)), model.base_model.model(doubles(2, 9, 48)))


def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_pefts_float32_path() -> None:
    """Of a bfloat16 base with float32 adapters. peft computes the adapter in float32 between bfloat16 layers."""
    model = with_loras(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = input_and_gradients(deepcopy(model).double(), torch.float64)
    own = input_and_gradients(model, torch.bfloat16)
    model.zero_grad()
    use_two_passes(model)
    found = input_and_gradients(model, torch.bfloat16)
    for name, gradient in exact.items():
        theirs, ours = (float((g[name] - gradient).norm() / gradient.norm()) for g in (own, found))
        assert ours < max(2 * theirs, 0.01), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_a_fresh_bfloat16_policy_starts_on_its_reference(kind: str) -> None:
    """The first step's margins are below a hundredth of a nat, though scored in other batches than stepped."""
    model = rough_model(small_config(kind)).bfloat16()
    engine = flat(model)
    scored = engine.score(REFERENCE, PAIRS.tokens)
    config = trial_config(learning_rate=1e-2, micro_batch_pairs=3)
    trial = HandTrial(config, type(PAIRS)(PAIRS.tokens, scored))
    engine.open(0, config)
    engine.step([trial])
    assert trial.outcomes[0].stats.h.abs().max() < 1e-2
    assert {tensor.dtype for tensor in engine.state(0).values()} == {torch.float32}


def test_bfloat16_log_probs_are_as_near_to_the_exact_ones_as_those_of_rows() -> None:
    model = rough_model(small_config("llama")).bfloat16()
    exact = slow_logps(model, PAIRS.tokens)
    ours, theirs = (
        np.abs(make(deepcopy(model)).score(REFERENCE, PAIRS.tokens) - exact).mean() for make in (flat, rows)
    )
    assert ours < 1.5 * theirs


def test_full_fine_tuning_under_autocast_is_that_of_rows_to_bfloat16() -> None:
    found = []
    for make in (FlatEngine, PlainEngine):
        engine = make(
            rough_model(small_config("llama")), plan=PLAN, pad_id=0, eos_ids=(2,), autocast=torch.bfloat16
        )
        found.append(one_step(engine, HandTrial(sgd_config(adapter=ADAPTERS["none"]), PAIRS))[0])
    assert found[0].outcome.grad_norm == pytest.approx(found[1].outcome.grad_norm, rel=0.05)
    torch.testing.assert_close(found[0].outcome.losses, found[1].outcome.losses, atol=0.05, rtol=0.05)


# -- what is replaced stays where it is -----------------------------------------------------------------


def test_a_copy_of_the_model_computes_with_its_own_adapters() -> None:
    engine = flat(rough_model(small_config("llama")))
    one_step(engine, HandTrial(sgd_config(), PAIRS))
    copied = deepcopy(engine._model)
    before = slow_logps(copied, PAIRS.tokens, exact=False)
    with torch.no_grad():
        for parameter in engine._slots[0].parameters.values():
            parameter.zero_()
    assert np.array_equal(slow_logps(copied, PAIRS.tokens, exact=False), before)
    assert np.abs(slow_logps(engine._model, PAIRS.tokens, exact=False) - before).max() > 1


def test_an_error_on_the_way_leaves_the_models_own_attention() -> None:
    engine = flat(rough_model(small_config("llama")))
    engine.open(0, sgd_config())
    trial = HandTrial(sgd_config(), PAIRS, objective=lambda stats: stats.h * (1 / 0))
    with pytest.raises(ZeroDivisionError):
        engine.step([trial])
    with pytest.raises(ZeroDivisionError), flat_attention_in(engine._model), flat_attention_in(engine._model):
        raise ZeroDivisionError
    assert engine._model.config._attn_implementation == "sdpa"
    trial.objective = HandTrial.objective
    engine.step([trial])
    assert trial.outcomes[-1].applied


def test_engines_that_step_in_two_threads_do_not_meet() -> None:
    config = trial_config(learning_rate=1e-2)
    engines = [flat(rough_model(small_config("llama"))) for _ in range(3)]
    for engine in engines:
        engine.open(0, config)

    def run(engine: FlatEngine) -> None:
        for _ in range(4):
            engine.step([HandTrial(config, PAIRS)])
            engine.score(0, PAIRS.tokens)

    threads = [threading.Thread(target=run, args=(engine,)) for engine in engines[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(engines[2])
    for engine in engines[:2]:
        assert_same_bits(engine.state(0), engines[2].state(0))

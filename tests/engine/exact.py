"""How exactly two engines agree: families of tiny random models, one step from the same start, gradients by name.

`InFloat64` takes out what transformers up-casts to float32, so that only the order of sums is left to differ.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from engine.oracle import HandTrial, slow_dpo_loss, weights
from tiny import PLAN, VOCABULARY, trial_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prefopt_ray.engine.base import ReferencedPairs, StepOutcome
from prefopt_ray.engine.flat.engine import FlatEngine
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.pairs.tokens import PairTokens, Ragged
from prefopt_ray.trial import AdapterConfig, OptimizerConfig, TrialConfig

MakeEngine = Callable[[PreTrainedModel], LocalEngine]

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
}


def small_config(model_type: str, **settings: object) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **SMALL | settings)


def rough_model(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """Random weights with every norm and bias away from one and zero, large enough that each part matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).requires_grad_(requires_grad=False)


def flat(model: PreTrainedModel) -> FlatEngine:
    return FlatEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,))


def rows(model: PreTrainedModel) -> PlainEngine:
    return PlainEngine(model, plan=PLAN, pad_id=0, eos_ids=(2,), share_prompt=False)


class InFloat64(TorchFunctionMode):
    """Within, whatever asks for float32 gets float64; but not in a backward pass, where layers may be recomputed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value: object) -> object:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def ragged_pairs(lengths: list[tuple[int, int, int]], *, seed: int = 0) -> PairTokens:
    """Pairs with so many tokens in prompt, chosen and rejected."""
    rng = np.random.default_rng(seed)
    columns = zip(*lengths, strict=True)
    made = [Ragged.from_lists([rng.integers(3, VOCABULARY, n).tolist() for n in column]) for column in columns]
    return PairTokens(np.arange(len(lengths)), np.arange(len(lengths)), *made)


# One token each way, equal lengths, long beside short; all within the models' positions.
LENGTHS = [(1, 1, 1), (5, 1, 7), (4, 6, 1), (3, 5, 5), (30, 22, 2), (2, 3, 40), (9, 8, 11), (1, 12, 4)]


def referenced(pairs: PairTokens, *, seed: int = 1) -> ReferencedPairs:
    """Any reference: to a step it is a constant."""
    drawn = np.random.default_rng(seed).normal(-20.0, 5.0, (len(pairs), 2))
    return ReferencedPairs(pairs, drawn.astype(np.float32))


PAIRS = referenced(ragged_pairs(LENGTHS))


def sgd_config(
    *, adapter: AdapterConfig = AdapterConfig(rank=4, alpha=8), pairs: int = len(LENGTHS), **training: object
) -> TrialConfig:
    """One step subtracts the gradient of the mean over so many pairs."""
    settings = {"max_grad_norm": 0.0, "optimizer": OptimizerConfig(kind="sgd")} | training
    config = trial_config(learning_rate=1.0, **settings)
    return replace(config, adapter=adapter, training=replace(config.training, batch_pairs=pairs))


ADAPTERS = {"lora": AdapterConfig(rank=4, alpha=8), "none": AdapterConfig(kind="none")}


@dataclass(frozen=True)
class Stepped:
    """What one step gave, and the policy that it began with."""

    outcome: StepOutcome
    gradients: dict[str, Tensor]  # by parameter name
    policy: PreTrainedModel


def one_step(engine: LocalEngine, *trials: HandTrial) -> list[Stepped]:
    """One step of each trial together, from starts whose adapters are not zero, the same for every engine."""
    starts, policies = [], []
    for trial in trials:
        engine.open(trial.slot, trial.config)
        engine.load(trial.slot, spread(engine.state(trial.slot)))
        starts.append(weights(engine.state(trial.slot)))
        policies.append(deepcopy(engine._model))
    engine.step(trials)
    found = []
    for trial, start, policy in zip(trials, starts, policies, strict=True):
        after = weights(engine.state(trial.slot))
        gradients = {name.removeprefix("weights/"): start[name] - after[name] for name in start}
        found.append(Stepped(trial.outcomes[-1], gradients, policy))
    return found


def spread(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with random numbers added to every weight."""
    generator = torch.Generator().manual_seed(5)

    def noise(tensor: Tensor) -> Tensor:
        return (0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).to(tensor.dtype)

    return {name: tensor + noise(tensor) for name, tensor in sorted(weights(state).items())}


def slow_gradients(policy: PreTrainedModel, pairs: ReferencedPairs) -> dict[str, Tensor]:
    """Of the mean DPO loss (beta 0.1), one unpadded sequence at a time; names as in the state of slot 0."""
    policy.zero_grad()
    slow_dpo_loss(policy, pairs.tokens, pairs.reference, beta=0.1).backward()
    named = {name.replace(".slot0.", "."): p.grad for name, p in policy.named_parameters()}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def assert_gradients_agree(found: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float) -> None:
    """Each parameter's by its norm; one that is zero, by the norm of all."""
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert float(whole) > 1e-4
    for name, gradient in expected.items():
        limit = relative * max(float(gradient.norm()), 1e-4 * float(whole))
        assert float((found[name] - gradient).norm()) <= limit, name

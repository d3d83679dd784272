"""Slow, plain answers to what an engine computes: one unpadded sequence at a time, full logits, float64.

And `HandTrial`, the smallest thing an engine can step: fixed batches, any loss, everything kept.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tiny import random_pairs, tiny_engine, trial_config
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from prefopt_ray.engine.base import REFERENCE, ReferencedPairs, StepOutcome
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.losses.cards import LossCard, find_card
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.trial import TrialConfig


def slow_token_logps(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """(|completion|, V) log-probs in front of each completion token, differentiable."""
    ids = torch.as_tensor(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)


def slow_logp(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    table = slow_token_logps(model, prompt, completion)
    return sum(table[t, int(token)] for t, token in enumerate(completion))


def slow_logps(model: PreTrainedModel, pairs: PairTokens, *, exact: bool = True) -> np.ndarray:
    """(N, 2) summed log-probs of chosen and rejected; `exact`: by a float64 copy of the model."""
    model = deepcopy(model).double() if exact else model
    with torch.no_grad():
        return np.array([
            [float(slow_logp(model, pairs.prompt[i], side[i])) for side in (pairs.chosen, pairs.rejected)]
            for i in range(len(pairs))
        ])


def slow_dpo_loss(model: PreTrainedModel, pairs: PairTokens, reference: np.ndarray, *, beta: float) -> Tensor:
    """Mean DPO loss, differentiable in the (float64) model's parameters."""
    losses = []
    for i in range(len(pairs)):
        chosen = slow_logp(model, pairs.prompt[i], pairs.chosen[i]) - reference[i, 0]
        rejected = slow_logp(model, pairs.prompt[i], pairs.rejected[i]) - reference[i, 1]
        losses.append(softplus(-beta * (chosen - rejected)))
    return sum(losses) / len(losses)


def slow_divergence(
    policy: PreTrainedModel, reference: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray
) -> tuple[float, float, float]:
    """Of one sampled completion with its end token: sums over positions of KL(pi || ref) and of the entropy of
    pi, and log pi - log ref of what was drawn."""
    with torch.no_grad():
        pi, ref = (slow_token_logps(model, prompt, completion) for model in (policy, reference))
    kl = entropy = drawn = 0.0
    for t, token in enumerate(completion):
        for v in range(pi.shape[1]):
            p = float(pi[t, v].exp())
            kl += p * float(pi[t, v] - ref[t, v])
            entropy -= p * float(pi[t, v])
        drawn += float(pi[t, int(token)] - ref[t, int(token)])
    return kl, entropy, drawn


@dataclass
class HandTrial:
    """A SteppedTrial that takes the first `batch_pairs` of its pairs again and again. DPO unless told otherwise."""

    config: TrialConfig
    pairs: ReferencedPairs
    slot: int = 0
    objective: Callable[[PairStats], Tensor] = lambda stats: softplus(-0.1 * stats.h)
    measures_update: bool = True
    outcomes: list[StepOutcome] = field(default_factory=list)
    needs: frozenset[str] = frozenset()  # beside what its loss's card says
    scope: str = "pair"

    @property
    def card(self) -> LossCard:
        card = find_card(self.config.loss)
        return replace(card, needs=card.needs | self.needs, scope=self.scope)

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate

    def next_batch(self) -> ReferencedPairs:
        return self.pairs.take(np.arange(self.config.training.batch_pairs))

    def loss(self, stats: PairStats) -> Tensor:
        return self.objective(stats)

    def finish_step(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)


def referenced_pairs(engine: PlainEngine, *, count: int = 8, seed: int = 0, longest: int = 12) -> ReferencedPairs:
    pairs = random_pairs(count, seed=seed, longest=longest)
    return ReferencedPairs(pairs, engine.score(REFERENCE, pairs))


def stepped(model: PreTrainedModel, *, steps: int = 1, **config: object) -> tuple[PlainEngine, HandTrial]:
    """A fresh engine after some DPO steps of one trial."""
    engine = tiny_engine(model)
    trial = HandTrial(trial_config(**config), referenced_pairs(engine))
    engine.open(0, trial.config)
    for _ in range(steps):
        engine.step([trial])
    return engine, trial




def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((tensor - second[name]).abs().max()) for name, tensor in first.items())

"""What some losses need beyond log-probs, against float64 loops; and losses of a whole batch under accumulation."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.oracle import HandTrial, largest_difference, slow_logp, slow_token_logps, weights
from tiny import random_data, random_pairs, referenced, tiny_engine, tiny_llama, trial_config
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.engine.extras import cut_to_shorter, mismatched
from prefopt_ray.engine.reference import ReferenceKey, keep_reference, missing_passes, reference_parts
from prefopt_ray.errors import DataError
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.trial import OptimizerConfig

EVERYTHING = frozenset({"per_token", "token_sq", "distribution", "mismatched", "scores"})
KEY = ReferenceKey("tiny", "float32", "sdpa", "cpu", "rows")


def scored_data():
    data = random_data(16, 8)
    scores = np.random.default_rng(3).normal(size=(16, 2)).astype(np.float32)
    return replace(data, train=replace(data.train, scores=scores))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model after a visible change: a policy that is not its reference."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def statistics(*, micro_batch_pairs: int) -> tuple[PairStats, PreTrainedModel, PreTrainedModel, ReferencedPairs]:
    """Of a fully fine-tuned policy some SGD steps away from its reference, without moving it further."""
    base = tiny_llama()
    engine = tiny_engine(deepcopy(base))
    pairs = reference_parts(engine, scored_data(), KEY, cache=None, needs=EVERYTHING)["train"]
    config = trial_config(adapter="none", micro_batch_pairs=micro_batch_pairs, learning_rate=0.0)
    engine.open(0, config)
    moved(engine._model)
    trial = HandTrial(config, pairs, needs=EVERYTHING)
    engine.step([trial])
    return trial.outcomes[0].stats, deepcopy(engine._model).double(), base.double(), pairs


@pytest.mark.parametrize("micro_batch_pairs", [3, 8])
def test_every_optional_statistic_equals_a_float64_loop(micro_batch_pairs: int) -> None:
    stats, policy, reference, pairs = statistics(micro_batch_pairs=micro_batch_pairs)
    tokens = pairs.tokens
    with torch.no_grad():
        for i in range(8):
            sides = {"chosen": tokens.chosen[i], "rejected": tokens.rejected[i]}
            shorter = min(len(side) for side in sides.values())
            for name, completion in sides.items():
                pi = slow_token_logps(policy, tokens.prompt[i], completion)
                ref = slow_token_logps(reference, tokens.prompt[i], completion)
                expected = {
                    f"policy_{name}_prefix": sum(pi[t, int(completion[t])] for t in range(shorter)),
                    f"reference_{name}_prefix": sum(ref[t, int(completion[t])] for t in range(shorter)),
                    f"{name}_token_sq": sum(torch.log(sum(p.exp() ** 2 for p in row)) for row in pi),
                    f"{name}_kl": sum(float(row.exp() @ (row - other)) for row, other in zip(ref, pi, strict=True)),
                }
                for field, value in expected.items():
                    assert float(getattr(stats, field)[i]) == pytest.approx(float(value), abs=2e-4), field
            assert stats.chosen_score[i] == tokens.scores[i, 0] and stats.rejected_score[i] == tokens.scores[i, 1]


def test_mismatched_drift_is_of_the_stored_partners_completions() -> None:
    stats, policy, reference, pairs = statistics(micro_batch_pairs=8)
    other = mismatched(pairs.tokens)
    with torch.no_grad():
        for i in range(8):
            drifts = [
                float(slow_logp(policy, other.prompt[i], side[i]) - slow_logp(reference, other.prompt[i], side[i]))
                for side in (other.chosen, other.rejected)
            ]
            assert float(stats.mismatched_drift[i]) == pytest.approx(sum(drifts) / 2, abs=2e-4)


def test_a_partner_is_the_next_row_with_another_prompt() -> None:
    pairs = replace(random_pairs(6), groups=np.array([5, 5, 9, 9, 9, 5]))
    other = mismatched(pairs)
    longest = int(pairs.longest.max())
    for row, partner in enumerate([2, 2, 5, 5, 5, 2]):
        room = max(1, longest - len(pairs.prompt[row]))
        assert other.chosen[row].tolist() == pairs.chosen[partner].tolist()[:room]
        assert other.prompt[row].tolist() == pairs.prompt[row].tolist()
    assert int(other.longest.max()) <= longest
    with pytest.raises(DataError, match="two prompts"):
        mismatched(replace(pairs, groups=np.zeros(6, dtype=np.int64)))


def test_a_prefix_has_the_tokens_of_the_shorter_completion() -> None:
    pairs = random_pairs(20)
    cut = cut_to_shorter(pairs)
    assert (cut.chosen.lengths == cut.rejected.lengths).all()
    for i in range(20):
        shorter = min(len(pairs.chosen[i]), len(pairs.rejected[i]))
        assert cut.chosen[i].tolist() == pairs.chosen[i].tolist()[:shorter]


def test_derived_references_are_stored_with_the_others_and_only_where_needed(tmp_path) -> None:
    data, engine = scored_data(), tiny_engine()
    reference_parts(engine, data, KEY, cache=tmp_path)
    assert not missing_passes(data, KEY, cache=tmp_path)
    missing = missing_passes(data, KEY, cache=tmp_path, needs=EVERYTHING)
    assert missing.keys() == {"train per_token", "train mismatched"}
    made = reference_parts(engine, data, KEY, cache=tmp_path, needs=EVERYTHING)
    read = keep_reference(data, KEY, [{}], cache=tmp_path, needs=EVERYTHING)
    assert read["train"].derived.keys() == {"per_token", "mismatched"} and not read["select"].derived
    for need, pairs in made["train"].derived.items():
        assert np.array_equal(pairs.reference, read["train"].derived[need].reference)
    assert referenced(engine, data)["train"].derived == {}


def test_the_reference_divergence_is_differentiable_and_its_gradient_is_right() -> None:
    base = tiny_llama()
    engine = tiny_engine(deepcopy(base))
    pairs = reference_parts(engine, random_data(16, 8), KEY, cache=None)["train"]
    rate = 0.05
    config = trial_config(adapter="none", learning_rate=rate, optimizer=OptimizerConfig(kind="sgd"), max_grad_norm=0.0)
    engine.open(0, config)
    moved(engine._model)
    start = deepcopy(engine._model)
    engine.step([HandTrial(
        config, pairs, needs=frozenset({"distribution"}), objective=lambda s: s.rejected_kl - 0.5 * s.chosen_kl
    )])
    slow_divergence_loss(start, base, pairs.tokens).backward()
    for (name, now), before in zip(engine._model.named_parameters(), start.parameters(), strict=True):
        expected = before.detach() - rate * before.grad
        assert float((now.detach() - expected).abs().max()) < 2e-6, name


def slow_divergence_loss(policy: PreTrainedModel, reference: PreTrainedModel, pairs: PairTokens) -> Tensor:
    total = 0.0
    for i in range(8):
        for side, weight in ((pairs.rejected, 1.0), (pairs.chosen, -0.5)):
            log_pi = slow_token_logps(policy, pairs.prompt[i], side[i])
            with torch.no_grad():
                log_ref = slow_token_logps(reference, pairs.prompt[i], side[i])
            total = total + weight * (log_ref.exp() * (log_ref - log_pi)).sum()
    return total / 8


def sorted_objective(stats: PairStats) -> Tensor:
    """Of the whole batch: every pair is compared with another one's rejected completion."""
    return softplus(-0.3 * (stats.drift_chosen.sort().values - stats.drift_rejected.sort().values + stats.h.mean()))


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_loss_of_the_whole_batch_is_exact_under_accumulation(adapter: str) -> None:
    def trained(micro_batch_pairs: int, scope: str) -> dict[str, Tensor]:
        engine = tiny_engine(tiny_llama())
        pairs = reference_parts(engine, random_data(16, 8), KEY, cache=None)["train"]
        config = trial_config(
            adapter=adapter, micro_batch_pairs=micro_batch_pairs, learning_rate=1.0,
            optimizer=OptimizerConfig(kind="sgd"),
        )
        engine.open(0, config)
        trial = HandTrial(config, pairs, objective=sorted_objective, scope=scope)
        for _ in range(3):
            engine.step([trial])
        assert len(trial.outcomes[-1].losses) == 8
        return weights(engine.state(0))

    whole = trained(8, "batch")
    assert largest_difference(whole, trained(3, "batch")) < 1e-5
    assert largest_difference(whole, trained(3, "pair")) > 1e-4  # taken apart it is another loss

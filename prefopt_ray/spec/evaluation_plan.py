"""How much evaluating a trial can afford: `auto` in `eval` and `samples`, resolved by counting tokens.

Tokens are counted, not seconds measured, so that every trial of a sweep and every machine resolves to the same
evaluations. What a researcher wrote is never changed, only its share of the cost is known. Pure arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt_ray.trial import EvaluationConfig

TARGET_SHARE = 0.20  # of a trial's cost; leaves room below a quarter for what counting tokens cannot see
MOST_PROBE, LEAST_PROBE = EvaluationConfig.probe_pairs, 64
MOST_PROMPTS, LEAST_PROMPTS = EvaluationConfig.sample_prompts, 16

# In forward passes over the same tokens. A backward pass costs one for activations and one for weights, and a LoRA
# has next to none of the latter; the head keeps the ratio (one product to score, two to train). Measured in CPU seconds
# of one core, 4 layers d=256: 2.1 with a LoRA on everything, 2.7 in full; 2 layers d=32, where overhead shows: 2.7.
LORA_STEP, FULL_STEP = 2.2, 3.0
# Sampling goes token by token (measured likewise: 4.6, and 24 where overhead shows), then policy and reference read.
SAMPLED_TOKEN, READ_TWICE = 5.0, 2.0


@dataclass(frozen=True)
class Workload:
    """What a trial computes beside its evaluations. Tokens are means; of a pair, what an engine computes: its prompt
    once and both completions without their last tokens, which predict nothing."""

    pairs_seen: int  # optimizer steps x batch_pairs
    pair_tokens: float  # train part
    select_pairs: int
    select_pair_tokens: float
    prompt_tokens: float  # select part
    full_finetuning: bool

    @property
    def training(self) -> float:
        """Cost of all optimizer steps, in forward tokens."""
        return self.pairs_seen * self.pair_tokens * (FULL_STEP if self.full_finetuning else LORA_STEP)


def fitted(
    wanted: EvaluationConfig, workload: Workload, *, optional: Sequence[int], probe: bool, prompts: bool
) -> EvaluationConfig:
    """`wanted` with as much of what is `auto` as the target share allows.

    `optional` are steps of `wanted` that may go, the most wanted first; `probe` and `prompts` tell whether their
    numbers may shrink. A probe keeps at least 64 pairs and a draw at least 16 prompts: below that they say nothing.
    """
    plan = replace(wanted, steps=tuple(step for step in wanted.steps if step not in optional))
    budget = workload.training * TARGET_SHARE / (1 - TARGET_SHARE)
    if prompts:
        plan = replace(plan, sample_prompts=_within(
            budget / 4, _draw_cost(workload, plan) * len(plan.sample_steps), least=LEAST_PROMPTS, most=MOST_PROMPTS
        ))
    if probe:
        left = budget - cost(workload, replace(plan, probe_pairs=0))
        scored_probe = workload.pair_tokens * len(plan.steps)
        plan = replace(plan, probe_pairs=_within(left, scored_probe, least=LEAST_PROBE, most=MOST_PROBE))
    for step in optional:
        longer = replace(plan, steps=tuple(sorted({*plan.steps, step})))
        if cost(workload, longer) <= budget:
            plan = longer
    return plan


def share(workload: Workload, plan: EvaluationConfig) -> float:
    """The part of a trial's cost that is evaluating."""
    evaluating = cost(workload, plan)
    return evaluating / (evaluating + workload.training)


def cost(workload: Workload, plan: EvaluationConfig) -> float:
    """Of all evaluations and samples, in forward tokens."""
    # At step 0 the probe tells that the policy is its reference, whose log-probs of the select part are stored.
    select = workload.select_pairs * workload.select_pair_tokens * sum(1 for step in plan.steps if step > 0)
    probe = plan.probe_pairs * workload.pair_tokens * len(plan.steps)
    return select + probe + _draw_cost(workload, plan) * len(plan.sample_steps) * plan.sample_prompts


def _draw_cost(workload: Workload, plan: EvaluationConfig) -> float:
    """Of one prompt's completion."""
    read = READ_TWICE * (workload.prompt_tokens + plan.max_new_tokens)
    return workload.prompt_tokens + SAMPLED_TOKEN * plan.max_new_tokens + read


def _within(budget: float, one: float, *, least: int, most: int) -> int:
    return max(least, min(most, int(budget / one))) if one > 0 else most

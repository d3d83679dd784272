"""What `auto` in `eval` and `samples` comes to, and that by default evaluating stays below a quarter of a trial."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spec.spec_examples import example

from prefopt_ray.spec.evaluation_plan import Workload, share
from prefopt_ray.trial import EvaluationConfig


def workload(pairs: int, *, select: int = 1000, tokens: float = 500, full: bool = False) -> Workload:
    return Workload(pairs, tokens, select, tokens, prompt_tokens=tokens / 5, full_finetuning=full)


def evaluation(load: Workload, *, pairs: int, **sections: object) -> EvaluationConfig:
    spec = example(training={"epochs": 1}, **sections)
    return spec.evaluation(spec.total_steps(pairs), load)


def test_large_data_has_every_evaluation_in_full():
    plan = evaluation(workload(60_000), pairs=60_000)
    total = 938
    assert plan.probe_pairs == 512 and plan.sample_prompts == 128
    assert {0, 9, 104, 313, 235, 469, 704, total} <= set(plan.steps)


def test_smaller_data_loses_quarters_then_probe_but_never_a_decision():
    big, small = (evaluation(workload(n), pairs=n) for n in (60_000, 6_000))
    assert len(small.steps) < len(big.steps) and small.probe_pairs < big.probe_pairs
    rungs = example(training={"epochs": 1}).rung_steps(94)
    assert {0, 1, *rungs, 94} <= set(small.steps)


def test_what_is_written_is_kept():
    written = {"eval": {"at": [0, "50%"], "train_probe": 300}, "samples": {"prompts": 99}}
    plan = evaluation(workload(1_000), pairs=1_000, **written)
    assert plan.probe_pairs == 300 and plan.sample_prompts == 99 and 8 in plan.steps


@given(
    pairs=st.integers(2_000, 200_000), tokens=st.floats(40, 4_000), full=st.booleans(),
    select_share=st.floats(0.005, 0.05),
)
def test_evaluating_stays_below_a_quarter_where_select_is_at_most_a_twentieth(pairs, tokens, full, select_share):
    load = Workload(pairs, tokens, max(1, int(select_share * pairs)), tokens, tokens / 5, full)
    plan = evaluation(load, pairs=pairs)
    # By hand: step 0 reads the probe, every later scoring select too; every draw decodes, then is read twice.
    scorings = sum(1 for step in plan.steps if step)
    read = (scorings * load.select_pairs + (scorings + 1) * plan.probe_pairs) * tokens
    new = plan.max_new_tokens
    drawn = len(plan.sample_steps) * plan.sample_prompts * (tokens / 5 + 5 * new + 2 * (tokens / 5 + new))
    trained = pairs * tokens * (3 if full else 2.2)
    assert share(load, plan) == pytest.approx((read + drawn) / (read + drawn + trained))
    smallest = plan.probe_pairs == 64 or plan.sample_prompts == 16
    assert share(load, plan) < 0.25 or smallest


def test_every_trial_of_a_sweep_has_the_same_plan_whatever_its_values():
    spec = example(training={"epochs": 1})
    configs = [
        spec.trial_config("sigmoid", {"beta": beta, "learning_rate": 1e-5}, train_pairs=9_000,
                          workload=workload(9_000))
        for beta in (0.01, 0.3)
    ]
    assert configs[0].evaluation == configs[1].evaluation

"""The judge section and the objective: what is accepted, what is refused, and that no key is ever repeated."""

from pathlib import Path

import pytest

from prefopt_ray.errors import SpecError
from prefopt_ray.spec import SweepSpec, dump_spec, parse_spec

BASE = """
name: judged
model: {policy: gold, dtype: float32}
data: {train: {source: gold, pairs: 100}}
training: {steps: 90}
search: {method: grid, losses: {sigmoid: {beta: 0.1}}, shared: {learning_rate: 1e-3}}
"""
ENDPOINT = "url: http://localhost:8000/v1, model: played"
PASTED = "sk-proj-0123456789"


@pytest.mark.parametrize("judge", [
    "{reward_model: org/judge}", "{callable: 'package.module:function'}", f"{{endpoint: {{{ENDPOINT}}}, at: rungs}}",
    f"{{endpoint: {{{ENDPOINT}, key_env: JUDGE_KEY, max_usd: 2, usd_per_million_tokens: {{input: 1, output: 2}}}}}}",
])
def test_a_judge_survives_being_written_out(judge: str) -> None:
    spec = parse_spec(f"{BASE}judge: {judge}")
    assert parse_spec(dump_spec(spec)) == spec


def test_a_function_s_file_and_a_template_start_at_the_spec(tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("{prompt} {a} {b} [[A]]")
    spec = parse_spec(f"{BASE}judge: {{callable: judges.py:score}}", folder=tmp_path)
    assert spec.judge.callable == f"{tmp_path}/judges.py:score"
    spec = parse_spec(f"{BASE}judge: {{endpoint: {{{ENDPOINT}, template: ask.txt}}}}", folder=tmp_path)
    assert spec.judge.endpoint.template == f"{tmp_path}/ask.txt"


def test_another_judge_replaces_the_one_that_is_extended() -> None:
    spec = parse_spec(f"{BASE}judge: {{reward_model: org/judge, top: 2}}", overrides=["judge.callable=a:b"])
    assert (spec.judge.reward_model, spec.judge.callable, spec.judge.top) == (None, "a:b", 2)


def test_a_judge_at_the_end_does_not_change_what_a_trial_is() -> None:
    plain, end, rungs = (parse_spec(BASE + line) for line in (
        "", "judge: {callable: 'a:b'}", "judge: {callable: 'a:b', at: rungs}",
    ))
    assert plain.content_hash() == end.content_hash() != rungs.content_hash()


@pytest.mark.parametrize(("metric", "judge", "measured"), [
    ("gain", "{callable: 'a:b', at: rungs}", "eval/gain"), ("judge", "{callable: 'a:b', at: rungs}", "judge/win_lcb"),
    ("gold", "{callable: 'a:b'}", "gold/win_lcb"),
])
def test_the_objective_is_a_metric_of_the_trial(metric: str, judge: str, measured: str) -> None:
    spec = parse_spec(f"{BASE}judge: {judge}\nobjective: {{metric: {metric}}}")
    assert _config(spec).evaluation.objective == measured


@pytest.mark.parametrize(("lines", "key", "rule"), [
    ("judge: {}", "judge", "who judges"),
    ("judge: {callable: 'a:b', reward_model: org/judge}", "judge.callable", "already reward_model"),
    ("judge: {callable: 'a:b', time_limit_s: 3}", "judge.time_limit_s", "not read with at: end"),
    ("judge: {callable: score}", "judge.callable", "package.module:function"),
    (f"judge: {{endpoint: {{{ENDPOINT}, max_usd: 3}}}}", "judge.endpoint.max_usd", "without prices"),
    ("judge: {endpoint: {url: localhost, model: m}}", "judge.endpoint.url", "http or https address"),
    ("judge: {endpoint: {url: 'http://h:99999', model: m}}", "judge.endpoint.url", "http or https address"),
    ("judge: {callable: 'a:b'}\nobjective: {metric: judge}", "objective.metric", "judge at every rung"),
    ("objective: {metric: judge}", "objective.metric", "judge at every rung"),
    ("judge: {callable: 'a:b', at: rungs}\nobjective: {metric: judge}\nsamples: {at: [50%]}", "samples.at", "the scheduler decides"),
    ("objective: {metric: gold}\nsamples: {at: never}", "samples.at", "sampled completions"),
])
def test_what_cannot_work_is_refused_with_its_key(lines: str, key: str, rule: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(BASE + lines)
    assert [(p.key, rule in p.rule) for p in caught.value.problems] == [(key, True)]


def test_only_the_embedded_task_has_a_gold_reward() -> None:
    text = BASE.replace("policy: gold", "policy: org/model").replace("source: gold, pairs: 100", "source: org/pairs")
    with pytest.raises(SpecError, match="only the embedded task has a gold reward"):
        parse_spec(f"{text}objective: {{metric: gold}}")


@pytest.mark.parametrize("written", [
    f"url: http://h/v1, model: m, key_env: {PASTED}", f"url: 'https://me:{PASTED}@h/v1', model: m",
    f"url: 'https://h/v1?key={PASTED}', model: m", f"url: http://h/v1, model: m, api_key: {PASTED}",
    f"url: http://h/v1, model: m, key: {PASTED}",
])
def test_a_pasted_key_is_refused_and_not_repeated(written: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(f"{BASE}judge: {{endpoint: {{{written}}}}}")
    assert PASTED not in str(caught.value)


def _config(spec: SweepSpec):
    (point,) = spec.grid()
    return spec.trial_config(*point, train_pairs=100)

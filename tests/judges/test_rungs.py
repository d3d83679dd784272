"""A judge inside trials: late, broken or gone, it costs that evaluation's win rate and nothing else."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny import random_data, referenced, tiny_engine, trial_config

from prefopt_ray.judges.base import Advance, Preferences, Prompt
from prefopt_ray.judges.functions import FunctionPreferences, FunctionScores
from prefopt_ray.judges.rungs import RungJudge
from prefopt_ray.train import Worker, make_worker, train
from prefopt_ray.train.scorers import Completion

PROMPTS = [Prompt(str(number)) for number in range(16)]
POLICY = [Completion(str(number), 1, finished=True) for number in range(16)]
REFERENCE = [Completion("7", 1, finished=True)] * 16


def worth(prompts: list[str], completions: list[Completion]) -> list[float]:
    return [float(completion.text) for completion in completions]


def words(prompts: list[str], completions: list[Completion]) -> list[float]:
    return [float(len(completion.text.split())) for completion in completions]


def test_outcomes_are_the_policy_s_against_the_reference() -> None:
    outcomes = RungJudge(FunctionScores("worth", worth), PROMPTS, time_limit_s=10).outcomes(POLICY, REFERENCE)
    assert outcomes.tolist() == [0] * 7 + [0.5] + [1] * 8


def test_a_late_function_holds_nobody_and_is_not_called_again_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    release, calls = threading.Event(), []

    def waits(prompts: list[str], completions: list[Completion]) -> list[float]:
        calls.append(len(prompts))
        release.wait(20)
        return worth(prompts, completions)

    judge = RungJudge(FunctionScores("waits", waits), PROMPTS, time_limit_s=0.1)
    started = time.monotonic()
    assert np.isnan(judge.outcomes(POLICY, REFERENCE)).all() and np.isnan(judge.outcomes(POLICY, REFERENCE)).all()
    assert time.monotonic() - started < 2 and len(calls) == 1
    assert "not ready in 0.1 s" in caplog.text and "still busy" in caplog.text
    release.set()
    judge._thread.join(5)
    assert judge.outcomes(POLICY, REFERENCE).tolist() == [0] * 7 + [0.5] + [1] * 8


def test_a_judge_that_tells_its_progress_stops_when_it_is_late() -> None:
    judge = _OneByOne()
    assert np.isnan(RungJudge(judge, PROMPTS, time_limit_s=0.2).outcomes(POLICY, REFERENCE)).all()
    time.sleep(0.3)
    asked = judge.asked
    time.sleep(0.2)
    assert judge.asked == asked < 32


def test_a_judge_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    judge = FunctionPreferences("broken", lambda prompts, first, second: [2.0] * len(prompts))
    assert np.isnan(RungJudge(judge, PROMPTS, time_limit_s=10).outcomes(POLICY, REFERENCE)).all()
    assert "between 0 and 1" in caplog.text


def test_a_judge_out_of_memory_is_a_warning_and_an_interrupt_is_none(caplog: pytest.LogCaptureFixture) -> None:
    broken = RungJudge(_Dies(RuntimeError("CUDA out of memory")), PROMPTS, time_limit_s=10)
    assert np.isnan(broken.outcomes(POLICY, REFERENCE)).all()
    assert "RuntimeError: CUDA out of memory" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        RungJudge(_Dies(KeyboardInterrupt()), PROMPTS, time_limit_s=10).outcomes(POLICY, REFERENCE)


def test_a_trial_goes_on_without_the_win_rate_of_a_late_judge() -> None:
    def sleeps(prompts: list[str], completions: list[Completion]) -> list[float]:
        time.sleep(0.5)
        return words(prompts, completions)

    reports = list(train(trial_config(), _worker(FunctionScores("sleeps", sleeps), time_limit_s=0.05)))
    assert reports[-1].step == 8 and reports[-1].objective >= 0
    for report in reports:
        assert "judge/win_rate" not in report.metrics and "judge/win_lcb" not in report.metrics
    assert [r.metrics["judge/unjudged"] for r in reports if r.step in (0, 8)] == [16, 16]


def test_the_objective_is_the_lower_bound_and_counts_only_where_it_was_measured() -> None:
    config = trial_config()
    judged = replace(config, evaluation=replace(config.evaluation, objective="judge/win_lcb"))
    reports = list(train(judged, _worker(FunctionScores("words", words), time_limit_s=20)))
    by_step = {report.step: report for report in reports}
    assert by_step[8].objective == by_step[8].metrics["judge/win_lcb"] < by_step[8].metrics["judge/win_rate"]
    assert by_step[4].objective == -1 and by_step[4].best_so_far == -1  # no completions were drawn there
    assert (by_step[8].best_so_far, by_step[8].best_step) == (by_step[8].objective, 8)


class _OneByOne:
    name = "one by one"
    asked = 0

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], *, advance: Advance
    ) -> Preferences:
        for _ in prompts:
            time.sleep(0.03)
            self.asked += 1
            advance(self.asked)
        return Preferences(np.full(len(prompts), 0.5))


class _Dies:
    name = "dies"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, advance: Advance) -> np.ndarray:
        raise self._error


def _worker(judge: FunctionScores, *, time_limit_s: float) -> Worker:
    engine = tiny_engine()
    return make_worker(
        engine, referenced(engine, random_data()), decode=lambda ids: " ".join(map(str, ids)), probe_pairs=32,
        sample_prompts=16, judges=(RungJudge(judge, PROMPTS, time_limit_s=time_limit_s),),
    )

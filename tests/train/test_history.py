"""A verdict made again from a trial's folder is the one that was recorded, whatever became of the trial."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import random_data, referenced, tiny_engine, tiny_worker, trial_config
from train.runs import evaluated_at, run, run_in_pieces, short_config

from prefopt_ray.errors import CheckpointError
from prefopt_ray.measures.verdicts import Thresholds, judge
from prefopt_ray.train import Worker, make_worker
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.history import read_history, trial_thresholds
from prefopt_ray.trial import EndState, OptimizerConfig, Report, TrialConfig

SGD = OptimizerConfig(kind="sgd")


def learning() -> TrialConfig:
    config = trial_config(steps=12, learning_rate=1e-2)
    return evaluated_at(config, 0, 2, 4, 8, 12, samples=(0, 4, 8, 12))


def diverging() -> TrialConfig:
    """By its loss, every number finite."""
    config = trial_config(
        "ipo_sum", adapter="none", steps=12, learning_rate=0.1, optimizer=SGD, max_grad_norm=0.0, params={"beta": 0.02}
    )
    return evaluated_at(config, 0, 1, 2, 4, 12)


def blowing_up() -> TrialConfig:
    config = trial_config(steps=12, learning_rate=1e30, optimizer=SGD, max_grad_norm=0.0)
    return evaluated_at(config, 0, 12)


def simpo() -> TrialConfig:
    return short_config()


@pytest.mark.parametrize("config", [learning, diverging, blowing_up, simpo])
@pytest.mark.parametrize("pieces", [[], [1, 2]], ids=["whole", "resumed"])
def test_every_recorded_verdict_is_made_again_from_the_folder(
    config: Callable[[], TrialConfig], pieces: list[int], tmp_path: Path
) -> None:
    """Bit by bit: the evidence holds the numbers."""
    reports = run_in_pieces(config(), tmp_path, pieces=pieces)
    if config in (diverging, blowing_up):
        assert reports[-1].end_state is EndState.DIVERGED
    assert_recomputed(reports, tmp_path, config())


def assert_recomputed(reports: list[Report], folder: Path, config: TrialConfig) -> None:
    history, thresholds = read_history(folder, config), trial_thresholds(Thresholds(), config)
    for report in reports[1:]:
        assert judge(history.until(report.step), thresholds) == report.verdict
    last = reports[-1]
    assert [record.step for record in history.steps] == list(range(1, last.step + 1))
    if last.best_step > 0:
        assert judge(history.until(last.best_step), thresholds) == last.verdict_at_best


def test_the_steps_of_a_diverged_trial_are_all_there_the_bad_one_too(tmp_path: Path) -> None:
    run(blowing_up(), folder=tmp_path)
    *sound, bad = read_history(tmp_path, blowing_up()).steps
    assert [record.finite for record in sound] == [True] * len(sound) and not bad.finite


def test_other_thresholds_give_another_verdict_of_the_same_trial(tmp_path: Path) -> None:
    run(learning(), folder=tmp_path)
    history = read_history(tmp_path, learning())
    strict = judge(history, Thresholds(broken_kl_per_token=1e-6))
    assert strict.headline == "broken" and judge(history).headline != "broken"


def test_what_a_worker_was_given_is_what_its_trials_are_judged_by(tmp_path: Path) -> None:
    engine = tiny_engine()
    worker = make_worker(
        engine, referenced(engine, random_data()), decode=str, probe_pairs=32, sample_prompts=4,
        thresholds=Thresholds(broken_kl_per_token=1e-6),
    )
    assert run(learning(), worker)[-1].verdict.headline == "broken"


def test_a_folder_without_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing or torn"):
        read_history(tmp_path, learning())


# -- guards ------------------------------------------------------------------------------------------


GUARDED = {
    "broken": Thresholds(broken_kl_per_token=1e-6),
    "memorised": Thresholds(memorised_accuracy=0.0, learned_z=1e9),
    "collapsed": Thresholds(collapsed_frac=0.0),
    "displaced": Thresholds(displaced_z=-1e9, displaced_frac=0.0, displaced_leak_per_token=-1e9),
    "over_optimised": Thresholds(over_optimised_z=-1e9, over_optimised_evaluations=1),
}
RULES = {"collapsed": "collapsed_rejected", "displaced": "likelihood_displaced"}


@pytest.mark.parametrize("guard", GUARDED)
def test_each_guard_stops_a_trial_and_says_so_or_flags_it(guard: str) -> None:
    """With a threshold that takes any trial for a bad one."""
    rule, ended = RULES.get(guard, guard), {}
    for action in ("stop", "flag"):
        config = replace(learning(), guards=replace(learning().guards, **{guard: action}))
        ended[action] = run(config, replace(scored_worker(), thresholds=GUARDED[guard]))[-1]
    stopped, flagged = ended["stop"], ended["flag"]
    assert stopped.end_state is EndState.STOPPED_EARLY and stopped.reason.startswith(f"guard {guard}: ")
    assert rule in stopped.verdict.flags and rule in flagged.verdict.flags
    assert stopped.step < 12 and flagged.end_state is EndState.COMPLETED


def scored_worker() -> Worker:
    class Falling:
        """A reward that likes each policy less than the one before."""

        name = "falling"

        def __init__(self) -> None:
            self.asked = 0

        def score(self, prompts: list[str], completions: list) -> np.ndarray:
            self.asked += 1
            return np.random.default_rng(self.asked).normal(size=len(prompts)) - 0.5 * self.asked

    engine = tiny_engine()
    return make_worker(
        engine, referenced(engine, random_data()), decode=str, probe_pairs=32, sample_prompts=16, scorers=(Falling(),)
    )


def test_a_broken_evaluation_is_no_result() -> None:
    """Its gain may be fine: it is the policy's own samples that are not."""
    worker = replace(tiny_worker(), thresholds=Thresholds(broken_kl_per_token=1e-6))
    reports = run(learning(), worker)
    for report in reports:
        assert (report.objective == -1.0) == (report.verdict.headline == "broken")
    assert 0 < reports[-1].best_step < 4, "samples are drawn at 4 for the first time"


def test_a_log_without_steps_has_none() -> None:
    assert EvaluationLog({}).step_records() == []

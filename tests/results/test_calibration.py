"""Rank correlations of a sweep's own trials with its judge, against scipy and against made-up sweeps."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr
from tiny import trial_config

from prefopt_ray.results.calibration import FEW_TRIALS, calibrate_sweep, spearman
from prefopt_ray.errors import SweepError
from prefopt_ray.results.judgement import JudgedFinalist, Judgement, store
from prefopt_ray.judges.base import Prompt
from prefopt_ray.judges.functions import FunctionScores
from prefopt_ray.judges.tournament import REFERENCE_NAME, play
from prefopt_ray.results.ledger import CONFIRM, Ledger, SweepRecord, read_sweep
from prefopt_ray.report.terminal import calibration_table
from prefopt_ray.train.scorers import Completion
from prefopt_ray.trial import EndState, Report, Verdict

HEALTHY = Verdict("healthy")


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipy_s_with_ties_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, 30), rng.normal(size=30)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_without_differences_there_is_no_correlation() -> None:
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def write_sweep(folder: Path, points: list[dict[str, float]], *, key: str | None) -> SweepRecord:
    """One trial per point, evaluated at steps 4 and 8; its truth under `key` follows `truth`."""
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("sweep", format=1, sweep_id="cafe", name="made", spec_hash="0", facts={})
    for number, point in enumerate(points):
        name = f"{number:04d}"
        config = trial_config(params={"beta": 0.1 + number / 100})
        ledger.append("trial", trial=name, number=number, values=dict(config.loss_params), baseline=number == 0,
                      config=config.to_dict())
        for step in (4, 8):
            metrics = {
                "eval/gain": point["gain"] * step / 8, "eval/rewards/accuracy": point["accuracy"],
                "eval/drift/chosen/per_token": point["drift"], "eval/drift/rejected/per_token": -point["drift"],
            }
            if key is not None:
                metrics[key] = point["truth"] * step / 8
            gain = metrics["eval/gain"]
            report = Report(step, 8 * step, metrics, gain, gain, step, HEALTHY, HEALTHY)
            ledger.append("report", trial=name, report=report.to_dict())
        ledger.append("end", trial=name, end_state=EndState.COMPLETED, reason="made up")
    ledger.close()
    return read_sweep(folder)


def points(count: int) -> list[dict[str, float]]:
    """The truth follows gain, ignores accuracy, and falls with drift."""
    rng = np.random.default_rng(3)
    truth = np.sort(rng.uniform(0.1, 0.9, count))
    return [
        {"truth": t, "gain": t / 4, "accuracy": a, "drift": 1 - t} for t, a in zip(truth, rng.uniform(size=count))
    ]


def test_measures_that_follow_the_gold_reward_have_a_correlation_of_one(tmp_path: Path) -> None:
    given = points(16)
    (calibration,) = calibrate_sweep(write_sweep(tmp_path, given, key="gold/reward"))
    gain, accuracy, drift = calibration.rows
    assert (calibration.truth, calibration.trials) == ("the gold reward", 16)
    assert gain.at_best.rho == pytest.approx(1) and gain.at_best.low == pytest.approx(1)
    assert (gain.at_best.trials, gain.at_best.evaluations) == (16, 16)
    assert gain.within_steps.rho == pytest.approx(1)
    assert (gain.within_steps.trials, gain.within_steps.evaluations) == (16, 32)
    assert drift.at_best.rho == pytest.approx(1)  # less drift, more reward
    by_hand = spearmanr([p["accuracy"] for p in given], [p["truth"] for p in given]).statistic
    assert accuracy.at_best.rho == pytest.approx(by_hand) and accuracy.at_best.low < by_hand < accuracy.at_best.high
    assert calibration.conclusion.startswith("higher gain goes with it")


def test_a_judge_at_rungs_is_a_truth_too(tmp_path: Path) -> None:
    given = [point | {"gain": 0.3 - point["gain"]} for point in points(16)]
    (calibration,) = calibrate_sweep(write_sweep(tmp_path, given, key="judge/win_rate"))
    assert calibration.rows[0].at_best.rho == pytest.approx(-1)
    assert "goes against it" in calibration.conclusion


def test_few_trials_are_said_to_be_few(tmp_path: Path) -> None:
    (calibration,) = calibrate_sweep(write_sweep(tmp_path, points(FEW_TRIALS - 1), key="gold/reward"))
    found = calibration.rows[0].at_best
    assert found.rho == pytest.approx(1) and found.low is found.high is None and "too few" in calibration.conclusion
    out = io.StringIO()
    Console(file=out, width=100).print(calibration_table(calibration))
    shown = " ".join(out.getvalue().split())
    assert "11 trials, too few trials for an interval" in shown and " to " not in shown
    assert "+1.00 (11 trials)" in shown and "+1.00 (11 trials, 22 evaluations)" in shown
    (none,) = calibrate_sweep(write_sweep(tmp_path / "three", points(3), key="gold/reward"))
    assert all(row.at_best is None and row.within_steps is None for row in none.rows)


def test_a_stored_judgement_is_compared_at_the_steps_it_judged(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, points(12), key=None)
    judge = FunctionScores("worth", lambda prompts, completions: [float(c.text) for c in completions])
    rng = np.random.default_rng(0)
    samples = {
        name: [Completion(str(trial.score + 0.2 * rng.normal()), 1, finished=True) for _ in range(300)]
        for name, trial in sweep.trials.items()
    } | {REFERENCE_NAME: [Completion("0", 1, finished=True)] * 300}
    tournament = play(judge, [Prompt(str(number)) for number in range(300)], samples)
    finalists = tuple(JudgedFinalist(t.trial_id, 8, t.score, t.baseline, t.config.label) for t in sweep.trials.values())
    store(sweep.folder, Judgement("worth", finalists, tournament))
    (calibration,) = calibrate_sweep(sweep)
    by_name = {row.competitor: row.strength for row in tournament.competitors}
    strengths = [by_name[name] for name in sweep.trials]
    expected = spearmanr([trial.score for trial in sweep.trials.values()], strengths).statistic
    assert calibration.truth == "the judge worth" and calibration.rows[0].within_steps is None
    assert calibration.rows[0].at_best.rho == pytest.approx(expected) and expected > 0.8


def test_a_confirmed_run_is_no_trial_of_the_search(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, points(12), key=None)
    tournament = play(
        FunctionScores("worth", lambda prompts, completions: [float(c.text) for c in completions]),
        [Prompt(str(number)) for number in range(4)],
        {name: [Completion(str(n), 1, finished=True)] * 4 for n, name in enumerate((REFERENCE_NAME, *sweep.trials))},
    )
    finalists = tuple(JudgedFinalist(t.trial_id, 8, t.score, t.baseline, t.config.label) for t in sweep.trials.values())
    store(sweep.folder, Judgement("worth", finalists, tournament))
    for name in ("0010", "0011"):
        sweep.trials[name].role = CONFIRM
    (calibration,) = calibrate_sweep(sweep)
    assert calibration.trials == calibration.rows[0].at_best.trials == 10
    for trial in sweep.trials.values():
        trial.role = CONFIRM
    with pytest.raises(SweepError, match="verdicts on searched trials.*prefopt judge SWEEP --top"):
        calibrate_sweep(sweep)


def test_that_later_steps_are_better_is_no_correlation(tmp_path: Path) -> None:
    """Both grow with the steps and are unrelated between trials: averaged by hand over the two steps."""
    rng = np.random.default_rng(5)
    given = [point | {"gain": gain / 50} for point, gain in zip(points(16), rng.uniform(1, 1.1, 16), strict=True)]
    (calibration,) = calibrate_sweep(write_sweep(tmp_path, given, key="gold/reward"))
    measured, truth = [p["gain"] for p in given], [p["truth"] for p in given]
    pooled = spearmanr([g * s for s in (0.5, 1) for g in measured], [t * s for s in (0.5, 1) for t in truth]).statistic
    within = calibration.rows[0].within_steps
    assert within.rho == pytest.approx(spearmanr(measured, truth).statistic)  # the same at both steps
    assert abs(within.rho) < pooled - 0.2 and within.low < 0 < within.high


def test_steps_count_by_their_trials_and_those_with_hardly_any_do_not(tmp_path: Path) -> None:
    """16 trials agree at step 4 and 8 trials disagree at step 8; the three at step 12 are too few."""
    sweep = write_sweep(tmp_path, points(16), key="gold/reward")
    for number, trial in enumerate(sweep.trials.values()):
        if number < 8:
            trial.reports[8].metrics["eval/gain"] *= -1
        else:
            del trial.reports[8]
        if number < 3:
            trial.reports[12] = replace(trial.reports[4], step=12)
    within = calibrate_sweep(sweep)[0].rows[0].within_steps
    assert within.rho == pytest.approx((16 * 1 + 8 * -1) / 24)
    assert (within.trials, within.evaluations) == (16, 24)


def test_without_any_truth_the_way_to_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="prefopt judge SWEEP"):
        calibrate_sweep(write_sweep(tmp_path, points(4), key=None))

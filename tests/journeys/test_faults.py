"""Ctrl-C, and kill -9 of driver and worker: nothing is lost, nothing runs twice, the numbers are the same."""

import os
import signal
from pathlib import Path

import pytest
from journeys.conftest import FinishedSweep
from journeys.journey import interrupt, prefopt, start, wait_for

from prefopt_ray.ledger import SweepRecord, read_sweep


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_a_sweep_stopped_in_the_middle_resumes_to_the_same_bits(
    how: signal.Signals, finished: FinishedSweep, tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(finished.spec.read_text())
    process = start("run", "sweep.yaml", cwd=tmp_path)
    sweep = wait_for(has_ended_and_running_trials, tmp_path / "prefopt-results", process)
    code = interrupt(process, how=how)
    if how is signal.SIGINT:
        assert code == 130, (tmp_path / "started.log").read_text()
        stopped = read_sweep(sweep.folder)
        assert any(trial.paused for trial in stopped.trials.values())
    resumed = prefopt("resume", "journey", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert_same_sweep(read_sweep(sweep.folder), finished.record)
    assert_one_run_per_trial(tmp_path, read_sweep(sweep.folder))


def test_a_killed_worker_costs_its_trial_nothing(finished: FinishedSweep, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(finished.spec.read_text())
    process = start("run", "sweep.yaml", cwd=tmp_path)
    sweep = wait_for(has_ended_and_running_trials, tmp_path / "prefopt-results", process)
    running = next(t for t in sweep.trials.values() if t.placement and t.end_state is None)
    os.kill(running.placement["pid"], signal.SIGKILL)
    assert process.wait(timeout=180) == 0, (tmp_path / "started.log").read_text()
    assert_same_sweep(read_sweep(sweep.folder), finished.record)
    assert_one_run_per_trial(tmp_path, read_sweep(sweep.folder))


def has_ended_and_running_trials(sweep: SweepRecord) -> bool:
    trials = sweep.trials.values()
    return any(t.end_state for t in trials) and any(t.reports and not t.end_state for t in trials)


def assert_same_sweep(sweep: SweepRecord, undisturbed: SweepRecord) -> None:
    assert set(sweep.trials) == set(undisturbed.trials)
    for trial_id, trial in sweep.trials.items():
        other = undisturbed.trials[trial_id]
        assert trial.end_state == other.end_state
        assert sorted(trial.reports) == sorted(other.reports)
        for step, report in trial.reports.items():
            assert dict(report.metrics) == dict(other.reports[step].metrics), (trial_id, step)


def assert_one_run_per_trial(home: Path, sweep: SweepRecord) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'prefopt-results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prefopt/journey")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(runs) == 1 + len(sweep.trials)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.data.tags["kind"] == "trial":
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
            assert steps == list(range(1, 61)), run.data.tags["trial_id"]

"""Ctrl-C, and kill -9 of driver and worker: nothing is lost, nothing runs twice, the numbers are the same."""

import os
import signal
from dataclasses import asdict
from pathlib import Path

from journeys.conftest import FinishedSweep
from journeys.journey import interrupt, prefopt, start, wait_for

from prefopt_ray.results.ledger import SweepRecord, read_events, read_sweep
from prefopt_ray.spec import SweepSpec, load_spec
from prefopt_ray.trial import EndState
from prefopt_ray.tuning.rungs import Arrival, SuccessiveHalving
from prefopt_ray.tuning.run import unfinished_sweep


def test_a_sweep_stopped_by_ctrl_c_resumes_to_the_same_bits(finished: FinishedSweep, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(finished.spec.read_text())
    process = start("run", "sweep.yaml", cwd=tmp_path)
    sweep = wait_for(has_ended_and_running_trials, tmp_path / "prefopt-results", process)
    assert interrupt(process, how=signal.SIGINT) == 130, (tmp_path / "started.log").read_text()
    assert any(trial.paused for trial in read_sweep(sweep.folder).trials.values())
    resumed = prefopt("resume", "journey", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert_same_sweep(read_sweep(sweep.folder), finished.record)
    assert_one_run_per_trial(tmp_path, read_sweep(sweep.folder))


def test_a_driver_killed_under_asha_loses_neither_rungs_nor_numbers(finished: FinishedSweep, tmp_path: Path) -> None:
    text = finished.spec.read_text().replace("{kind: none}", "{kind: asha, preset: conservative}")
    (tmp_path / "sweep.yaml").write_text(text)
    process = start("run", "sweep.yaml", cwd=tmp_path)
    sweep = wait_for(has_ended_and_running_trials, tmp_path / "prefopt-results", process)
    interrupt(process, how=signal.SIGKILL)
    spec = load_spec(tmp_path / "sweep.yaml", storage=str(tmp_path / "prefopt-results"))
    assert unfinished_sweep(spec) == sweep.folder
    assert unfinished_sweep(SweepSpec.from_dict({**spec.to_dict(), "guards": {"overfit": "stop"}})) is None
    resumed = prefopt("run", "sweep.yaml", "--resume", cwd=tmp_path)
    assert resumed.code == 0 and f"going on with {sweep.folder.name}" in resumed.err, resumed.err
    assert unfinished_sweep(spec) is None
    ended = read_sweep(sweep.folder)
    assert set(ended.trials) == set(finished.record.trials)
    assert {t.end_state for t in ended.trials.values()} <= {EndState.COMPLETED, EndState.STOPPED_EARLY}
    assert_same_curves(ended, finished.record)
    assert_decisions_recompute(sweep.folder)
    assert_one_run_per_trial(tmp_path, ended)


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
    assert_same_curves(sweep, undisturbed)


def assert_same_curves(sweep: SweepRecord, undisturbed: SweepRecord) -> None:
    """Every metric of every evaluation that both made, to the last bit."""
    for trial_id, trial in sweep.trials.items():
        for step, report in trial.reports.items():
            assert dict(report.metrics) == dict(undisturbed.trials[trial_id].reports[step].metrics), (trial_id, step)


def assert_decisions_recompute(folder: Path) -> None:
    """The ledger's decisions, in its order, through a new rule object: cutoffs, counts and outcomes."""
    sweep, rule = read_sweep(folder), SuccessiveHalving((15, 30), 2)
    decided = [event for event in read_events(folder / "ledger.jsonl") if event["event"] == "decision"]
    assert decided
    for event in decided:
        trial, told = sweep.trials[event["trial"]], event["decision"]
        arrival = Arrival(
            trial.trial_id, trial.number, trial.config.loss, told["rung"], told["value"], protected=trial.baseline
        )
        assert asdict(rule.decide(arrival)) == told


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
            trained = sweep.trials[run.data.tags["trial_id"]].last.step
            assert steps == list(range(1, trained + 1)), run.data.tags["trial_id"]

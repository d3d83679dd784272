"""Replicates and a confirmation on real trials, with Ctrl-C in between: seeds wait for each other and lose nothing."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from journeys.journey import interrupt, prefopt, spec_text, start, wait_for

from prefopt_ray.results.configurations import configurations
from prefopt_ray.results.ledger import CONFIRM, SweepRecord, read_sweep
from prefopt_ray.trial import EndState


def waits_for_other_seeds(sweep: SweepRecord) -> bool:
    return any(trial.waiting for trial in sweep.trials.values())


@pytest.fixture(scope="module")
def home(chat_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep stopped by Ctrl-C while a seed waits at a rung, and resumed to its end."""
    home = tmp_path_factory.mktemp("seeds")
    (home / "sweep.yaml").write_text(spec_text(
        chat_model, pairs_file, name="seeds", training="{steps: 16, batch_pairs: 8, warmup: 2}",
        search="{method: grid, losses: {ipo_sum: {beta: 0.05}}, shared: {learning_rate: [1e-3, 1e-2]},"
               " baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}",
        scheduler="{kind: asha, first_rung: 4, keep_one_in: 2, within: sweep}",
        replicates="{seeds: [1, 2], from: 4}", confirm="{top: 1, seeds: [11, 12]}", samples="{at: never}",
        resources="{gpus_per_trial: 0, max_concurrent: 2}",
    ))
    process = start("run", "sweep.yaml", cwd=home)
    wait_for(waits_for_other_seeds, home / "prefopt-results", process)
    assert interrupt(process, how=signal.SIGINT) == 130, (home / "started.log").read_text()
    resumed = prefopt("resume", "seeds", "--json", cwd=home, timeout_s=480)
    assert resumed.code == 0, resumed.err
    (home / "answer.json").write_text(resumed.out)
    return home


@pytest.fixture(scope="module")
def sweep(home: Path) -> SweepRecord:
    (ledger,) = (home / "prefopt-results").glob("seeds-*/ledger.jsonl")
    return read_sweep(ledger.parent)


def test_every_trial_has_ended_and_seeds_of_a_configuration_were_judged_together(sweep: SweepRecord) -> None:
    assert sweep.finished
    assert {t.end_state for t in sweep.trials.values()} <= {EndState.COMPLETED, EndState.STOPPED_EARLY}
    baseline = configurations(sweep)[0]
    assert baseline.baseline and [t.seed for t in baseline.trials] == [1, 2]
    for configuration in configurations(sweep):
        for decision in configuration.decisions:
            alone = decision.rung == 4  # the second seed starts after it
            assert set(decision.seeds) == (set() if alone else {trial.trial_id for trial in configuration.trials})
            judged = configuration.trials[:1] if alone else configuration.trials
            steps = [step for step in configuration.first.reports if 0 < step <= decision.rung]
            means = [np.mean([trial.reports[step].objective for trial in judged]) for step in steps]
            assert decision.value == pytest.approx(max(means))


def test_the_confirmation_trained_the_winner_and_the_baseline_to_exactly_their_lengths(sweep: SweepRecord) -> None:
    confirmed = configurations(sweep, role=CONFIRM)
    searched = {c.key: c for c in configurations(sweep)}
    assert any(c.baseline for c in confirmed)
    for configuration in confirmed:
        length = searched[configuration.key].best_step
        assert [t.seed for t in configuration.trials] == [11, 12]
        for trial in configuration.trials:
            training = trial.config.training
            assert (training.total_steps, training.stop_step, training.schedule) == (length, length, "linear")
            assert trial.last.step == length and sweep.tested[trial.trial_id] == length
            assert (sweep.folder / "trials" / trial.trial_id / "adapter").is_dir()
    assert set(sweep.tested) == {t.trial_id for c in confirmed for t in c.trials}  # nobody else saw the test part


def test_the_answer_is_made_of_the_confirmation_and_its_spec_repeats_the_first_run(
    home: Path, sweep: SweepRecord
) -> None:
    best = json.loads((home / "answer.json").read_text())["best"]
    assert best["role"] == CONFIRM and best["confirmed"] and best["training_seeds"] == 2
    assert best["claim"] == "configuration"
    printed = prefopt("best", "seeds", cwd=home)
    assert "2 fresh seeds, schedule linear" in printed.out
    (home / "best.yaml").write_text(printed.out)
    trained = prefopt("train", "best.yaml", "--json", "--output", "again", cwd=home)
    assert trained.code == 0, trained.err
    first = sweep.trials[best["trial"]]
    assert json.loads(trained.out)["metrics"] == dict(first.reports[first.last.step].metrics)


def test_mlflow_has_a_run_for_each_seed_with_its_configuration_and_role(home: Path, sweep: SweepRecord) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'prefopt-results' / 'mlflow.db'}")
    rank = {}
    for trial in sweep.trials.values():
        run = client.get_run(trial.run_id)
        tags = run.data.tags
        assert (tags["configuration"], tags["seed"], tags["role"]) == (trial.configuration, str(trial.seed), trial.role)
        assert run.info.status == "FINISHED"
        steps = [point.step for point in client.get_metric_history(trial.run_id, "train/loss")]
        assert steps == list(range(1, trial.last.step + 1))  # one run for life, also of a seed that waited
        if "rank" in run.data.metrics:
            rank.setdefault(trial.configuration, set()).add((trial.role, run.data.metrics["rank"]))
    assert all(len(of_seeds) == 1 for of_seeds in rank.values())  # seeds share their configuration's


def test_show_lists_the_confirmation_apart(home: Path) -> None:
    shown = prefopt("show", "seeds", cwd=home)
    assert shown.code == 0 and "confirmation, with fresh seeds" in shown.out
    rows = json.loads(prefopt("show", "seeds", "--json", cwd=home).out)["trials"]
    assert [row["rank"] for row in rows if row["role"] == "search"] == [1, 2, 3]
    assert all(row["rank"] is None and row["seeds"] == 2 for row in rows if row["role"] == CONFIRM)

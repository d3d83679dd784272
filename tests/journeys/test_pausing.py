"""Sweeps whose trials pause at rungs, on real trials: who is called back continues to the same bits, the rest end."""

import signal
from pathlib import Path

import pytest
from journeys.journey import interrupt, prefopt, spec_text, start, wait_for

from prefopt_ray.results.ledger import SweepRecord, read_sweep
from prefopt_ray.trial import EndState

RUNGS = (4, 8)


def write_spec(home: Path, model: Path, pairs: Path, *, kind: str) -> None:
    (home / "sweep.yaml").write_text(spec_text(
        model, pairs, name="pausing", training="{steps: 12, batch_pairs: 8, warmup: 2}",
        search="{method: grid, losses: {sigmoid: {beta: [0.1, 0.5]}}, shared: {learning_rate: [1e-3, 3e-3, 1e-2]},"
               " baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}",
        scheduler=f"{{kind: {kind}, first_rung: 4, keep_one_in: 2}}", samples="{at: never}",
        eval="{at: [0, rungs], train_probe: 32}", resources="{gpus_per_trial: 0, max_concurrent: 2}",
    ))


def the_sweep(home: Path) -> SweepRecord:
    (ledger,) = (home / "prefopt-results").glob("pausing-*/ledger.jsonl")
    return read_sweep(ledger.parent)


def two_are_paused(sweep: SweepRecord) -> bool:
    return sum(trial.waiting for trial in sweep.trials.values()) >= 2


@pytest.fixture(scope="module")
def whole(chat_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """In lockstep: undisturbed."""
    home = tmp_path_factory.mktemp("lockstep")
    write_spec(home, chat_model, pairs_file, kind="lockstep")
    outcome = prefopt("run", "sweep.yaml", "--json", cwd=home)
    assert outcome.code == 0, outcome.err
    return the_sweep(home)


@pytest.fixture(scope="module")
def resumed(chat_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """Promotion, stopped by Ctrl-C while two trials are paused, and resumed."""
    home = tmp_path_factory.mktemp("promotion")
    write_spec(home, chat_model, pairs_file, kind="asha_promotion")
    process = start("run", "sweep.yaml", cwd=home)
    wait_for(two_are_paused, home / "prefopt-results", process)
    assert interrupt(process, how=signal.SIGINT) == 130, (home / "started.log").read_text()
    outcome = prefopt("resume", "pausing", "--json", cwd=home)
    assert outcome.code == 0, outcome.err
    return the_sweep(home)


def test_in_lockstep_the_best_half_of_each_rung_goes_on(whole: SweepRecord) -> None:
    assert whole.finished and len(whole.trials) == 6
    reached = {trial.trial_id: trial.last.step for trial in whole.trials.values() if not trial.baseline}
    values = {t.trial_id: {d.rung: d.value for d in t.decisions} for t in whole.trials.values()}
    there = set(values)
    for rung, after in zip(RUNGS, (8, 12), strict=True):
        best = sorted(there, key=lambda trial_id: (-values[trial_id][rung], trial_id))[: max(1, len(there) // 2)]
        assert {t for t, step in reached.items() if step >= after} == set(best) - {whole.baseline.trial_id}
        there = {*best, whole.baseline.trial_id}


@pytest.mark.parametrize("sweep", ["whole", "resumed"])
def test_every_trial_ended_and_says_where_and_why(sweep: str, request: pytest.FixtureRequest) -> None:
    record = request.getfixturevalue(sweep)
    assert record.finished and record.baseline.end_state == EndState.COMPLETED
    for trial in record.trials.values():
        assert not trial.waiting and not trial.paused
        if trial.end_state == EndState.STOPPED_EARLY:
            assert trial.last.step in RUNGS and f"rung at step {trial.last.step}: gain" in trial.reason
            assert "behind the cutoff" in trial.reason
        else:
            assert trial.end_state == EndState.COMPLETED and trial.last.step == 12


def test_at_every_rung_the_best_half_have_gone_on_after_a_resume(resumed: SweepRecord) -> None:
    for rung in RUNGS:
        there = [(t.decisions, t) for t in resumed.trials.values() if any(d.rung == rung for d in t.decisions)]
        last = {trial.trial_id: [d for d in decisions if d.rung == rung][-1] for decisions, trial in there}
        best = sorted(last, key=lambda trial_id: -last[trial_id].value)[: len(last) // 2]
        assert all(last[trial_id].keep for trial_id in best)


def test_a_trial_that_paused_has_the_numbers_of_one_that_did_not(whole: SweepRecord, resumed: SweepRecord) -> None:
    compared = 0
    for trial_id, trial in resumed.trials.items():
        for step in trial.reports.keys() & whole.trials[trial_id].reports.keys():
            assert dict(trial.reports[step].metrics) == dict(whole.trials[trial_id].reports[step].metrics)
            compared += step > RUNGS[0]
    assert compared

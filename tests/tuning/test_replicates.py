"""Seeds of one configuration in the driver, without a cluster: one decision for all, nobody waits for ever."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import trial_config
from tuning.machine import LAST, MEMORY, POINTS, RUNGS, Machine, Session, decisions, made_report

from prefopt_ray.results.configurations import Configuration, configurations
from prefopt_ray.results.ledger import CONFIRM, SweepRecord, TrialRecord, read_sweep
from prefopt_ray.trial import EndState, Report
from prefopt_ray.tuning.driver import ConfirmRun, Replicas
from prefopt_ray.tuning.rungs import Arrival, SuccessiveHalving


def ordered_by_beta(beta: float, seed: int, step: int) -> float:
    """A larger beta is better; the seeds differ by less than the betas."""
    return beta / 2 + 0.01 * seed + 0.001 * step


def test_every_configuration_is_trained_with_every_seed_and_the_searcher_is_told_the_mean(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=Replicas((1, 2, 3)))
    Machine(session, ordered_by_beta, slots=3).run()
    session.close()
    sweep = read_sweep(tmp_path)
    for configuration in configurations(sweep):
        assert [trial.seed for trial in configuration.trials] == [1, 2, 3]
        assert {trial.configuration for trial in configuration.trials} == {configuration.first.trial_id}
    told = dict(session.proposer.told)
    assert len(session.proposer.told) == len(POINTS)  # once each, and nothing of seeds
    best = max(told)
    assert told[best] == pytest.approx(ordered_by_beta(best, 2, LAST))  # seed 2 is the mean of 1, 2, 3


def test_a_rung_is_decided_once_by_the_mean_over_all_seeds(tmp_path: Path) -> None:
    def gain(beta: float, seed: int, step: int) -> float:
        lucky = 0.3 if (beta, seed) == (0.2, 1) else 0.0  # this seed alone would pass
        return (0.5 if beta == 0.1 else 0.3) + lucky + 0.001 * step

    session = Session(tmp_path, replicas=Replicas((1, 2, 3)))
    Machine(session, gain, slots=1).run()
    session.close()
    sweep = read_sweep(tmp_path)
    unlucky = configurations(sweep)[1]
    assert {t.end_state for t in unlucky.trials} == {EndState.STOPPED_EARLY}
    (decision,) = unlucky.decisions
    assert decision.value == pytest.approx(np.mean(list(decision.seeds.values()))) == pytest.approx(0.402)
    assert set(decision.seeds) == {t.trial_id for t in unlucky.trials} and not decision.keep
    assert "mean gain 0.4020 of 3 seeds below the cutoff" in unlucky.first.reason
    assert all(t.last.step == decision.rung for t in unlucky.trials)  # nobody ran past it meanwhile


def test_further_seeds_start_only_for_configurations_past_the_point(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=Replicas((1, 2, 3), from_step=2))
    Machine(session, lambda beta, seed, step: 0.9 - beta + 0.001 * step, slots=1).run()
    session.close()
    found = {c.config.loss_params["beta"]: c for c in configurations(read_sweep(tmp_path))}
    assert len(found[0.1].trials) == 3
    assert [len(found[beta].trials) for beta in (0.2, 0.3, 0.4)] == [1, 1, 1]  # stopped at the rung at step 2
    early = found[0.1].decision(2)
    assert early.keep and early.seeds == {}  # one seed decided there, and the others do not decide again


def test_a_seed_that_breaks_lets_the_others_go_on(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=Replicas((1, 2)))
    first, second = (session.driver.next_order() for _ in range(2))
    assert not session.driver.take(first.trial_id, made_report(0.5, 2, end=False))
    assert session.driver.sweep.trials[first.trial_id].state == "waiting"
    session.driver.failed(second.trial_id, "its process died")
    assert session.driver.next_order().trial_id == first.trial_id
    (configuration,) = configurations(session.driver.sweep)
    assert configuration.decision(2).value == pytest.approx(0.5)
    session.close()


def test_a_seed_that_diverged_counts_a_seed_that_failed_does_not(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=Replicas((1, 2)))
    first, second = (session.driver.next_order() for _ in range(2))
    for step, gain in ((1, 0.1), (2, 0.4)):
        session.driver.take(first.trial_id, made_report(gain, step, end=False))
    session.driver.take(second.trial_id, made_report(0.2, 1, end=False))
    diverged = Report(**{**vars(made_report(-1.0, 2, end=False)), "end_state": EndState.DIVERGED, "reason": "NaN"})
    session.driver.take(second.trial_id, diverged)
    (configuration,) = configurations(session.driver.sweep)
    assert configuration.best_step == 1 and configuration.score == pytest.approx(0.15)
    session.close()


def test_the_stop_step_is_common_to_all_seeds() -> None:
    def trial(name: str, gains: dict[int, float]) -> TrialRecord:
        record = TrialRecord(name, 0, {}, trial_config(), baseline=False, configuration="a")
        record.reports = {step: made_report(gain, step, end=False) for step, gain in gains.items()}
        return record

    configuration = Configuration((trial("a", {1: 0.1, 2: 0.5, 4: 0.3}), trial("b", {1: 0.1, 2: 0.1, 4: 0.4, 8: 0.9})))
    assert configuration.gains == pytest.approx({1: 0.1, 2: 0.3, 4: 0.35})
    assert configuration.best_step == 4  # neither seed's own best, and not the step that only one has reached



@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), slots=st.integers(1, 5), start=st.sampled_from([0, 1, 2, 4, 8]),
       cut=st.integers(1, 40), lost=st.integers(0, 4))
def test_whatever_the_order_nobody_waits_for_ever_and_a_resume_decides_the_same(
    seed: int, slots: int, start: int, cut: int, lost: int
) -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        interrupt_and_resume(Path(folder), seed=seed, slots=slots, start=start, cut=cut, lost=lost)


def interrupt_and_resume(folder: Path, *, seed: int, slots: int, start: int, cut: int, lost: int) -> None:
    """A driver killed after `cut` reports and before its last `lost` lines were written; then another one."""
    replicas = Replicas((1, 2, 3), from_step=start)
    noise = np.random.default_rng(seed).normal(0, 0.1, size=(5, 4))

    def gain(beta: float, of_seed: int, step: int) -> float:
        return 0.5 + float(noise[round(beta * 10), of_seed]) + 0.001 * step

    session = Session(folder, replicas=replicas)
    Machine(session, gain, slots=slots, seed=seed).run(reports=cut)
    session.close()  # as if killed: nothing is said to anybody
    path = folder / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: max(1, len(lines) - lost)]))
    before = decisions(folder)
    resumed = Session(folder, replicas=replicas)
    Machine(resumed, gain, slots=slots, seed=seed + 1).run()
    resumed.close()
    sweep = read_sweep(folder)
    after = decisions(folder)
    assert after[: len(before)] == before
    assert all(trial.end_state is not None for trial in sweep.trials.values())
    assert len({(d["trial"], d["decision"]["rung"]) for d in after}) == len(after)  # one decision for each
    rule = SuccessiveHalving(RUNGS, 2)
    for event in after:  # the ledger's values give the ledger's decisions
        told, trial = event["decision"], sweep.trials[event["trial"]]
        arrival = Arrival(event["trial"], 0, "sigmoid", told["rung"], told["value"], protected=trial.baseline)
        again = rule.decide(arrival)
        assert (again.keep, again.cutoff, again.recorded) == (told["keep"], told["cutoff"], told["recorded"])
        if told["seeds"]:
            assert told["value"] == pytest.approx(np.mean(list(told["seeds"].values())))
    for configuration in configurations(sweep):
        stops = [d for d in configuration.decisions if not d.keep]
        ends = {trial.end_state for trial in configuration.trials}
        assert ends == ({EndState.STOPPED_EARLY} if stops else {EndState.COMPLETED})


def plan(sweep: SweepRecord) -> list[ConfirmRun]:
    best = max(configurations(sweep), key=lambda c: c.score)
    return [ConfirmRun(best, trial_config(params=best.config.loss_params, seed=seed)) for seed in (11, 12)]


def test_the_confirmation_runs_after_the_search_with_fresh_seeds_and_is_not_part_of_it(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=Replicas((1,)), plan=plan)
    Machine(session, ordered_by_beta, slots=3).run(reports=12)
    assert session.driver.more_may_come and not configurations(session.driver.sweep, role=CONFIRM)
    session.close()
    resumed = Session(tmp_path, replicas=Replicas((1,)), plan=plan)
    machine = Machine(resumed, ordered_by_beta, slots=1)
    machine.run()
    resumed.close()
    sweep = read_sweep(tmp_path)
    (confirmed,) = configurations(sweep, role=CONFIRM)
    assert [trial.seed for trial in confirmed.trials] == [11, 12]
    assert {trial.end_state for trial in confirmed.trials} == {EndState.COMPLETED}  # no rung stopped them
    assert machine.ordered[-2:] == [trial.trial_id for trial in confirmed.trials]
    assert len(configurations(sweep)) == len(POINTS) and not confirmed.decisions
    journal = "".join(path.read_text() for path in (tmp_path / "journal").glob("*.jsonl"))
    tags = [json.loads(line) for line in journal.splitlines() if '"role": "confirm"' in line]
    assert tags and f'"configuration": "{confirmed.key}"' in journal


def test_an_interrupted_confirmation_goes_on_where_it_was(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=Replicas((1,)), plan=plan)
    machine = Machine(session, ordered_by_beta, slots=1)
    while not configurations(session.driver.sweep, role=CONFIRM):
        machine.run(reports=1)
    machine.run(reports=2)
    session.close()
    resumed = Session(tmp_path, replicas=Replicas((1,)), plan=plan)
    Machine(resumed, ordered_by_beta, slots=1).run()
    resumed.close()
    (confirmed,) = configurations(read_sweep(tmp_path), role=CONFIRM)
    assert [trial.seed for trial in confirmed.trials] == [11, 12]
    assert {trial.end_state for trial in confirmed.trials} == {EndState.COMPLETED}

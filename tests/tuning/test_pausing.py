"""Rules that pause, in the driver without a cluster: who waits is called back or ends, also after a crash."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning.machine import LAST, MEMORY, RUNGS, STEPS, Machine, Session, decisions, made_report

from prefopt_ray.results.configurations import configurations
from prefopt_ray.results.curves import Curve
from prefopt_ray.results.ledger import Decision, read_sweep
from prefopt_ray.trial import EndState
from prefopt_ray.tuning.candidate_rungs import hyperband
from prefopt_ray.tuning.driver import Replicas
from prefopt_ray.tuning.replay import play
from prefopt_ray.tuning.rungs import Arrival, LockstepHalving, PromotionHalving, StopRule, SuccessiveHalving
from prefopt_ray.tuning.search import Point

POINTS = [Point("sigmoid", {"beta": n / 10, "learning_rate": 1e-3}, baseline=n == 1) for n in range(1, 9)]
ONE = Replicas((0,))


def rising(beta: float, seed: int, step: int) -> float:
    return beta / 2 + 0.01 * step


def test_a_paused_trial_leaves_its_slot_and_is_called_back_by_a_worse_one(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=ONE, rule=PromotionHalving(RUNGS, 2))
    baseline, early, late = (session.driver.next_order().trial_id for _ in range(3))
    assert not session.driver.take(early, made_report(0.5, 2, end=False))
    assert session.driver.sweep.trials[early].state == "waiting"
    assert not session.driver.take(late, made_report(0.1, 2, end=False))
    assert session.driver.next_order().trial_id == early
    assert session.driver.take(early, made_report(0.5, 2, end=False))  # it says its last report again, and goes on
    assert session.driver.take(baseline, made_report(0.0, 2, end=False))  # never paused
    session.close()
    resumed = read_sweep(tmp_path).trials
    assert not resumed[early].waiting and resumed[late].waiting
    assert [d.keep for d in resumed[early].decisions] == [False, True]


def test_those_that_were_never_called_back_end_with_the_reason_in_numbers(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=ONE, rule=PromotionHalving(RUNGS, 2))
    Machine(session, rising, slots=2).run()
    session.close()
    trials = list(read_sweep(tmp_path).trials.values())  # the better, the later they come
    assert trials[0].end_state == trials[3].end_state == EndState.COMPLETED
    stopped = [trial for trial in trials if trial.end_state == EndState.STOPPED_EARLY]
    assert stopped and not any(trial.waiting for trial in stopped)
    assert "behind the cutoff 0.1900 (4 there)" in stopped[0].reason
    assert len(session.proposer.told) == 4  # once each, though some were told when they paused


def test_a_rule_that_forgets_those_it_paused_leaves_none_of_them_waiting(tmp_path: Path) -> None:
    @dataclass
    class EverybodyPauses(StopRule):
        def decide(self, arrival: Arrival) -> Decision | None:
            return Decision(arrival.step, arrival.value, None, 1, keep=False, reason="as always", pause=True)

    session = Session(tmp_path, replicas=ONE, rule=EverybodyPauses(RUNGS))
    Machine(session, rising, slots=2).run()
    session.close()
    for trial in read_sweep(tmp_path).trials.values():
        assert trial.end_state == EndState.STOPPED_EARLY
        assert trial.reason == "step 1: as always, and was not called back"


RULES: dict[str, Callable[[], StopRule]] = {
    "stopping": lambda: SuccessiveHalving(RUNGS, 2),
    "promotion": lambda: PromotionHalving(RUNGS, 2),
    "lockstep": lambda: LockstepHalving(RUNGS, 2),
    "hyperband": lambda: hyperband(RUNGS, 2),
}


@settings(max_examples=30, deadline=None)
@given(rule=st.sampled_from(sorted(RULES)), seed=st.integers(0, 10_000))
def test_a_replay_does_what_the_driver_does(rule: str, seed: int) -> None:
    gains = np.maximum.accumulate(np.random.default_rng(seed).random((len(POINTS), len(STEPS))), axis=1)

    def gain(beta: float, of_seed: int, step: int) -> float:
        return float(gains[round(beta * 10) - 1, STEPS.index(step)])

    with TemporaryDirectory(dir=MEMORY) as folder:
        session = Session(Path(folder), replicas=ONE, rule=RULES[rule](), points=POINTS)
        Machine(session, gain, slots=1).run()
        session.close()
        driven = {t.trial_id: len(t.reports) for t in read_sweep(Path(folder)).trials.values()}
    curves = [
        Curve(f"{n:04d}", "sigmoid", STEPS, tuple(map(float, row)), baseline=n == 0) for n, row in enumerate(gains)
    ]
    assert play(curves, RULES[rule](), slots=1, within_loss=True).evaluations == driven


@settings(max_examples=20, deadline=None)
@given(halving=st.sampled_from([PromotionHalving, LockstepHalving]), seed=st.integers(0, 10_000),
       slots=st.integers(1, 5), start=st.sampled_from([0, 2, 4]), cut=st.integers(1, 40), lost=st.integers(0, 4))
def test_whatever_the_order_and_the_crash_the_best_of_every_rung_go_on_and_all_end(
    halving: type[PromotionHalving], seed: int, slots: int, start: int, cut: int, lost: int
) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.1, size=(9, 3))
    replicas = Replicas((1, 2), from_step=start)

    def gain(beta: float, of_seed: int, step: int) -> float:
        return 0.5 + float(noise[round(beta * 10), of_seed]) + 0.001 * step

    with TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        session = Session(folder, replicas=replicas, rule=halving(RUNGS, 3), points=POINTS)
        Machine(session, gain, slots=slots, seed=seed).run(reports=cut)
        session.close()  # as if killed, before its last lines were written
        path = folder / "ledger.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: max(1, len(lines) - lost)]))
        before = decisions(folder)
        resumed = Session(folder, replicas=replicas, rule=halving(RUNGS, 3), points=POINTS)
        Machine(resumed, gain, slots=slots, seed=seed + 1).run()
        resumed.close()
        assert decisions(folder)[: len(before)] == before
        check_rungs(folder)


def check_rungs(folder: Path) -> None:
    """By the ledger alone: every configuration ended as decided, and at each rung the best third went on."""
    sweep = read_sweep(folder)
    for configuration in configurations(sweep):
        last = configuration.decisions[-1]
        assert not last.pause, "nobody waits for ever"
        ends = {trial.end_state for trial in configuration.trials}
        assert ends == ({EndState.COMPLETED} if last.keep else {EndState.STOPPED_EARLY})
        assert all(trial.last.step == (LAST if last.keep else last.rung) for trial in configuration.trials)
    for rung in RUNGS:
        there = [(c.decision(rung), c) for c in configurations(sweep) if c.decision(rung) is not None]
        best = sorted(there, key=lambda pair: -pair[0].value)[: len(there) // 3]
        assert all(decision.keep for decision, _ in best)


def test_a_sweep_resumed_while_all_wait_goes_on(tmp_path: Path) -> None:
    session = Session(tmp_path, replicas=ONE, rule=LockstepHalving(RUNGS, 2))
    others = [session.driver.next_order() for _ in range(4)][1:]
    for order in others:
        at_rung = made_report(rising(order.config.loss_params["beta"], 0, 2), 2, end=False)
        assert not session.driver.take(order.trial_id, at_rung)
    session.driver.paused(others[0].trial_id)  # Ctrl-C finds it between two orders
    session.close()
    resumed = Session(tmp_path, replicas=ONE, rule=LockstepHalving(RUNGS, 2))
    machine = Machine(resumed, rising, slots=1)
    machine.run()
    resumed.close()
    assert machine.ordered[0] == "0000"  # it alone was running
    states = [trial.end_state for trial in read_sweep(tmp_path).trials.values()]
    assert states == [EndState.COMPLETED, EndState.STOPPED_EARLY, EndState.STOPPED_EARLY, EndState.COMPLETED]

"""The driver without a cluster: what it writes down, what it decides, and that a replay decides the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_folder import VERDICT, report
from tiny import trial_config

from prefopt_ray.results.configurations import configurations
from prefopt_ray.results.ledger import Decision, Ledger, SweepRecord, TrialRecord, read_events, read_sweep
from prefopt_ray.tracking.delivery import TrackingSettings
from prefopt_ray.tracking.runs import SweepIdentity, SweepTracker
from prefopt_ray.trial import EndState, Report
from prefopt_ray.tuning.driver import ConfirmRun, Replicas, SweepDriver, stop_reason
from prefopt_ray.tuning.rungs import SuccessiveHalving
from prefopt_ray.tuning.search import Listed, Point

POINTS = [Point("sigmoid", {"beta": beta, "learning_rate": 1e-3}, baseline=beta == 0.1) for beta in (0.1, 0.2, 0.3)]


class Session:
    """A driver over a sweep folder, as one run or one resume has it. The tracker's server is never reached."""

    def __init__(
        self, folder: Path, *, replicas: Replicas = Replicas((0,)), rungs: tuple[int, ...] = (2,),
        plan: Callable[[SweepRecord], list[ConfirmRun]] | None = None,
    ) -> None:
        path = folder / "ledger.jsonl"
        new = not path.exists()
        self.ledger = Ledger(path)
        if new:
            self.ledger.append("sweep", format=1, sweep_id="cafe", name="made", spec_hash="0", facts={})
        sweep = SweepRecord(folder) if new else read_sweep(folder)
        settings = TrackingSettings("http://127.0.0.1:9", "made")  # the journal keeps everything meanwhile
        self.tracker = SweepTracker(settings, SweepIdentity("cafe", "made", folder), on_run_created=lambda *_: None)
        self.driver = SweepDriver(
            sweep, ledger=self.ledger, tracker=self.tracker, proposer=Listed(POINTS, done=len(configurations(sweep))),
            rule=SuccessiveHalving(rungs, 2), within_loss=True, stopping=lambda: False,
            make_config=lambda point, seed: trial_config(params={"beta": point.values["beta"]}, seed=seed),
            replicas=replicas, plan_confirmation=plan,
        )

    def close(self) -> None:
        self.ledger.close()
        self.tracker.close(0.1)


def at(step: int, gain: float, *, end: EndState | None = None) -> Report:
    made = report(gain, step=step)
    return Report(**{**vars(made), "end_state": end, "reason": "all steps" if end else "", "verdict": VERDICT})


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_events(folder / "ledger.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(("value", "cutoff", "said"), [
    (0.1, 0.5, "gain 0.1000 below the cutoff 0.5000"), (0.00101, 0.00104, "gain 0.00101 below the cutoff 0.00104"),
    (0.5, 0.5, "gain 0.5000 below the cutoff 0.5000"),
])
def test_a_reason_has_the_digits_that_tell_value_and_cutoff_apart(value: float, cutoff: float, said: str) -> None:
    trial = TrialRecord("0000", 0, {}, trial_config(), baseline=False)
    decision = Decision(2, value, cutoff, recorded=3, keep=False, reason="below the cutoff")
    assert stop_reason(decision, trial) == f"rung at step 2: {said} (3 there)"


def test_a_trial_below_the_cutoff_ends_with_the_reason_in_numbers(tmp_path: Path) -> None:
    session = Session(tmp_path)
    first, second = (session.driver.next_order().trial_id for _ in range(2))
    assert session.driver.take(first, at(2, 0.5))
    assert not session.driver.take(second, at(2, 0.1))
    session.close()
    trial = read_sweep(tmp_path).trials[second]
    assert trial.end_state == EndState.STOPPED_EARLY
    assert trial.reason == "rung at step 2: gain 0.1000 below the cutoff 0.5000 (2 there)"


def test_a_report_sent_again_changes_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path)
    name = session.driver.next_order().trial_id
    for _ in range(3):
        session.driver.take(name, at(2, 0.5))
    session.close()
    assert len(events(tmp_path, "report")) == len(events(tmp_path, "decision")) == 1


def test_a_trial_that_has_ended_takes_no_more_reports(tmp_path: Path) -> None:
    session = Session(tmp_path)
    name = session.driver.next_order().trial_id
    assert not session.driver.take(name, at(4, 0.5, end=EndState.COMPLETED))
    assert not session.driver.take(name, at(6, 0.9))
    session.driver.failed(name, "too late")
    session.close()
    assert read_sweep(tmp_path).trials[name].end_state == EndState.COMPLETED
    assert len(events(tmp_path, "end")) == 1


def test_a_resumed_driver_runs_unfinished_trials_first_and_then_the_rest(tmp_path: Path) -> None:
    session = Session(tmp_path)
    first, second = (session.driver.next_order().trial_id for _ in range(2))
    session.driver.take(first, at(4, 0.5, end=EndState.COMPLETED))
    session.driver.paused(second)
    session.close()
    resumed = Session(tmp_path)
    orders = [order.trial_id for order in iter(resumed.driver.next_order, None)]
    resumed.close()
    assert orders == [second, "0002"]
    assert [event["trial"] for event in events(tmp_path, "trial")] == ["0000", "0001", "0002"]


@pytest.mark.parametrize("lost", ["decision", "end"])
def test_a_driver_killed_between_two_lines_decides_the_same_again(tmp_path: Path, lost: str) -> None:
    session = Session(tmp_path)
    first, second = (session.driver.next_order().trial_id for _ in range(2))
    session.driver.take(first, at(2, 0.5))
    session.driver.take(second, at(2, 0.1))
    session.close()
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = next(i for i in reversed(range(len(lines))) if f'"event": "{lost}"' in lines[i])
    path.write_text("".join(lines[:kept]))
    resumed = Session(tmp_path)
    if lost == "decision":  # the trial is continued and sends its last report once more
        assert not resumed.driver.take(second, at(2, 0.1))
    resumed.close()
    trial = read_sweep(tmp_path).trials[second]
    assert trial.end_state == EndState.STOPPED_EARLY and "below the cutoff 0.5000 (2 there)" in trial.reason
    assert len(events(tmp_path, "decision")) == 2


def test_headline_values_say_nothing_that_was_not_measured(tmp_path: Path) -> None:
    session = Session(tmp_path)
    name = session.driver.next_order().trial_id
    session.driver.failed(name, "ValueError: no such layer")
    session.close()
    journal = (tmp_path / "journal").glob("*.jsonl")
    text = "".join(path.read_text() for path in journal)
    assert "ValueError: no such layer" in text and '"final_kl"' not in text and "NaN" not in text

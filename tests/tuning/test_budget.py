"""What a sweep has spent: by its ledger and by the clock."""

from dataclasses import replace
from pathlib import Path

import pytest
from sweep_folder import report, write_sweep
from tiny import trial_config

from prefopt_ray.results.ledger import SESSION, SweepRecord, TrialRecord
from prefopt_ray.spec.sections import BudgetSpec
from prefopt_ray.tuning import budget
from prefopt_ray.tuning.budget import Meter, sessions_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the meter reads."""
    now = [1000.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    return now


def running(gpus: float, *, seconds: float) -> SweepRecord:
    trial = TrialRecord("0000", 0, {}, trial_config(), baseline=True, placement={"device": "cuda", "gpus": gpus})
    trial.reports[4] = replace(report(0.1), seconds=seconds)
    return SweepRecord(Path(), trials={"0000": trial})


def test_hours_on_the_wall_are_those_of_all_sessions(clock: list[float]) -> None:
    meter = Meter(BudgetSpec(wall_clock="1h"), SweepRecord(Path()), earlier_s=3000)
    clock[0] += 599
    assert meter.used_up() == ""
    clock[0] += 1
    assert "1 hours on the wall" in meter.used_up()


def test_what_lies_between_sessions_is_not_spent() -> None:
    events = [("sweep", 0.0), (SESSION, 1.0), ("trial", 11.0), (SESSION, 500.0), ("end", 520.0)]
    assert sessions_s({"event": kind, "at": at} for kind, at in events) == 30.0
    assert sessions_s([]) == 0


def test_gpu_hours_count_what_each_trial_reserves_also_since_its_last_report(clock: list[float]) -> None:
    sweep = running(0.5, seconds=3600)  # half an hour
    meter = Meter(BudgetSpec(gpu_hours=0.75), sweep, earlier_s=0)
    assert meter.used_up() == ""
    clock[0] += 1790
    assert meter.used_up() == ""
    clock[0] += 20
    assert "0.75 GPU-hours" in meter.used_up()
    sweep.trials["0000"].paused = True  # then the clock does not run
    assert meter.used_up() == ""


def test_without_a_limit_nothing_is_ever_used_up(clock: list[float], tmp_path: Path) -> None:
    meter = Meter(BudgetSpec(), write_sweep(tmp_path, {"0000": 0.5}), earlier_s=1e9)
    clock[0] += 1e9
    assert meter.used_up() == ""

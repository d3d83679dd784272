"""Stop rules: successive halving against Ray Tune's own bracket, and what ours adds to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.tuning.rungs import Arrival, FixedStops, SuccessiveHalving


def arrival(number: int, step: int, value: float, *, group: str = "sigmoid", protected: bool = False) -> Arrival:
    return Arrival(f"{number:04d}", number, group, step, value, protected=protected)


@given(
    values=st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=20),
    keep_one_in=st.integers(2, 5),
)
def test_decisions_agree_with_rays_own_bracket(values: list[float], keep_one_in: int) -> None:
    from ray.tune.schedulers.async_hyperband import _Bracket
    from ray.tune.schedulers.trial_scheduler import TrialScheduler

    class Trial:  # what the bracket asks of a trial
        def __init__(self, trial_id: str) -> None:
            self.trial_id = trial_id

    bracket = _Bracket(min_t=10, max_t=30, reduction_factor=keep_one_in, s=0)
    ours = SuccessiveHalving((10,), keep_one_in)
    for number, value in enumerate(values):
        theirs = bracket.on_result(Trial(f"{number:04d}"), 10, value) == TrialScheduler.CONTINUE
        assert ours.decide(arrival(number, 10, value)).keep == theirs


def test_first_arrival_passes_unopposed_and_says_so() -> None:
    decision = SuccessiveHalving((10,), 3).decide(arrival(0, 10, -1.0))
    assert decision.keep and decision.cutoff is None and "unopposed" in decision.reason


def test_baseline_is_recorded_and_never_stopped() -> None:
    rule = SuccessiveHalving((10,), 2)
    rule.decide(arrival(0, 10, 0.5))
    assert rule.decide(arrival(1, 10, 0.1, protected=True)).keep
    # quantile(1/2) of [0.5, 0.1] is 0.3: the baseline counts as a competitor
    assert rule.decide(arrival(2, 10, 0.29)).cutoff == pytest.approx(0.3)


def test_groups_are_compared_apart() -> None:
    rule = SuccessiveHalving((10,), 2)
    rule.decide(arrival(0, 10, 0.9, group="sigmoid"))
    assert rule.decide(arrival(1, 10, 0.1, group="ipo_sum")).keep
    assert not rule.decide(arrival(2, 10, 0.1, group="sigmoid")).keep


def test_ties_survive() -> None:
    rule = SuccessiveHalving((10,), 4)
    assert all(rule.decide(arrival(number, 10, 0.2)).keep for number in range(6))


def test_steps_between_rungs_decide_nothing() -> None:
    assert SuccessiveHalving((10, 30), 3).decide(arrival(0, 20, 0.1)) is None


def test_replayed_values_give_the_same_cutoff_and_a_trial_never_meets_itself() -> None:
    live, replayed = SuccessiveHalving((10,), 3), SuccessiveHalving((10,), 3)
    for number, value in enumerate([0.1, 0.4, 0.2]):
        live.decide(arrival(number, 10, value))
        replayed.replay(arrival(number, 10, value))
    replayed.replay(arrival(2, 10, 0.2))  # a resumed trial sends its report again
    assert live.decide(arrival(9, 10, 0.25)) == replayed.decide(arrival(9, 10, 0.25))


def test_fixed_stops_end_a_trial_at_its_given_step() -> None:
    rule = FixedStops({1: 20})
    assert rule.decide(arrival(1, 10, 0.1)) is None
    assert not rule.decide(arrival(1, 20, 0.1)).keep
    assert rule.decide(arrival(2, 20, 0.1)) is None

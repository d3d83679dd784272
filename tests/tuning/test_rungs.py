"""Stop rules: successive halving against Ray Tune's own bracket, by hand, and what ours adds to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.results.ledger import Decision
from prefopt_ray.tuning.candidate_rungs import MedianStops, hyperband
from prefopt_ray.tuning.rungs import (
    Arrival,
    FixedStops,
    LockstepHalving,
    PromotionHalving,
    StopRule,
    SuccessiveHalving,
)


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
        decision = live.decide(arrival(number, 10, value))
        replayed.replay(arrival(number, 10, value), decision)
    replayed.replay(arrival(2, 10, 0.2), decision)  # a resumed trial sends its report again
    assert live.decide(arrival(9, 10, 0.25)) == replayed.decide(arrival(9, 10, 0.25))


def test_fixed_stops_end_a_trial_at_its_given_step() -> None:
    rule = FixedStops(steps={1: 20})
    assert rule.decide(arrival(1, 10, 0.1)) is None
    assert not rule.decide(arrival(1, 20, 0.1)).keep
    assert rule.decide(arrival(2, 20, 0.1)) is None


# -- rules that pause ------------------------------------------------------------------------------

VALUES = st.lists(st.integers(-1, 50).map(lambda n: n / 50), min_size=1, max_size=20)


def arrive(rule: StopRule, values: list[float], *, step: int = 10) -> list[Decision]:
    return [rule.decide(arrival(number, step, value)) for number, value in enumerate(values)]


def called_back(rule: StopRule) -> list[str]:
    """Everybody that the rule lets go on, until it says no more."""
    resolved = list(iter(rule.resolve, None))
    return [r.trial_id for r in resolved if r.decision.keep]


def fates(rule: StopRule) -> dict[str, bool]:
    """Who of the paused goes on, and who is stopped, until nobody waits."""
    found: dict[str, bool] = {}
    for _ in range(3):  # open the rung, see that it has no more, nothing
        rule.exhausted()
        found |= {resolved.trial_id: resolved.decision.keep for resolved in iter(rule.resolve, None)}
    return found


def test_whoever_is_not_among_the_best_pauses_and_is_called_back_when_it_is() -> None:
    rule = PromotionHalving((10,), 2)
    first, second = arrive(rule, [0.5, 0.1])
    assert first.pause and first.cutoff is None and second.pause and second.cutoff == 0.5
    resolved = rule.resolve()  # one place for two: the first one's, though nobody was there when it came
    assert resolved.trial_id == "0000" and resolved.decision.keep and resolved.decision.recorded == 2
    assert rule.resolve() is None
    assert rule.decide(arrival(2, 10, 0.4)).pause  # three there, one place, and it is taken
    assert rule.decide(arrival(3, 10, 0.0)).pause and called_back(rule) == ["0002"]  # the second of two places
    assert rule.decide(arrival(4, 10, 0.9)).keep  # among the best at once: it never leaves its process


@given(values=VALUES, keep_one_in=st.integers(2, 5), data=st.data())
def test_whatever_the_order_the_best_share_of_a_rung_goes_on(
    values: list[float], keep_one_in: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(values))))
    rule = PromotionHalving((10,), keep_one_in)
    gone = {f"{n:04d}" for n in order if rule.decide(arrival(n, 10, values[n])).keep}
    gone |= set(called_back(rule))
    best = sorted(range(len(values)), key=lambda n: (-values[n], n))[: len(values) // keep_one_in]
    assert {f"{n:04d}" for n in best} <= gone
    rule.exhausted()
    assert gone | set(called_back(rule)), "the best goes on, however few there were"


@given(values=VALUES, keep_one_in=st.integers(2, 5), data=st.data())
def test_in_lockstep_exactly_the_best_share_goes_on_and_only_when_all_are_there(
    values: list[float], keep_one_in: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(values))))
    rule = LockstepHalving((10,), keep_one_in)
    assert all(rule.decide(arrival(n, 10, values[n])).pause for n in order) and rule.resolve() is None
    rule.exhausted()
    best = sorted(range(len(values)), key=lambda n: (-values[n], n))[: max(1, len(values) // keep_one_in)]
    assert called_back(rule) == [f"{n:04d}" for n in best]


@pytest.mark.parametrize("halving", [PromotionHalving, LockstepHalving])
def test_those_that_no_place_is_left_for_are_stopped_and_the_reason_has_the_last_numbers(
    halving: type[PromotionHalving],
) -> None:
    rule = halving((10,), 2)
    kept = sum(decision.keep for decision in arrive(rule, [0.3, 0.5, 0.4, 0.1]))
    resolved = []
    for _ in range(2):  # before and after those that go on have come to their end
        rule.exhausted()
        resolved += iter(rule.resolve, None)
    assert kept + sum(r.decision.keep for r in resolved) == 2
    first, second = (r for r in resolved if not r.decision.keep)
    assert (first.trial_id, second.trial_id) == ("0000", "0003")
    assert first.decision == Decision(10, 0.3, 0.4, 4, keep=False, reason="behind the cutoff")


@pytest.mark.parametrize("halving", [PromotionHalving, LockstepHalving])
def test_the_baseline_takes_part_and_never_pauses(halving: type[PromotionHalving]) -> None:
    rule = halving((10, 20), 2)
    assert rule.decide(arrival(0, 10, 0.1, protected=True)).keep
    assert rule.decide(arrival(0, 20, 0.2, protected=True)).keep  # ahead of all others
    assert rule.decide(arrival(1, 10, 0.0)).pause
    rule.exhausted()
    first, second = rule.resolve(), rule.resolve()
    assert second is None if first is None else (first.trial_id, second) == ("0001", None)
    rule.exhausted()
    assert called_back(rule) == []  # the one place of two is the baseline's


def test_one_alone_at_a_rung_goes_on_in_the_end_and_is_marked_unopposed() -> None:
    rule = PromotionHalving((10,), 3)
    arrive(rule, [0.2])
    rule.exhausted()
    resolved = rule.resolve()
    assert resolved.decision.keep and resolved.decision.cutoff is None and "unopposed" in resolved.decision.reason


@pytest.mark.parametrize("halving", [PromotionHalving, LockstepHalving])
@given(values=VALUES, cut=st.integers(0, 20))
def test_a_rule_that_was_told_its_past_again_goes_on_as_if_nothing_had_been(
    halving: type[PromotionHalving], values: list[float], cut: int
) -> None:
    live, resumed = halving((10,), 3), halving((10,), 3)
    told = {n: [live.decide(arrival(n, 10, value))] for n, value in enumerate(values)}
    live.exhausted()
    for resolved in [live.resolve() for _ in range(cut)]:
        if resolved is not None:
            told[int(resolved.trial_id)].append(resolved.decision)
    for n in sorted(told, reverse=True):  # by configuration, not in the order of time
        for decision in told[n]:
            resumed.replay(arrival(n, 10, values[n]), decision)
    assert fates(resumed) == fates(live)


# -- rules that are only measured ------------------------------------------------------------------


def test_a_trial_below_the_median_of_the_others_means_is_stopped() -> None:
    rule = MedianStops((1, 2))
    for number, (early, late) in enumerate([(0.2, 0.4), (0.4, 0.4), (0.6, 0.8)]):
        rule.decide(arrival(number, 1, early))
        rule.decide(arrival(number, 2, late))
    rule.decide(arrival(3, 1, 0.1))
    decision = rule.decide(arrival(3, 2, 0.39))
    assert decision.cutoff == pytest.approx(0.4) and not decision.keep and not decision.pause  # of .3, .4, .7
    assert rule.decide(arrival(4, 2, 0.41)).keep


def test_a_median_of_too_few_stops_nobody() -> None:
    rule = MedianStops((1,))
    assert arrive(rule, [0.9, 0.9, 0.1], step=1) == [None, None, None]


def test_hyperband_has_the_bracket_sizes_of_its_paper() -> None:
    rule = hyperband((1, 3, 9, 27), 3)  # of 81: table 1 of the JMLR version, 18(185)
    assert list(rule.shares) == [81, 34, 15, 8, 5]
    assert [bracket.rungs for bracket in rule.brackets] == [(1, 3, 9, 27), (3, 9, 27), (9, 27), (27,), ()]
    whole = sum(rule.decide(arrival(number, 1, 0.0)) is None for number in range(143))
    assert whole == 34 + 15 + 8 + 5  # only the first bracket decides at step 1

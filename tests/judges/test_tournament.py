"""Win rates, ties and strengths from a judge's verdicts, against counting by hand."""

import math

import numpy as np
import pytest

from prefopt_ray.errors import JudgeError
from prefopt_ray.judges.base import Advance, Preferences, Prompt, Tally
from prefopt_ray.judges.functions import FunctionPreferences, FunctionScores
from prefopt_ray.judges.tournament import (
    REFERENCE_NAME,
    JudgedCompetitor,
    Tournament,
    agreeing_pairs,
    compare,
    play,
)
from prefopt_ray.train.scorers import Completion

PROMPTS = [Prompt(str(number)) for number in range(40)]


def said(values: list[float]) -> list[Completion]:
    """Completions whose text is their worth."""
    return [Completion(str(value), 1, finished=True) for value in values]


def worth(prompts: list[str], completions: list[Completion]) -> list[float]:
    return [float(completion.text) for completion in completions]


def chance(prompts: list[str], first: list[Completion], second: list[Completion]) -> list[float]:
    return [1 / (1 + math.exp(float(b.text) - float(a.text))) for a, b in zip(first, second, strict=True)]


SCORES = FunctionScores("worth", worth)
PREFERENCES = FunctionPreferences("chance", chance)


def samples() -> dict[str, list[Completion]]:
    """`better` beats the reference on 30 prompts, ties on 4, loses on 6; `even` wins and loses 18, ties on 4."""
    reference = np.zeros(40)
    better = np.array([1.0] * 30 + [0.0] * 4 + [-1.0] * 6)
    even = np.array([2.0] * 18 + [0.0] * 4 + [-2.0] * 18)
    return {"better": said(better.tolist()), REFERENCE_NAME: said(reference.tolist()), "even": said(even.tolist())}


def row_of(tournament: Tournament, competitor: str) -> JudgedCompetitor:
    (row,) = (row for row in tournament.competitors if row.competitor == competitor)
    return row


@pytest.mark.parametrize("judge", [SCORES, PREFERENCES])
def test_contests_are_counted_as_by_hand(judge: FunctionScores | FunctionPreferences) -> None:
    tournament = play(judge, PROMPTS, samples())
    counted = {(c.first, c.second): (c.wins, c.ties, c.losses, c.unjudged) for c in tournament.contests}
    assert counted[("better", REFERENCE_NAME)] == (30, 4, 6, 0)
    assert counted[("even", REFERENCE_NAME)] == (18, 4, 18, 0)
    # even's 2 beats better's 1 on the first 18; better's 1 beats its 0 and -2 on 12; 0 beats -2 on 4; -1 beats -2 on 6
    assert counted[("better", "even")] == (22, 0, 18, 0)
    assert tournament.flipped == 0


def test_the_win_rate_has_wilson_s_interval() -> None:
    row = row_of(play(SCORES, PROMPTS, samples()), "better")
    p, n, z = 32 / 40, 40, 1.959963984540054  # Newcombe 1998, method 3
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert row.win_rate == p and row.judged == n
    assert row.win_low == pytest.approx((middle - half) / (1 + z * z / n))
    assert row.win_high == pytest.approx((middle + half) / (1 + z * z / n))


def test_two_competitors_strength_is_the_log_odds_of_their_wins() -> None:
    given = samples()
    many = {name: given[name] * 50 for name in ("better", REFERENCE_NAME)}  # the weak prior vanishes
    row = row_of(play(SCORES, PROMPTS * 50, many), "better")
    assert row.strength == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)
    assert row.strength_low < row.strength < row.strength_high


def test_the_strongest_comes_first_and_the_reference_is_no_row() -> None:
    assert [row.competitor for row in play(SCORES, PROMPTS, samples()).competitors] == ["better", "even"]


def test_nobody_is_stronger_for_standing_first() -> None:
    given = samples()
    swapped = {name: given[name] for name in ("even", REFERENCE_NAME, "better")}
    one, other = play(SCORES, PROMPTS, given), play(SCORES, PROMPTS, swapped)
    for name in ("better", "even"):
        assert row_of(one, name).strength == pytest.approx(row_of(other, name).strength)


def test_a_winner_of_everything_has_a_finite_strength() -> None:
    tournament = play(SCORES, PROMPTS, {"a": said([1.0] * 40), REFERENCE_NAME: said([0.0] * 40)})
    (row,) = tournament.competitors
    assert row.win_rate == 1 and math.isfinite(row.strength)


def test_ties_alone_give_no_interval() -> None:
    """Also beside a third who wins: two whose answers are the same are never told apart."""
    same, other = said([0.0] * 40), said([1.0] * 30 + [-1.0] * 10)
    for given in ({"a": same, REFERENCE_NAME: same}, {"a": same, "b": other, REFERENCE_NAME: same}):
        row = row_of(play(SCORES, PROMPTS, given), "a")
        assert row.strength == pytest.approx(0, abs=1e-9) and row.strength_low is row.strength_high is None
    assert row_of(play(SCORES, PROMPTS, given), "b").strength_low > 0


def test_a_preference_that_follows_the_order_is_a_tie() -> None:
    biased = FunctionPreferences("biased", lambda prompts, first, second: [0.9] * len(prompts))
    outcomes = compare(biased, PROMPTS, [(said([1.0] * 40), said([0.0] * 40))])
    assert (outcomes.values == 0.5).all() and outcomes.flipped == 40


def test_a_verdict_in_one_order_and_a_tie_in_the_other_is_a_tie_that_did_not_flip() -> None:
    def hesitant(prompts: list[str], first: list[Completion], second: list[Completion]) -> list[float]:
        return [0.9 if a.text == "1.0" else 0.5 for a in first]

    outcomes = compare(FunctionPreferences("h", hesitant), PROMPTS, [(said([1.0] * 40), said([0.0] * 40))])
    assert (outcomes.values == 0.5).all() and outcomes.flipped == 0


def test_a_prompt_judged_in_one_order_only_has_no_verdict() -> None:
    tournament = play(_Stops(after=21), PROMPTS, {"a": said([1.0] * 40), REFERENCE_NAME: said([0.0] * 40)})
    (contest,) = tournament.contests
    assert (contest.wins, contest.unjudged) == (10, 30) and tournament.competitors[0].judged == 10


def test_without_any_verdict_the_reason_is_named() -> None:
    with pytest.raises(JudgeError, match="80 not_asked.*not one prompt has a verdict"):
        play(_Stops(after=0), PROMPTS, {"a": said([1.0] * 40), REFERENCE_NAME: said([0.0] * 40)})


def test_a_tournament_survives_json() -> None:
    tournament = play(SCORES, PROMPTS, samples())
    assert Tournament.from_dict(tournament.to_dict()) == tournament


def test_agreement_counts_the_pairs_that_both_orders_rank() -> None:
    assert agreeing_pairs([3, 2, 1], [30, 20, 10]) == (3, 3)
    assert agreeing_pairs([3, 2, 1], [10, 20, 30]) == (0, 3)
    assert agreeing_pairs([3, 2, 2], [1, 2, 3]) == (0, 2)  # the equal pair ranks nothing
    assert agreeing_pairs([1], [1]) == (0, 0)


class _Stops:
    """Prefers the higher worth, and answers the first questions only."""

    name = "stops"

    def __init__(self, *, after: int) -> None:
        self._after = after

    def prefer(
        self, prompts: list[Prompt], first: list[Completion], second: list[Completion], *, advance: Advance
    ) -> Preferences:
        shares = np.array(chance([], first, second))
        shares[self._after :] = np.nan
        return Preferences(shares, Tally(not_asked=len(shares) - self._after))

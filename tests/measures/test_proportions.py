"""Wilson intervals against published values and against the test that they invert."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.measures.proportions import wilson_interval

Z95 = 1.959963984540054


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_agrees_with_newcombe_1998_table_1(wins: int, n: int, low: float, high: float):
    assert wilson_interval(wins, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_each_end_is_a_chance_whose_score_test_just_rejects(half_wins_of_n: tuple[int, int]):
    wins, n = half_wins_of_n[0] / 2, half_wins_of_n[1]
    low, high = wilson_interval(wins, n)
    assert 0 <= low <= wins / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(wins / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(Z95, rel=1e-6)


@given(st.integers(0, 100), st.floats(0.5, 0.999))
def test_losses_have_the_mirrored_interval(wins: int, confidence: float):
    low, high = wilson_interval(wins, 100, confidence=confidence)
    assert wilson_interval(100 - wins, 100, confidence=confidence) == pytest.approx((1 - high, 1 - low))


def test_no_wins_and_only_wins_reach_the_exact_ends():
    n, z2 = 20, Z95**2
    assert wilson_interval(0, n) == (0.0, pytest.approx(z2 / (n + z2)))
    assert wilson_interval(n, n) == (pytest.approx(n / (n + z2)), 1.0)


def test_without_comparisons_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("wins", "n"), [(-0.5, 3), (4, 3), (1, 0), (math.nan, 3), (0, -1)])
def test_impossible_counts_are_refused(wins: float, n: int):
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson_interval(wins, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_impossible_confidence_is_refused(confidence: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 3, confidence=confidence)

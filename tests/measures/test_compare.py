"""Comparisons for the answer: hand-computed values, and simulated coverage of every interval and guarantee."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from prefopt_ray.measures.compare import (
    Difference,
    gain_difference,
    gain_interval,
    indistinguishable,
    losses_by_seed,
    paired_difference,
    pooled_spread,
    seeds_difference,
    seeds_interval,
)
from prefopt_ray.measures.gain import calibrated_gain


def prompts(*, count: int, rng: np.random.Generator) -> np.ndarray:
    """One to four pairs per prompt: the group of each pair."""
    return np.repeat(np.arange(count), rng.integers(1, 5, size=count))


def test_a_difference_is_the_mean_with_a_t_interval():
    difference = paired_difference(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0]), None)
    se = math.sqrt(((0 - 4 / 3) ** 2 + (1 - 4 / 3) ** 2 + (3 - 4 / 3) ** 2) / 2 / 3)
    assert difference.mean == pytest.approx(4 / 3) and difference.se == pytest.approx(se)
    assert difference.high == pytest.approx(4 / 3 + 4.30265 * se, rel=1e-5)  # t(2), two-sided 95 %
    assert difference.low + difference.high == pytest.approx(2 * difference.mean)
    assert (difference.n, difference.clusters) == (3, 3)


def test_a_paired_difference_sees_what_separate_intervals_cannot():
    rng = np.random.default_rng(0)
    hard = rng.normal(1.0, 0.5, size=400)
    difference = paired_difference(hard + 0.02 + rng.normal(0, 0.05, size=400), hard, None)
    assert difference.low > 0 and difference.se < 0.004


def test_one_prompt_says_nothing():
    difference = paired_difference(np.ones(3), np.zeros(3), np.zeros(3))
    assert (difference.low, difference.high) == (-math.inf, math.inf)
    interval = gain_interval(np.array([1.0, 2.0, -1.0]), np.zeros(3))
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_losses_over_other_pairs_are_refused():
    with pytest.raises(ValueError, match="same pairs"):
        paired_difference(np.ones(3), np.ones(1), None)


def test_margins_that_are_not_finite_have_nothing_to_compare():
    with pytest.raises(ValueError, match="finite"):
        gain_interval(np.array([1.0, math.nan]), None)


@pytest.mark.parametrize("count", [8, 60])
def test_a_clustered_interval_covers_the_true_difference_95_times_in_100(count: int):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        groups = prompts(count=count, rng=rng)
        of_prompt, of_pair = rng.normal(size=count)[groups], rng.normal(size=len(groups))
        difference = paired_difference(0.3 + of_prompt + of_pair, np.zeros(len(groups)), groups)
        covered += difference.low <= 0.3 <= difference.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_ignoring_clusters_would_not_cover():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(500):
        groups = prompts(count=60, rng=rng)
        difference = paired_difference(rng.normal(size=60)[groups], np.zeros(len(groups)), None)
        covered += difference.low <= 0 <= difference.high
    assert covered / 500 < 0.85


def draw_margins(*, effect: float, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit variance, half of it shared by the pairs of a prompt."""
    shared = rng.normal(size=groups.max() + 1)[groups]
    return effect + math.sqrt(0.5) * shared + math.sqrt(0.5) * rng.normal(size=len(groups))


def test_the_gain_interval_covers_the_gain_of_the_whole_population():
    rng = np.random.default_rng(3)
    truth = calibrated_gain(rng.normal(0.4, 1.0, size=1_000_000), None).gain
    covered = 0
    for _ in range(1000):
        groups = prompts(count=250, rng=rng)
        interval = gain_interval(draw_margins(effect=0.4, groups=groups, rng=rng), groups)
        covered += interval.low <= truth <= interval.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_the_interval_of_a_gain_difference_covers_although_each_is_calibrated_on_the_same_pairs():
    rng = np.random.default_rng(4)
    big = rng.normal(size=(2, 1_000_000))
    truth = calibrated_gain(0.5 + big[0], None).gain - calibrated_gain(0.4 + big[1], None).gain
    covered = 0
    for _ in range(1000):
        groups = prompts(count=250, rng=rng)
        first = draw_margins(effect=0.5, groups=groups, rng=rng)
        second = 0.4 + 0.8 * (first - 0.5) + 0.6 * rng.normal(size=len(groups))
        difference = gain_difference(first, second, groups)
        covered += difference.low <= truth <= difference.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_a_gain_difference_is_the_difference_of_the_gains():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.6, 1, size=300), rng.normal(0.2, 3, size=300)
    expected = calibrated_gain(a, None).gain - calibrated_gain(b, None).gain
    assert gain_difference(a, b, None).mean == pytest.approx(expected)
    assert gain_difference(a, 17 * a, None).mean == pytest.approx(0.0, abs=1e-9)


def compared(best: np.ndarray, others: dict[str, np.ndarray]) -> dict[str, Difference]:
    """One seed each, from margins."""
    return indistinguishable(losses_by_seed([best]), {name: losses_by_seed([h]) for name, h in others.items()}, None)


def test_a_clearly_worse_configuration_is_told_apart_and_a_twin_is_not():
    rng = np.random.default_rng(6)
    best = rng.normal(0.8, 1, size=1000)
    others = {"twin": best + rng.normal(0, 0.05, size=1000), "worse": 0.2 + rng.normal(size=1000), "same": best.copy()}
    kept = compared(best, others)
    assert set(kept) == {"twin", "same"}
    assert kept["same"].mean == 0.0 and kept["twin"].low <= 0
    assert compared(best, {}) == {}


def test_the_truly_best_stays_on_the_list_though_the_best_was_picked_on_the_same_pairs():
    rng = np.random.default_rng(7)
    lost, sweeps, configurations = 0, 300, 8
    for _ in range(sweeps):
        common = rng.normal(size=300)
        margins = {str(i): 0.4 + 0.7 * common + 0.7 * rng.normal(size=300) for i in range(configurations)}
        best = max(margins, key=lambda name: calibrated_gain(margins[name], None).gain)
        others = {name: margin for name, margin in margins.items() if name != best}
        kept = {best, *compared(margins[best], others)}
        lost += "0" not in kept  # all are equal, so any fixed one is a truly best one
    assert lost / sweeps <= 0.06


# ---- several seeds ----


def seed_margins(*, seeds: int, spread: float, hard: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """By seed: its own mean margin, the difficulty of the pairs, and what only the two have together."""
    return [0.5 + spread * rng.normal() + 0.7 * hard + 0.5 * rng.normal(size=len(hard)) for _ in range(seeds)]


def test_with_one_seed_the_difference_is_that_of_the_adapters():
    rng = np.random.default_rng(8)
    a, b = rng.normal(0.6, 1, size=300), rng.normal(0.2, 3, size=300)
    groups = np.repeat(np.arange(100), 3)
    with_seeds = seeds_difference(losses_by_seed([a]), losses_by_seed([b]), groups, spread=None)
    assert vars(with_seeds) == pytest.approx(vars(gain_difference(a, b, groups)))
    interval = seeds_interval(losses_by_seed([a]), groups, spread=None)
    assert vars(interval) == pytest.approx(vars(gain_interval(a, groups)))


def test_a_mean_over_seeds_has_both_errors_computed_by_hand():
    a = np.array([[0.5, 0.7, 0.6, 0.8], [0.3, 0.5, 0.8, 0.4]])
    b = np.array([[0.9, 0.8, 0.9, 0.8], [0.7, 0.8, 0.6, 0.9]])
    spread = pooled_spread([a, b])
    gains = [(1 - 0.65, 1 - 0.5), (1 - 0.85, 1 - 0.75)]
    squares = [sum((g - sum(pair) / 2) ** 2 for g in pair) for pair in gains]
    assert spread.variance == pytest.approx(sum(squares) / 2) and spread.degrees == 2
    per_pair = np.array([0.4, 0.2, 0.05, 0.25])  # mean over seeds of b minus that of a
    over_pairs = per_pair.std(ddof=1) / 2
    over_seeds = math.sqrt(max(squares[0], spread.variance) / 2 + max(squares[1], spread.variance) / 2)
    difference = seeds_difference(a, b, None, spread=spread)
    assert difference.mean == pytest.approx(per_pair.mean())
    assert difference.se == pytest.approx(math.hypot(over_pairs, over_seeds))
    half = math.hypot(3.182446 * over_pairs, 4.302653 * over_seeds)  # t(3) and t(2), two-sided 95 %
    assert difference.high - difference.mean == pytest.approx(half, rel=1e-6)
    chosen = seeds_difference(a, b, None, spread=spread, candidates=5)
    assert chosen.high - chosen.mean == pytest.approx(math.hypot(3.182446 * over_pairs, 9.924843 * over_seeds), rel=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.15])
def test_intervals_over_three_seeds_cover_the_configurations_own_gain_and_difference(spread: float):
    rng = np.random.default_rng(9)
    deviates = rng.normal(size=(40, 5000))
    truth = float(np.mean([
        calibrated_gain(0.5 + spread * quantile + math.sqrt(0.74) * drawn, None).gain
        for quantile, drawn in zip(NORMAL_QUANTILES, deviates, strict=True)
    ]))
    covered, difference_covered, runs = 0, 0, 250
    for _ in range(runs):
        hard = rng.normal(size=200)
        a, b = (losses_by_seed(seed_margins(seeds=3, spread=spread, hard=hard, rng=rng)) for _ in range(2))
        interval = seeds_interval(a, None, spread=pooled_spread([a]))
        covered += interval.low <= truth <= interval.high
        difference = seeds_difference(a, b, None, spread=pooled_spread([a, b]))
        difference_covered += difference.low <= 0 <= difference.high
    assert covered / runs >= 0.93 and difference_covered / runs >= 0.93


def test_errors_over_pairs_alone_would_not_cover_a_configuration():
    rng = np.random.default_rng(10)
    covered = 0
    for _ in range(150):
        hard = rng.normal(size=200)
        a, b = (losses_by_seed(seed_margins(seeds=3, spread=0.15, hard=hard, rng=rng)) for _ in range(2))
        difference = seeds_difference(a, b, None, spread=None)
        covered += difference.low <= 0 <= difference.high
    assert covered / 150 < 0.85


NORMAL_QUANTILES = [NormalDist().inv_cdf((i + 0.5) / 40) for i in range(40)]

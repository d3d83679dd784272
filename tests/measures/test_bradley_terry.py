"""Bradley-Terry fits against closed forms, another algorithm (Hunter 2004's MM), simulation and stored values."""

import math

import numpy as np
import pytest

from prefopt_ray.measures.bradley_terry import (
    Comparisons,
    NoFiniteStrengths,
    fit_strengths,
    gradient_path,
    negative_log_likelihood,
)

# Four players of which 0 never loses and 3 never wins: nothing bounds the gaps.
TEXTBOOK = Comparisons(("0", "1", "2", "3"), np.array([0, 2, 1]), np.array([1, 3, 3]), np.ones(3))


def of_counts(wins: np.ndarray) -> Comparisons:
    """wins[i, j] times i beat j, each its own comparison; halves are ties."""
    first, second = np.nonzero(wins)
    repeats = np.ceil(wins[first, second]).astype(int)
    scores = np.where(wins[first, second] % 1 == 0.5, 0.5, 1.0)
    names = tuple("abcdefgh"[: len(wins)])
    return Comparisons(names, np.repeat(first, repeats), np.repeat(second, repeats), np.repeat(scores, repeats))


def everyone_meets(scores: np.ndarray) -> Comparisons:
    """On each prompt the higher of two of scores (K, N) wins; clustered by prompt."""
    players, prompts = scores.shape
    met = [(i, j, n, float(scores[i, n] > scores[j, n]))
           for i in range(players) for j in range(i + 1, players) for n in range(prompts)]
    first, second, clusters, won = (np.array(column) for column in zip(*met, strict=True))
    return Comparisons(tuple("abcdefgh"[:players]), first, second, won, clusters)


def random_tournament(seed: int, players: int = 5, games: int = 120) -> Comparisons:
    rng = np.random.default_rng(seed)
    strengths = rng.normal(size=players)
    first, second = np.array([rng.choice(players, 2, replace=False) for _ in range(games)]).T
    wins = rng.random(games) < 1 / (1 + np.exp(strengths[second] - strengths[first]))
    ties = rng.random(games) < 0.15
    return Comparisons(tuple("abcdefgh"[:players]), first, second, np.where(ties, 0.5, wins.astype(float)))


def minorised(comparisons: Comparisons, rounds: int = 20_000) -> np.ndarray:
    """Hunter (2004), Eq. 3, on win counts; log strengths with sum 0."""
    count = len(comparisons.players)
    wins, games = np.zeros(count), np.zeros((count, count))
    for i, j, score in zip(comparisons.first, comparisons.second, comparisons.scores):
        wins[i] += score
        wins[j] += 1 - score
        games[i, j] += 1
        games[j, i] += 1
    p = np.ones(count)
    for _ in range(rounds):
        p = wins / (games / (p[:, None] + p[None, :])).sum(axis=1)
    return np.log(p) - np.log(p).mean()


@pytest.mark.parametrize(("wins", "losses", "ties"), [(7, 3, 0), (1, 1, 5), (30, 2, 3), (0, 1, 1)])
def test_two_players_have_the_logit_of_the_win_rate_and_its_error(wins: int, losses: int, ties: int):
    n, share = wins + losses + ties, (wins + ties / 2) / (wins + losses + ties)
    scores = np.repeat([1.0, 0.0, 0.5], [wins, losses, ties])
    fit = fit_strengths(Comparisons(("a", "b"), np.zeros(n, int), np.ones(n, int), scores), prior_variance=None)
    gap, low, high = fit.gap(0, 1)
    assert gap == pytest.approx(math.log(share / (1 - share)), abs=1e-9)
    assert high - gap == pytest.approx(1.959963984540054 / math.sqrt(n * share * (1 - share)), abs=1e-7)
    assert gap - low == pytest.approx(high - gap)


@pytest.mark.parametrize("seed", range(4))
def test_the_unregularised_fit_is_the_one_of_another_algorithm(seed: int):
    comparisons = random_tournament(seed)
    assert fit_strengths(comparisons, prior_variance=None).values == pytest.approx(minorised(comparisons), abs=1e-8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variance", [0.1, 4.0])
def test_no_other_strengths_have_a_higher_posterior(seed: int, variance: float):
    comparisons, rng = random_tournament(seed, games=20), np.random.default_rng(seed)
    best = fit_strengths(comparisons, prior_variance=variance).values

    def cost(values: np.ndarray) -> float:
        gaps = [values[i] - values[j] for i, j in zip(comparisons.first, comparisons.second)]
        told = sum(s * math.log1p(math.exp(-g)) + (1 - s) * math.log1p(math.exp(g))
                   for g, s in zip(gaps, comparisons.scores))  # fmt: skip
        return told + sum(v * v for v in values) / (2 * variance)

    for size in (1e-4, 1e-2, 1.0):
        assert all(cost(best + size * rng.normal(size=5)) > cost(best) for _ in range(20))


def test_with_a_prior_an_unbeaten_player_is_where_the_score_equation_says():
    n, variance = 12, 4.0
    fit = fit_strengths(Comparisons(("a", "b"), np.zeros(n, int), np.ones(n, int), np.ones(n)), prior_variance=variance)
    low, high = 0.0, 50.0  # r_a = -r_b = r solves n sigma(-2r) = r / variance
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if n / (1 + math.exp(2 * middle)) > middle / variance else (low, middle)
    assert fit.values == pytest.approx([low, -low], abs=1e-9)


def test_a_narrow_prior_pulls_everybody_to_the_mean():
    comparisons = random_tournament(1)
    spread = [np.ptp(fit_strengths(comparisons, prior_variance=v).values) for v in (1e-3, 0.1, 10.0, 1e6)]
    assert spread == sorted(spread) and spread[0] < 0.1
    free = fit_strengths(comparisons, prior_variance=None)
    assert fit_strengths(comparisons, prior_variance=1e9).values == pytest.approx(free.values, abs=1e-6)


def test_a_player_nobody_met_stays_at_the_mean_with_the_priors_width():
    played = of_counts(np.array([[0, 5, 0], [5, 0, 0], [0, 0, 0]]))
    fit = fit_strengths(played, prior_variance=4.0)
    assert fit.values == pytest.approx(np.zeros(3), abs=1e-12)
    width = [fit.interval(player)[1] for player in range(3)]
    assert width[2] == pytest.approx(1.959963984540054 * math.sqrt(4.0 * 2 / 3), abs=1e-9)
    assert width[0] < width[2]


def test_order_of_comparisons_and_names_of_sides_do_not_matter():
    comparisons = random_tournament(2)
    order = np.random.default_rng(0).permutation(len(comparisons.scores))
    turned = Comparisons(
        comparisons.players, comparisons.second[order], comparisons.first[order], 1 - comparisons.scores[order]
    )
    one, other = fit_strengths(comparisons), fit_strengths(turned)
    assert one.values == pytest.approx(other.values, abs=1e-9) and one.order == other.order
    assert one.covariance == pytest.approx(other.covariance, abs=1e-9)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 3], [0, 0]], "b never won against a"),
        ([[0, 1, 1], [1, 0, 1], [0, 0, 0]], "c never won against a, b"),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], "never met"),
        ([[0, 0], [0, 0]], "never met"),
    ],
)
def test_without_a_prior_a_fit_that_has_no_maximum_is_refused(wins: list, message: str):
    comparisons = of_counts(np.array(wins, dtype=float))
    with pytest.raises(NoFiniteStrengths, match=message):
        fit_strengths(comparisons, prior_variance=None)
    assert np.isfinite(fit_strengths(comparisons).values).all()


def test_one_tie_is_enough_to_connect():
    tied = of_counts(np.array([[0, 3, 0], [0, 0, 0.5], [0.5, 0, 0]]))
    assert np.isfinite(fit_strengths(tied, prior_variance=None).values).all()


@pytest.mark.parametrize("seed", range(30))
def test_a_maximum_is_reported_missing_exactly_when_some_direction_never_costs(seed: int):
    """Brute force over every split in two: is there a side that took nothing from the other?"""
    comparisons = random_tournament(seed, players=4, games=6)
    took = np.zeros((4, 4), dtype=bool)
    took[comparisons.first[comparisons.scores > 0], comparisons.second[comparisons.scores > 0]] = True
    took[comparisons.second[comparisons.scores < 1], comparisons.first[comparisons.scores < 1]] = True
    sides = [[i for i in range(4) if mask >> i & 1] for mask in range(1, 15)]
    missing = any(not took[np.ix_(side, [i for i in range(4) if i not in side])].any() for side in sides)
    try:
        fit_strengths(comparisons, prior_variance=None)
        assert not missing
    except NoFiniteStrengths:
        assert missing


def test_pairs_of_one_prompt_count_once():
    rng = np.random.default_rng(3)
    scores = (rng.random(60) < 0.7).astype(float)
    once = Comparisons(("a", "b"), np.zeros(60, int), np.ones(60, int), scores, np.arange(60))
    copied = Comparisons(
        ("a", "b"), np.zeros(240, int), np.ones(240, int), np.repeat(scores, 4), np.repeat(np.arange(60), 4)
    )
    widths = [np.ptp(fit_strengths(c, prior_variance=None).gap(0, 1)) for c in (once, copied)]
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)


def test_one_prompt_tells_nothing_about_other_prompts():
    both = Comparisons(("a", "b"), np.zeros(4, int), np.ones(4, int), np.array([1, 1, 0, 1.0]), np.zeros(4, int))
    assert fit_strengths(both).interval(0) == (-math.inf, math.inf)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Three players on 60 prompts whose difficulty is shared by the comparisons of a prompt: 400 draws."""
    truth, rng, covered = np.array([0.6, 0.0, -0.6]), np.random.default_rng(4), 0
    for _ in range(400):
        scores = truth[:, None] + rng.gumbel(size=(3, 60))  # the difference of two Gumbels is logistic
        gap, low, high = fit_strengths(everyone_meets(scores), prior_variance=None).gap(0, 2)
        covered += low <= 1.2 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_many_wins_stay_finite():
    lopsided = of_counts(np.array([[0, 100_000], [1, 0]]))
    gap, low, high = fit_strengths(lopsided, prior_variance=None).gap(0, 1)
    assert gap == pytest.approx(math.log(100_000), abs=1e-6) and low < gap < high


# Strengths by epoch of plain SGD at 0.1 from (1, 1, 1, 1), and the summed loss there.
TEXTBOOK_TABLE = {
    100: ([3.0387, 0.7166, 1.9914, -1.7466], 0.19880),
    1000: ([5.1948, 0.5494, 2.4090, -4.1532], 0.020002),
    10000: ([7.3981, 0.4521, 2.6808, -6.5311], 0.0019887),
}


def test_textbook_fit_grows_its_gaps_for_ever():
    path = list(gradient_path(TEXTBOOK, [1.0] * 4, learning_rate=0.1, epochs=10_000))
    for epoch, (strengths, loss) in TEXTBOOK_TABLE.items():
        assert path[epoch] == pytest.approx(strengths, abs=1e-3)
        assert path[epoch].sum() == pytest.approx(4.0, abs=1e-9)
        assert negative_log_likelihood(TEXTBOOK, path[epoch]) == pytest.approx(loss, abs=1e-5)
    gaps = {epoch: path[epoch][0] - path[epoch][1] for epoch in TEXTBOOK_TABLE}
    assert gaps[1000] - gaps[100] == pytest.approx(math.log(10), abs=0.03)
    assert gaps[10000] - gaps[1000] == pytest.approx(math.log(10), abs=0.03)
    # The direction it grows in separates with the largest margin for its length: (1, 0, 0, -1).
    direction = (path[10000] - path[1000]) / math.log(10)
    assert direction == pytest.approx([1, 0, 0, -1], abs=0.15)
    with pytest.raises(NoFiniteStrengths):
        fit_strengths(TEXTBOOK, prior_variance=None)


@pytest.mark.parametrize(("epochs", "learning_rate", "start"), [(37, 0.1, 1.0), (400, 0.02, 0.0), (5, 2.0, -3.0)])
def test_textbook_fit_agrees_with_a_loop_written_from_the_derivative(epochs: int, learning_rate: float, start: float):
    r = np.full(4, start)
    for _ in range(epochs):
        for winner, loser in ((0, 1), (2, 3), (1, 3)):
            slope = 1 - 1 / (1 + np.exp(-(r[winner] - r[loser])))
            r = r + learning_rate * slope * (np.eye(4)[winner] - np.eye(4)[loser])
    *_, last = gradient_path(TEXTBOOK, [start] * 4, learning_rate=learning_rate, epochs=epochs)
    assert last == pytest.approx(r, abs=1e-12)


def test_gradient_descent_ends_at_the_fit_where_there_is_one():
    comparisons = random_tournament(5, players=3, games=30)
    *_, last = gradient_path(comparisons, [0.0] * 3, learning_rate=0.002, epochs=4000)
    assert last == pytest.approx(fit_strengths(comparisons, prior_variance=None).values, abs=5e-3)


@pytest.mark.parametrize(
    ("first", "second", "scores", "message"),
    [([0], [0], [1.0], "itself"), ([0], [2], [1.0], "numbered"), ([0, 1], [1], [1.0], "one length"),
     ([0], [1], [1.5], "between 0 and 1"), ([0], [1], [math.nan], "between 0 and 1")],
)  # fmt: skip
def test_comparisons_that_make_no_sense_are_refused(first: list, second: list, scores: list, message: str):
    with pytest.raises(ValueError, match=message):
        Comparisons(("a", "b"), np.array(first), np.array(second), np.array(scores))


def test_a_prior_without_width_is_refused():
    with pytest.raises(ValueError, match="prior_variance"):
        fit_strengths(TEXTBOOK, prior_variance=0.0)

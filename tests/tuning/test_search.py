"""Which points are proposed, in which order, and that a resumed search goes on where it was."""

from itertools import islice

import pytest

from prefopt_ray.spec.space import Choices, Integer, LogUniform, Uniform
from prefopt_ray.tuning.search import Listed, Point, Proposer, Tpe, listed_points

SPACES = {
    "sigmoid": {"beta": Choices((0.1, 0.3)), "learning_rate": Choices((1e-4, 1e-3))},
    "ipo_sum": {"beta": LogUniform(1e-3, 1e-1), "learning_rate": LogUniform(1e-5, 1e-3)},
}
BASELINE = Point("sigmoid", {"beta": 0.1, "learning_rate": 1e-3}, baseline=True)


def drain(proposer: Proposer) -> list[Point]:
    return list(iter(proposer.propose, None))


def test_grid_has_every_point_once_with_the_baseline_first() -> None:
    points = listed_points({"sigmoid": SPACES["sigmoid"]}, method="grid", trials_per_loss=0, seed=0, baseline=BASELINE)
    assert points[0] == BASELINE
    assert len(points) == 4  # the baseline is one of the grid's points and runs once
    assert len({tuple(p.values.items()) for p in points}) == 4


def test_random_draws_depend_on_the_seed_alone_and_stay_inside() -> None:
    first, again = (
        listed_points(SPACES, method="random", trials_per_loss=20, seed=3, baseline=BASELINE) for _ in range(2)
    )
    other = listed_points(SPACES, method="random", trials_per_loss=20, seed=4, baseline=BASELINE)
    assert first == again != other
    for point in first:
        if point.loss == "ipo_sum":
            assert 1e-3 <= point.values["beta"] <= 1e-1
            assert 1e-5 <= point.values["learning_rate"] <= 1e-3


def test_log_uniform_draws_are_uniform_in_the_logarithm() -> None:
    space = {"x": {"beta": LogUniform(1e-4, 1.0), "k": Integer(1, 3), "u": Uniform(0, 1)}}
    points = listed_points(space, method="random", trials_per_loss=4000, seed=0, baseline=None)
    below = sum(p.values["beta"] < 1e-2 for p in points) / len(points)
    assert below == pytest.approx(0.5, abs=0.03)
    assert {p.values["k"] for p in points} == {1, 2, 3}


def test_order_is_shuffled_across_losses() -> None:
    points = listed_points(SPACES, method="random", trials_per_loss=10, seed=0, baseline=BASELINE)
    assert {p.loss for p in points[1:8]} == {"sigmoid", "ipo_sum"}


def test_a_list_resumed_after_n_proposals_gives_the_rest() -> None:
    points = listed_points(SPACES, method="random", trials_per_loss=5, seed=0, baseline=BASELINE)
    assert drain(Listed(points, done=4)) == points[4:]


def test_tpe_moves_towards_what_scored_well() -> None:
    space = {"sigmoid": {"beta": LogUniform(1e-3, 1.0), "learning_rate": Choices((1e-4,))}}
    tpe = Tpe(space, trials_per_loss=40, seed=0, baseline=BASELINE, earlier=[])
    betas = []
    for point in iter(tpe.propose, None):
        betas.append(point.values["beta"])
        tpe.tell(point, 1.0 - abs(point.values["beta"] - 0.02))
    late = sorted(betas[-15:])
    assert len(betas) == 41
    assert late[7] < 0.15  # median of the late proposals; a uniform draw's median of |beta - .02| is far larger


def test_tpe_learns_within_eight_trials() -> None:
    space = {"sigmoid": {"beta": LogUniform(1e-3, 1.0), "learning_rate": Choices((1e-4,))}}

    def proposals(best: float) -> list[float]:
        tpe = Tpe(space, trials_per_loss=8, seed=0, baseline=BASELINE, earlier=[])
        betas = []
        for point in iter(tpe.propose, None):
            betas.append(point.values["beta"])
            tpe.tell(point, -abs(point.values["beta"] - best))
        return betas[1:]

    low, high = proposals(0.001), proposals(1.0)
    assert low[:3] == high[:3]  # drawn before anything is known
    assert low[4:] != high[4:]


def test_a_resumed_tpe_knows_earlier_scores_and_repeats_nothing() -> None:
    space = {"sigmoid": {"beta": LogUniform(1e-3, 1.0), "learning_rate": Choices((1e-4,))}}
    first = Tpe(space, trials_per_loss=12, seed=0, baseline=BASELINE, earlier=[])
    earlier = list(islice(iter(first.propose, None), 6))
    resumed = Tpe(space, trials_per_loss=12, seed=0, baseline=BASELINE, earlier=earlier)
    for point in earlier:
        resumed.tell(point, 0.01)
    rest = drain(resumed)
    assert len(earlier) + len(rest) == 13
    assert not {p.values["beta"] for p in rest} & {p.values["beta"] for p in earlier}


def test_tpe_refuses_a_score_that_is_not_finite() -> None:
    tpe = Tpe(SPACES, trials_per_loss=2, seed=0, baseline=BASELINE, earlier=[])
    with pytest.raises(ValueError, match="finite"):
        tpe.tell(tpe.propose(), float("nan"))

"""Replicates and confirmation in a spec: what they mean in trials, and what is refused."""

from typing import Any

import pytest
from spec.spec_examples import example, plain_spec

from prefopt_ray.errors import SpecError
from prefopt_ray.spec import SweepSpec, confirmed_spec, dump_spec, one_point_spec, parse_spec

POINT = {"beta": 0.1, "learning_rate": 1e-5}
SEARCH = {"method": "grid", "losses": {"sigmoid": {"beta": [0.05, 0.1]}}, "shared": {"learning_rate": 1e-5}}


def refused(**sections: Any) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        example(**sections)
    return {problem.key: problem.rule for problem in caught.value.problems}


def test_a_spec_with_replicates_and_confirmation_survives_a_dump() -> None:
    spec = example(replicates={"seeds": [1, 2, 3], "from": "30%"}, confirm={"top": 2, "seeds": [11, 12]})
    assert parse_spec(dump_spec(spec)) == spec
    assert "seed: 0" not in dump_spec(spec).split("search:")[0]  # training.seed is not read and not written


def test_trials_are_configurations_times_seeds_and_those_of_the_confirmation() -> None:
    spec = example(replicates={"seeds": [1, 2, 3]}, confirm={"top": 2, "seeds": [11, 12]})
    assert (spec.configuration_count, spec.confirm_count, spec.trial_count) == (5, 6, 21)
    assert example(search=SEARCH, confirm={"top": 8, "seeds": [7]}).confirm_count == 3  # no more than there are


def test_the_first_seed_trains_first_and_the_point_where_others_start_is_evaluated() -> None:
    spec = example(replicates={"seeds": [5, 6], "from": "30%"})
    config = spec.trial_config("sigmoid", POINT, train_pairs=6400)
    assert config.seed == 5 and 30 in config.evaluation.steps and config.evaluation.keep == "all"
    assert spec.replicates_from(100) == 30
    assert example(replicates={"seeds": [5, 6]}).replicates_from(100) == 0
    assert example().trial_config("sigmoid", POINT, train_pairs=6400).evaluation.keep == "best"


@pytest.mark.parametrize(
    ("sections", "key", "said"),
    [
        ({"replicates": {"seeds": [1, 1, 2]}}, "replicates.seeds", "1 is there twice"),
        ({"replicates": {"seeds": [4]}}, "replicates.seeds", "one seed is no replicate"),
        ({"replicates": {"seeds": [1, 2], "from": 101}}, "replicates.from", "training ends at step 100"),
        ({"replicates": {"seeds": [1, 2], "from": "130%"}}, "replicates.from", "share"),
        ({"replicates": {"seeds": [1, 2], "decide": "max"}}, "replicates.decide", "mean"),
        ({"replicates": {}}, "replicates.seeds", "is required"),
        ({"confirm": {"seeds": [11, 11]}}, "confirm.seeds", "11 is there twice"),
        ({"confirm": {"seeds": [0, 11]}}, "confirm.seeds", "0 selected the finalists already (training.seed)"),
        ({"confirm": {"seeds": [2, 11]}, "replicates": {"seeds": [1, 2]}}, "confirm.seeds", "(replicates.seeds)"),
        ({"confirm": {"top": 0, "seeds": [11]}}, "confirm.top", "must be >= 1"),
        ({"confirm": {"seeds": []}}, "confirm.seeds", "list of seeds"),
        ({"replicates": {"seeds": [1, 2]}, "training": {"steps": 9, "seed": 3}}, "training.seed", "is not read"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_rule(sections: dict[str, Any], key: str, said: str) -> None:
    assert said in refused(**sections)[key]


def test_one_mistake_does_not_hide_another() -> None:
    assert set(refused(replicates={"seeds": [1, 1]}, confirm={"top": 0, "seeds": [11]})) == {
        "replicates.seeds", "confirm.top",
    }


@pytest.fixture
def sweep() -> SweepSpec:
    return SweepSpec.from_dict(plain_spec(
        training={"steps": 100, "warmup": "10%"}, search=SEARCH, replicates={"seeds": [1, 2]},
        confirm={"top": 1, "seeds": [11, 12]}, guards={"overfit": "stop"}, samples={"at": ["50%", "100%"]},
    ))


def test_the_best_point_is_one_trial_with_one_seed(sweep: SweepSpec) -> None:
    best = one_point_spec(sweep, "sigmoid", POINT, stop_step=50, total_steps=100)
    assert best.is_one_point and best.replicates is None and best.confirm is None and best.seeds == (1,)
    assert one_point_spec(best, "sigmoid", POINT, stop_step=50, total_steps=100) == best


def test_a_confirmation_run_is_from_scratch_to_its_length_with_the_schedule_over_it(sweep: SweepSpec) -> None:
    searched = sweep.trial_config("sigmoid", POINT, train_pairs=6400)
    spec = confirmed_spec(sweep, searched, length=50, seed=12)
    assert spec.is_one_point and parse_spec(dump_spec(spec)) == spec
    config = spec.trial_config("sigmoid", POINT, train_pairs=6400)
    training = config.training
    assert (training.total_steps, training.stop_step, training.schedule) == (50, 50, "linear")
    assert training.warmup_steps == searched.training.warmup_steps == 10
    assert config.seed == 12 and config.guards.overfit == "flag" and config.guards.diverged == "stop"
    assert config.evaluation.steps == tuple(step for step in searched.evaluation.steps if step <= 50)
    assert config.evaluation.sample_steps == (50,) and config.evaluation.keep == "best"


def test_a_confirmation_shorter_than_the_warmup_still_ends_it(sweep: SweepSpec) -> None:
    searched = sweep.trial_config("sigmoid", POINT, train_pairs=6400)
    config = confirmed_spec(sweep, searched, length=1, seed=11).trial_config("sigmoid", POINT, train_pairs=6400)
    assert (config.training.total_steps, config.training.warmup_steps) == (1, 0)

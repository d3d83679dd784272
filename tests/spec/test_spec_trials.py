"""From a spec to spaces, steps and trial configs."""

import math

import pytest
from spec.spec_examples import example, plain_spec

from prefopt_ray.errors import SpecError
from prefopt_ray.losses.cards import CARDS
from prefopt_ray.spec import Choices, LogUniform, SweepSpec, Uniform, dump_spec, one_point_spec, parse_spec
from prefopt_ray.trial import OptimizerConfig


def search(**keys):
    return example(search={"trials_per_loss": 4, "losses": {"sigmoid": {}}} | keys)


def grid(losses, **keys):
    return example(search={"method": "grid", "losses": losses} | keys)


POINT = {"beta": 0.1, "learning_rate": 1e-5}


# ---- spaces ----


def test_a_loss_line_wins_over_shared_and_shared_over_the_card():
    losses = {"sigmoid": {"beta": 0.2}, "ipo_sum": {"learning_rate": 1e-6}}
    spaces = search(losses=losses, shared={"learning_rate": [1e-5, 2e-5]}, trials_per_loss=1).loss_spaces()
    assert spaces["sigmoid"] == {"beta": Choices((0.2,)), "learning_rate": Choices((1e-5, 2e-5))}
    assert spaces["ipo_sum"] == {"beta": LogUniform(7e-4, 0.1), "learning_rate": Choices((1e-6,))}


def test_aliases_become_full_names_in_order():
    assert list(search(losses={"simpo": {}, "ipo": {}, "dpo": None}).loss_spaces()) == ["simpo", "ipo_mean", "sigmoid"]


def test_full_fine_tuning_learns_at_the_cards_full_rates():
    model = {"policy": "org/model", "adapter": {"kind": "none"}}
    assert example(model=model).loss_spaces()["sigmoid"]["learning_rate"] == LogUniform(3e-7, 3e-6)


def test_what_a_card_does_not_search_keeps_its_default():
    assert search(losses={"cdpo": {}}).loss_spaces()["cdpo"]["label_smoothing"] == Choices((0.1,))


def test_a_linear_range_of_a_card_stays_linear():
    assert search(losses={"simpo": {}}).loss_spaces()["simpo"]["gamma_ratio"] == Uniform(0.0, 1.0)


def test_shared_goes_only_to_the_losses_that_read_it():
    spaces = search(losses={"sigmoid": {}, "simpo": {}}, shared={"gamma_ratio": 0.3}).loss_spaces()
    assert "gamma_ratio" not in spaces["sigmoid"]
    assert spaces["simpo"]["gamma_ratio"] == Choices((0.3,))


@pytest.mark.parametrize("name", sorted(CARDS))
def test_every_loss_can_be_searched_by_its_card_alone(name):
    scored = {"train": {"source": "org/pairs"}, "columns": {"chosen_score": "c", "rejected_score": "r"}}
    for search in ({"trials_per_loss": 4, "losses": {name: {}}}, {"method": "grid", "losses": {name: {}}}):
        spec = example(search=search, data=scored)
        space = spec.loss_spaces()[name]
        assert list(space) == [*CARDS[name].param_names, "learning_rate"]


def test_under_a_grid_a_usual_range_is_both_ends_and_the_middle():
    space = grid({"sigmoid": {}}).loss_spaces()["sigmoid"]
    assert space["beta"] == Choices((3e-3, 0.039, 0.5))
    assert space["learning_rate"] == Choices((3e-6, 1.2e-5, 5e-5))


def test_a_grid_is_every_combination_in_order():
    spec = grid({"sigmoid": {"beta": [0.1, 0.2]}, "hinge": {"beta": 0.1}}, shared={"learning_rate": [1e-5, 2e-5]})
    assert spec.grid() == [
        ("sigmoid", {"beta": 0.1, "learning_rate": 1e-5}),
        ("sigmoid", {"beta": 0.1, "learning_rate": 2e-5}),
        ("sigmoid", {"beta": 0.2, "learning_rate": 1e-5}),
        ("sigmoid", {"beta": 0.2, "learning_rate": 2e-5}),
        ("hinge", {"beta": 0.1, "learning_rate": 1e-5}),
        ("hinge", {"beta": 0.1, "learning_rate": 2e-5}),
    ]


def test_the_baseline_counts_once_when_the_grid_holds_it():
    losses = {"sigmoid": {"beta": [0.1, 0.2], "learning_rate": 1e-5}}
    assert grid(losses, baseline={"loss": "dpo", **POINT}).trial_count == 2
    assert grid(losses, baseline={"loss": "dpo", "beta": 0.3}).trial_count == 3
    assert search(trials_per_loss=8, losses={"sigmoid": {}, "hinge": {}}).trial_count == 17


# ---- baseline ----


def test_an_omitted_baseline_is_dpo_at_the_geometric_middle_of_the_usual_rates():
    loss, values = example().baseline_values()
    assert (loss, values["beta"]) == ("sigmoid", 0.1)
    assert values["learning_rate"] == pytest.approx(math.sqrt(3e-6 * 5e-5), rel=0.03)
    full = example(model={"policy": "org/model", "adapter": {"kind": "none"}})
    assert full.baseline_values()[1]["learning_rate"] == pytest.approx(math.sqrt(3e-7 * 3e-6), rel=0.06)


def test_a_null_baseline_is_an_omitted_one():
    assert search(baseline=None).baseline_values() == search().baseline_values()


def test_an_infinite_rate_of_a_baseline_is_refused():
    with pytest.raises(SpecError, match=r"learning_rate of a baseline is one finite number"):
        search(baseline={"loss": "sigmoid", "learning_rate": math.inf})


# ---- steps ----


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 1}, 16),  # 1000 / 64 = 15.6: the last batch is not full
        ({"epochs": 0.1, "batch_pairs": 1}, 100),
        ({"epochs": 0.001}, 1),
        ({"pairs": 640}, 10),
        ({"pairs": 641}, 11),
        ({"epochs": 3, "batch_pairs": 3000}, 1),
    ],
)
def test_a_length_in_any_unit_becomes_steps(training, steps):
    assert example(training=training, scheduler={"kind": "none"}).total_steps(1000) == steps


@pytest.mark.parametrize(
    ("scheduler", "total", "rungs"),
    [
        ({}, 900, (100, 300)),
        ({"preset": "conservative"}, 320, (80, 160)),
        ({"preset": "standard"}, 320, (36, 107)),
        ({"preset": "aggressive"}, 320, (20, 80)),
        ({"first_rung": "10%", "keep_one_in": 3}, 320, (32, 96, 288)),
        ({"first_rung": 40}, 320, (40, 120)),
        ({}, 100, (11, 33)),  # not 99
        ({"first_rung": "1%"}, 10, (1, 3, 8)),
        ({"first_rung": "100%"}, 320, ()),
        ({"kind": "none"}, 320, ()),
        ({"kind": "fixed", "stop_steps": {"1": 8}}, 320, ()),
    ],
)
def test_rungs_grow_by_the_factor_below_the_end(scheduler, total, rungs):
    assert example(scheduler=scheduler, training={"epochs": 1}).rung_steps(total) == rungs


def test_a_stop_step_ends_the_rungs_and_leaves_the_schedule():
    spec = example(training={"steps": 320, "stop_step": 100, "warmup": "10%"})
    config = spec.trial_config("sigmoid", POINT, train_pairs=1000)
    assert spec.rung_steps(320) == (36,)
    assert (config.training.total_steps, config.training.stop_step, config.training.warmup_steps) == (320, 100, 32)
    assert config.evaluation.steps == (0, 3, 36, 80, 100)


def test_a_stop_step_beyond_an_epochs_schedule_is_refused_when_the_data_is_known():
    spec = example(training={"epochs": 1, "stop_step": 100})
    with pytest.raises(SpecError, match=r"training\.stop_step: got 100; the schedule of this data has only 16 steps"):
        spec.trial_config("sigmoid", POINT, train_pairs=1000)


def test_step_0_one_percent_rungs_and_the_end_are_always_evaluated():
    config = example(eval={"at": ["50%", 7]}, samples={"at": "never"}).trial_config("dpo", POINT, train_pairs=9)
    assert config.evaluation.steps == (0, 1, 7, 11, 33, 50, 100)
    assert config.evaluation.sample_steps == ()


def test_samples_at_rungs_include_the_end_and_are_evaluated():
    config = example(samples={"at": ["rungs", 5]}).trial_config("dpo", POINT, train_pairs=9)
    assert config.evaluation.sample_steps == (5, 11, 33, 100)
    assert set(config.evaluation.sample_steps) <= set(config.evaluation.steps)


def test_fixed_stop_steps_are_evaluated():
    spec = example(scheduler={"kind": "fixed", "stop_steps": [100, 17]}, eval={"at": 0}, samples={"at": "never"})
    assert spec.scheduler.stop_steps == {0: 100, 1: 17}
    assert spec.trial_config("dpo", POINT, train_pairs=9).evaluation.steps == (0, 1, 17, 100)


@pytest.mark.parametrize(("written", "pairs"), [({}, None), ({"micro_batch_pairs": "auto"}, None), ({"micro_batch_pairs": 3}, 3)])
def test_pairs_per_forward_are_the_engine_s_choice_unless_written(written, pairs):
    spec = example(training={"steps": 100} | written)
    assert spec.trial_config("dpo", POINT, train_pairs=9).training.micro_batch_pairs == pairs


def test_a_trial_config_carries_the_spec():
    spec = example(
        training={"steps": 100, "optimizer": {"kind": "sgd", "momentum": 0.5}, "seed": 3, "schedule": "cosine"},
        guards={"overfit": "stop"},
    )
    config = spec.trial_config("ipo", {"beta": 1, "learning_rate": 1}, train_pairs=9)
    assert (config.loss, dict(config.loss_params), config.learning_rate) == ("ipo_mean", {"beta": 1.0}, 1.0)
    assert config.training.optimizer == OptimizerConfig(kind="sgd", momentum=0.5)
    assert (config.seed, config.training.schedule, config.guards.overfit) == (3, "cosine", "stop")


def test_gold_tolerates_more_drift():
    gold = example(model={"policy": "gold"}, data={"train": {"source": "gold", "pairs": 10}})
    limits = [s.trial_config("dpo", POINT, train_pairs=9).guards.drift_limit_per_token for s in (gold, example())]
    assert limits == [0.5, 0.3]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"beta": 0.1}, "sigmoid takes beta, learning_rate"), (POINT | {"beta": -1}, "beta must be > 0")],
)
def test_a_point_of_another_loss_is_refused(values, message):
    with pytest.raises(SpecError, match=message):
        example().trial_config("sigmoid", values, train_pairs=9)


# ---- data parts ----


def test_a_part_without_a_source_reads_trains():
    train = {"source": "org/hh", "data_dir": ["a", "b"], "split": "train", "revision": "v1"}
    data = example(data={"train": train, "select": {"split": "test", "pairs": 5}, "columns": {"chosen": "good"}}).data
    select = data.part("select")
    assert (select.source, select.data_dir, select.split, select.revision) == ("org/hh", ("a", "b"), "test", "v1")
    assert select.pairs == 5
    assert select.columns == {"chosen": "good"}


def test_omitted_parts_are_carved_out_of_train():
    test = example().data.part("test")
    assert (test.from_, test.pairs) == ("train", 1000)


def test_omitted_gold_parts_are_gold_and_plain():
    data = example(model={"policy": "gold"}, data={"train": {"source": "gold", "pairs": 10}}).data
    assert (data.part("select").source, data.part("select").pairs, data.text_mode) == ("gold", 1000, "plain")


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"train": {"source": "p.jsonl", "split": "train"}}, "data.train.split"),
        ({"train": {"source": "p.jsonl"}, "select": {"split": "test"}}, "data.select.split"),
        ({"train": {"source": "org/p"}, "select": {"from": "train", "split": "test", "pairs": 2}}, "data.select.split"),
        ({"train": {"source": "org/p"}, "test": {"split": "train", "pairs": 2}}, "data.test"),
        ({"train": {"pairs": 3}}, "data.train"),
        ({"train": {"source": "org/p", "columns": {"choosen": "a"}}}, "data.train.columns.choosen"),
    ],
)
def test_a_part_that_cannot_be_read_as_written_is_refused(data, key):
    with pytest.raises(SpecError) as caught:
        example(data=data)
    assert [problem.key for problem in caught.value.problems] == [key]


# ---- resources ----


@pytest.mark.parametrize(
    ("resources", "with_gpus", "without"),
    [
        ({}, 1.0, 0.0),
        ({"trials_per_gpu": 4}, 0.25, 0.0),
        ({"gpus_per_trial": 0}, 0.0, 0.0),
        ({"gpus_per_trial": 0.5}, 0.5, 0.5),
        ({"gpus_per_trial": 1, "trials_per_gpu": 2}, 0.5, 0.5),
    ],
)
def test_a_trials_share_of_a_gpu(resources, with_gpus, without):
    spec = example(resources=resources)
    assert spec.resources.gpu_share(gpus_present=True) == with_gpus
    assert spec.resources.gpu_share(gpus_present=False) == without


# ---- one point ----


@pytest.fixture
def sweep() -> SweepSpec:
    return SweepSpec.from_dict(
        plain_spec(
            training={"epochs": 1, "schedule": "linear"},
            search={"trials_per_loss": 4, "losses": {"simpo": {}}, "shared": {"learning_rate": {"log": [1e-6, 1e-5]}}},
            scheduler={"first_rung": "10%"},
        )
    )


SIMPO = {"beta": 2.5, "gamma_ratio": 0.3, "learning_rate": 3e-6}


def test_the_best_point_is_a_sweep_of_one_trial(sweep):
    best = one_point_spec(sweep, "simpo", SIMPO, stop_step=30, total_steps=100)
    assert best.is_one_point and not sweep.is_one_point
    assert best.grid() == [("simpo", SIMPO)]
    assert best.baseline_values() == ("simpo", SIMPO)
    assert parse_spec(dump_spec(best)) == best


def test_the_best_point_trains_and_is_evaluated_as_in_its_sweep_up_to_its_stop(sweep):
    best = one_point_spec(sweep, "simpo", SIMPO, stop_step=30, total_steps=100)
    there = sweep.trial_config("simpo", SIMPO, train_pairs=6400)
    here = best.trial_config("simpo", SIMPO, train_pairs=6400)
    assert (here.training.total_steps, here.training.stop_step, there.training.stop_step) == (100, 30, 100)
    assert here.training.warmup_steps == there.training.warmup_steps
    assert here.evaluation.steps == tuple(step for step in there.evaluation.steps if step <= 30)
    assert here.evaluation.sample_steps == tuple(step for step in there.evaluation.sample_steps if step <= 30)


def test_the_best_point_of_a_best_point_is_itself(sweep):
    best = one_point_spec(sweep, "simpo", SIMPO, stop_step=30, total_steps=100)
    assert one_point_spec(best, "simpo", SIMPO, stop_step=30, total_steps=100) == best

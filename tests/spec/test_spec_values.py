"""What YAML's values mean, and that a dumped spec is the same spec."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spec.spec_examples import example, plain_spec

from prefopt_ray.errors import SpecError
from prefopt_ray.losses.cards import CARDS, find_card
from prefopt_ray.spec import Choices, Integer, LogUniform, SweepSpec, Uniform, dump_spec, parse_spec
from prefopt_ray.spec.yaml_source import Origin, read_value, to_text


def read(text: str, tmp_path):
    return read_value(text, Origin("text", tmp_path)).plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6), ("1E-3", 1e-3), ("+.5", 0.5), ("1.", 1.0), ("1e3", 1000.0), ("-1.5E+2", -150.0),
        ("012", 12), ("-3", -3), ("~", None), ("", None), ("True", True), ("FALSE", False),
        ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("3%", "3%"), ("e5", "e5"),
        ("1e", "1e"), ("'5e-6'", "5e-6"), ("-.inf", -math.inf), ("[1, 2e0]", [1, 2.0]), ("0x1f", "0x1f"),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(text, value, tmp_path):
    found = read(text, tmp_path)
    assert found == value
    assert type(found) is type(value)


scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=12)
printable = scalars.filter(lambda v: not isinstance(v, str) or v.isprintable())


@given(st.recursive(printable, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_what_is_dumped_is_read_back(value):
    assert read_value(to_text(value), Origin("text", Path.cwd())).plain() == value


@pytest.mark.parametrize(
    ("written", "domain"),
    [
        (0.1, Choices((0.1,))),
        ([0.1, 1], Choices((0.1, 1.0))),
        ({"log": [1e-3, 0.1]}, LogUniform(1e-3, 0.1)),
        ({"uniform": [0.01, 1]}, Uniform(0.01, 1.0)),
        ({"integer": [1, 8]}, Integer(1, 8)),
    ],
)
def test_a_domain_has_one_shape_per_kind(written, domain):
    spec = example(search={"trials_per_loss": 1, "losses": {"sigmoid": {"beta": written}}})
    assert spec.loss_spaces()["sigmoid"]["beta"] == domain


@pytest.mark.parametrize(
    "written", [[], [True], {"log": [1]}, {"log": 3}, {"normal": [0, 1]}, {"log": [1, 2], "uniform": [1, 2]}, True,
                {"integer": [0.5, 2]}, "small", {}, {"log": [1, math.inf]}, [[0.1]]]
)  # fmt: skip
def test_a_domain_of_another_shape_is_refused(written):
    with pytest.raises(SpecError, match=r"search\.losses\.sigmoid\.beta"):
        example(search={"trials_per_loss": 1, "losses": {"sigmoid": {"beta": written}}})


# ---- round trip ----

NAMES = (*CARDS, "sigmoid:js", "ipo_sum:alpha", "sigmoid+nll", "mpo")
SCORES = {"chosen_score": "c", "rejected_score": "r"}  # for the losses that learn from them


@st.composite
def domains(draw, low: float, high: float):
    a, b = sorted(draw(st.lists(st.floats(low, high), min_size=2, max_size=2, unique=True)))
    kind = draw(st.sampled_from(["number", "list", "log", "uniform"]))
    return {"number": a, "list": [b, a], "log": {"log": [a, b]}, "uniform": {"uniform": [a, b]}}[kind]


@st.composite
def losses(draw, *, grid: bool):
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    spaces = {}
    for name in chosen:
        space = {}
        for param in find_card(name).params:
            if draw(st.booleans()):
                low, high = max(param.usual.low, 1e-6), param.usual.high
                space[param.name] = [low, high] if grid else draw(domains(low, high))
        spaces[name] = space
    return spaces


def amounts():
    return st.integers(1, 90) | st.integers(1, 99).map("{}%".format)


@st.composite
def specs(draw):
    grid = draw(st.booleans())
    search = {"losses": draw(losses(grid=grid)), "method": "grid"}
    if not grid:
        search |= {"method": draw(st.sampled_from(["random", "tpe"])), "trials_per_loss": 1}
    if draw(st.booleans()):
        search["baseline"] = {"loss": "ipo_sum", "beta": draw(st.floats(1e-4, 1))}
    scheduler = draw(
        st.sampled_from([{}, {"kind": "none"}, {"preset": "aggressive"}, {"kind": "fixed", "stop_steps": [100, 10]}])
        | st.builds(lambda r, k: {"first_rung": r, "keep_one_in": k}, amounts(), st.integers(2, 5))
    )
    text = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
    local = text.map(lambda name: name.replace(".", "").replace("~", "").replace("/", "") or "x")
    return plain_spec(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        model={
            "policy": "org/" + draw(local),
            "reference": draw(st.sampled_from(["start", "base", {"model": "org/r"}])),
            "adapter": draw(st.sampled_from([{"kind": "none"}, {"rank": 3, "target": ["q_proj", "v_proj"]}, {}])),
        },
        data={
            "train": {"source": "org/pairs", "data_dir": draw(st.lists(local, min_size=1, max_size=2))},
            "select": draw(st.sampled_from([{"split": "test"}, {"from": "train", "pairs": 3}])),
            "columns": draw(st.dictionaries(st.sampled_from(["prompt", "chosen"]), text)) | SCORES,
        },
        training=draw(st.sampled_from([{"steps": 100}, {"epochs": 0.3}, {"pairs": 9_000, "stop_step": 3}]))
        | {"warmup": draw(amounts()), "optimizer": draw(st.sampled_from([{"kind": "sgd", "momentum": 0.5}, {}]))},
        search=search,
        scheduler=scheduler,
        samples={"at": draw(st.sampled_from(["never", "rungs", ["rungs", 3]]))},
        resources={"gpus_per_trial": draw(st.sampled_from(["auto", 0, 0.25, 1]))},
    )


@settings(max_examples=60, deadline=None)
@given(specs())
def test_a_dumped_spec_loads_to_an_equal_spec(plain):
    spec = SweepSpec.from_dict(plain)
    again = parse_spec(dump_spec(spec))
    assert again == spec
    assert again.content_hash() == spec.content_hash()
    assert again.loss_spaces() == spec.loss_spaces()
    loss, values = spec.baseline_values()
    configs = [s.trial_config(loss, values, train_pairs=20_000).digest() for s in (spec, again)]
    assert configs[0] == configs[1]


def test_the_dump_of_a_dump_is_the_same_text():
    text = dump_spec(example())
    assert dump_spec(parse_spec(text)) == text


# ---- content hash ----


def test_what_changes_no_number_does_not_change_the_hash():
    other = example(
        name="other", storage="/x", tracking={"mlflow": "https://m.example.org"}, resources={"cpus_per_trial": 2}
    )
    assert other.content_hash() == example().content_hash()


def test_saying_a_default_does_not_change_the_hash():
    said = example(
        training={"steps": 100, "batch_pairs": 64, "optimizer": {"kind": "adamw"}},
        data={"train": {"source": "org/pairs"}, "text": "template", "test": {"from": "train", "pairs": 1000}},
        search={
            "trials_per_loss": 4,
            "losses": {"dpo": {"beta": {"log": [3e-3, 0.5]}}},
            "baseline": {"loss": "sigmoid", "beta": 0.1, "learning_rate": 1.2e-5},
        },
    )
    assert said.content_hash() == example().content_hash()


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"steps": 101}},
        {"training": {"steps": 100, "seed": 1}},
        {"model": {"policy": "org/model", "revision": "abc"}},
        {"search": {"trials_per_loss": 4, "losses": {"sigmoid": {"beta": 0.1}}}},
        {"guards": {"overfit": "stop"}},
    ],
)
def test_what_changes_numbers_changes_the_hash(sections):
    assert example(**sections).content_hash() != example().content_hash()


@pytest.mark.parametrize(("written", "seconds"), [("20h", 72_000), ("90m", 5_400), ("45s", 45), ("1.5 h", 5_400)])
def test_a_wall_clock_has_a_unit(written, seconds):
    spec = parse_spec(plain_spec(budget={"wall_clock": written}))
    assert spec.budget.wall_clock == seconds and parse_spec(dump_spec(spec)) == spec
    assert spec.content_hash() == parse_spec(plain_spec()).content_hash()  # what may be spent changes no trial


@pytest.mark.parametrize("written", ["20", 20, "h", "0h", "-1h", "1d", "1e99h", "9" * 40 + "h", ["1h"]])
def test_a_wall_clock_without_one_is_refused(written):
    with pytest.raises(SpecError, match="write 20h, 90m or 45s"):
        parse_spec(plain_spec(budget={"wall_clock": written}))


def test_a_budget_of_trials_is_of_whole_configurations():
    search = {"trials_per_loss": 4, "losses": {"sigmoid": {}, "hinge": {}}}
    assert parse_spec(plain_spec(search=search)).trial_count == 9
    assert parse_spec(plain_spec(search=search, budget={"trials": 5})).trial_count == 5
    seeds = {"replicates": {"seeds": [1, 2]}, "budget": {"trials": 5}}
    assert parse_spec(plain_spec(search=search, **seeds)).trial_count == 4


@pytest.mark.parametrize("written", [["hf_abcDEF0123"], "a b", [3], {"HF_TOKEN": "x"}, ["A=B"]])
def test_a_secret_is_named_and_never_written(written):
    with pytest.raises(SpecError) as refused:
        parse_spec(plain_spec(secrets=written))
    (problem,) = refused.value.problems
    assert problem.key == "secrets" and "names of environment variables" in problem.rule
    assert "hf_abc" not in str(refused.value)


def test_names_of_secrets_survive_a_dump_and_change_no_trial():
    spec = parse_spec(plain_spec(secrets=["HF_TOKEN", "JUDGE_KEY", "HF_TOKEN"]))
    assert spec.secrets == ("HF_TOKEN", "JUDGE_KEY") and parse_spec(dump_spec(spec)) == spec
    assert spec.content_hash() == parse_spec(plain_spec()).content_hash()

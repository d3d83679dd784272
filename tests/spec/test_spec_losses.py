"""Losses by name in a spec: compositions, a person's own, those that need scores, and settings that nobody reads."""

from dataclasses import replace

import pytest
import torch
from spec.spec_examples import example, plain_spec

from prefopt_ray.errors import SpecError
from prefopt_ray.losses.cards import CARDS, LossCard, Param, Range
from prefopt_ray.losses.registry import register_loss, unregister_loss
from prefopt_ray.spec import Choices, LogUniform, SweepSpec, dump_spec, parse_spec

SCORES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}


def grid(losses: dict, **sections: object) -> SweepSpec:
    return example(**{"search": {"method": "grid", "losses": losses}} | sections)


def refusal(losses: dict, **sections: object) -> str:
    with pytest.raises(SpecError) as refused:
        grid(losses, **sections)
    return str(refused.value)


@pytest.fixture
def own_loss():
    card = LossCard(
        name="own", title="mine", formula="(u - 1)^4", source="here",
        params=(Param("beta", 0.1, Range(0.02, 0.5), "target"),
                Param("slack", 0.0, Range(0.0, 1.0, log=False), "room", lower=-1.0)),
        needs=frozenset({"reference"}), reward="sum", beta_unit="1 / nat", loss_at_start=lambda params: 1.0,
        learning_rate_lora=Range(1e-5, 1e-4), learning_rate_full=Range(1e-6, 1e-5), bradley_terry=False,
    )
    register_loss(card, lambda stats, params, state: (torch.zeros(len(stats)), state))
    yield card
    unregister_loss("own")


# ---- names ----


def test_yaml_reads_compositions_as_keys_in_both_styles():
    head = 'name: x\nmodel: {policy: org/m}\ndata: {train: {source: org/p}}\ntraining: {steps: 100}\n'
    block = parse_spec(head + "search:\n  method: grid\n  losses:\n    sigmoid:js: {beta: 0.1}\n    sigmoid+nll: {}\n")
    flow = parse_spec(head + "search: {method: grid, losses: {sigmoid:js: {beta: 0.1}, sigmoid+nll: {}}}\n")
    override = parse_spec(
        head + "search: {method: grid, losses: {hinge: {}}}\n",
        overrides=["search.losses={sigmoid:js: {}, sigmoid+nll: {}}", "search.losses.sigmoid:js.beta=0.1"],
    )
    assert block == flow == override
    assert list(block.loss_spaces()) == ["sigmoid:js", "sigmoid+nll"]


def test_a_composition_reads_its_parts_settings_and_its_weights():
    space = grid({"mpo": {"nll_weight": [0.1, 1], "beta": 0.1}}).loss_spaces()["sigmoid+bco+nll"]
    assert set(space) >= {"beta", "sigmoid_weight", "bco_weight", "nll_weight", "learning_rate"}
    weights = {name: space[f"{name}_weight"] for name in ("sigmoid", "bco", "nll")}
    assert weights == {"sigmoid": Choices((0.8,)), "bco": Choices((0.2,)), "nll": Choices((0.1, 1.0))}
    assert "divergence_alpha" in grid({"sigmoid:alpha": {}}).loss_spaces()["sigmoid:alpha"]


def test_an_alias_and_its_composition_are_one_loss():
    assert "rpo and sigmoid+nll are the same loss" in refusal({"sigmoid+nll": {}, "rpo": {}})


def test_compositions_survive_a_dump_and_make_trials():
    losses = {"sigmoid:js": {}, "rpo": {"nll_weight": {"log": [0.01, 1]}}}
    spec = example(search={"trials_per_loss": 4, "losses": losses,
                           "baseline": {"loss": "hinge:forward_kl", "beta": 0.2}})
    assert parse_spec(dump_spec(spec)) == spec
    assert spec.loss_spaces()["sigmoid+nll"]["nll_weight"] == LogUniform(0.01, 1.0)
    loss, values = spec.baseline_values()
    config = spec.trial_config(loss, values, train_pairs=1000)
    assert config.label.startswith("hinge:forward_kl beta=0.2 lr=")


@pytest.mark.parametrize(("written", "says"), [
    ("sigmoid:kl", "a divergence is one of forward_kl, js, alpha"),
    ("simpo:js", "a divergence is one of forward_kl, js, alpha, for one of sigmoid,"),
    ("sigmoid+dpo", "a mixture holds each loss once"),
    ("sigmoid+nlll", "did you mean sigmoid+nll?"),
    ("nll", "a part of mixtures only, such as sigmoid+nll"),
    ("dpo_", "did you mean dpo (= sigmoid)?"),
    ("IPO", "did you mean ipo (= ipo_mean)?"),
    ("no_such_thing_at_all", "docs/guides/your-own-loss.md"),
])
def test_a_name_that_is_no_loss_is_refused_with_a_reason_or_a_guess(written, says):
    assert says in refusal({written: {}})
    assert says in refusal({}, search={"method": "grid", "losses": {"sigmoid": {}}, "baseline": {"loss": written}})


# ---- settings ----


@pytest.mark.parametrize(("loss", "setting", "reads"), [
    ("sigmoid:js", "label_smoothing", "sigmoid:js does not read label_smoothing; it reads beta, learning_rate"),
    ("sigmoid+nll", "gamma_ratio", "it reads beta, sigmoid_weight, nll_weight, learning_rate"),
    ("sigmoid+nll", "weight", "it reads beta, sigmoid_weight, nll_weight, learning_rate"),
    ("orpo", "beta", "orpo does not read beta; it reads lambda"),
])
def test_a_setting_that_a_loss_does_not_read_is_refused_with_those_it_reads(loss, setting, reads):
    assert reads in refusal({loss: {setting: 0.1}})


@pytest.mark.parametrize("key", ["divergence", "f_divergence_type"])
@pytest.mark.parametrize(("written", "fix"), [
    ("js", "write the loss as sigmoid:js"),
    ("js_divergence", "write the loss as sigmoid:js"),
    ("forward_kl", "write the loss as sigmoid:forward_kl"),
    ("reverse_kl", "remove it: sigmoid alone has the reverse KL"),
    ("chi2", "write the loss as sigmoid:js"),
    (1.0, "write the loss as sigmoid:js"),
])
def test_a_divergence_is_a_part_of_the_name(key, written, fix):
    said = refusal({"sigmoid": {key: written}})
    assert f"search.losses.sigmoid.{key}" in said and fix in said
    baseline = {"method": "grid", "losses": {"sigmoid": {}}, "baseline": {"loss": "sigmoid", key: written}}
    assert fix in refusal({}, search=baseline)


# ---- scores ----


def test_a_loss_that_needs_scores_is_refused_without_their_columns():
    fix = "add data.columns: {chosen_score: score_chosen, rejected_score: score_rejected}"
    said = refusal({"sigmoid": {}, "rebel": {}})
    assert "search.losses.rebel: " in said and fix in said
    assert fix in refusal({}, search={"method": "grid", "losses": {"sigmoid": {}}, "baseline": {"loss": "rebel"}})
    assert fix in refusal({"rebel+nll": {}})
    for data in ({"train": {"source": "org/p"}, "columns": SCORES}, {"train": {"source": "org/p", "columns": SCORES}}):
        assert grid({"rebel": {}}, data=data).trial_count > 1


def test_gold_rows_bring_their_own_scores():
    gold = {part: {"source": "gold", "pairs": 100} for part in ("train", "select", "test")}
    assert "rebel" in grid({"rebel": {}}, model={"policy": "gold"}, data=gold).loss_spaces()


@pytest.mark.parametrize("given", sorted(SCORES))
def test_one_score_of_two_is_refused(given):
    (missing,) = set(SCORES) - {given}
    said = refusal({"sigmoid": {}}, data={"train": {"source": "org/p"}, "columns": {given: "s"}})
    assert f"data.columns.{given}" in said and f"both answers need a score: {missing} is missing" in said


# ---- what is fine ----


@pytest.mark.parametrize("reference", ["start", "base", {"model": "org/other"}])
@pytest.mark.parametrize("loss", ["simpo", "cpo", "aot", "kto", "beta_dpo", "bco", "sigmoid:js", "mpo"])
def test_reference_free_batch_and_stateful_losses_go_with_any_reference(loss, reference):
    """Drift is measured against the reference also where the loss does not read it."""
    model = {"policy": "org/model", "reference": reference}
    training = {"steps": 100, "batch_pairs": 64, "micro_batch_pairs": 4}
    assert grid({loss: {}}, model=model, training=training).trial_count > 1


# ---- one's own ----


def test_a_registered_loss_is_searched_alone_and_in_a_mixture(own_loss):
    spec = grid({"own": {}, "own+nll": {"nll_weight": 0.5}}, data={"train": {"source": "org/p"}})
    assert list(spec.loss_spaces()["own"]) == ["beta", "slack", "learning_rate"]
    assert spec.loss_spaces()["own+nll"]["nll_weight"] == Choices((0.5,))
    assert "own does not read gamma; it reads beta, slack, learning_rate" in refusal({"own": {"gamma": 1}})
    assert "slack must be > -1" in refusal({"own": {"slack": -1}})


def test_it_is_unknown_again_when_it_is_forgotten():
    card = replace(CARDS["sigmoid"], name="brief", aliases=())
    register_loss(card, lambda stats, params, state: (stats.h, state))
    assert SweepSpec.from_dict(plain_spec(search={"method": "grid", "losses": {"brief": {}}}))
    unregister_loss("brief")
    assert "unknown loss" in refusal({"brief": {}})

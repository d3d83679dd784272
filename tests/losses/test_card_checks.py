"""A card that would fail in the middle of a sweep is refused when it is registered, with everything that is wrong."""

import math
from dataclasses import replace

import pytest

from prefopt_ray.losses.card_checks import card_problems
from prefopt_ray.losses.cards import CARDS, Param, Range, find_card
from prefopt_ray.losses.registry import register_loss, registered_losses

CARD = replace(CARDS["sigmoid"], name="mine", aliases=())
BETA = CARD.params[0]
BROKEN = {
    "name": ({"name": "Mine"}, "the name 'Mine' must be lower-case"),
    "name that composes": ({"name": "mine+nll"}, "the name 'mine+nll'"),
    "unknown need": ({"needs": frozenset({"entropy"})}, "needs 'entropy'; what can be needed is reference, lengths"),
    "unknown reward": ({"reward": "margin"}, "reward 'margin' must be one of sum, per_token"),
    "unknown scope": ({"scope": "epoch"}, "scope 'epoch' must be one of pair, batch"),
    "parameter twice": ({"params": (BETA, BETA)}, "a parameter is listed twice: beta, beta"),
    "parameter with a space": ({"params": (replace(BETA, name="my beta"),)}, "'my beta' cannot be a parameter"),
    "learning rate as parameter": ({"params": (replace(BETA, name="learning_rate"),)}, "cannot be a parameter"),
    "default outside": ({"params": (replace(BETA, default=0.0),)}, "the default 0 of beta breaks its own rule"),
    "range outside": ({"params": (replace(BETA, upper=0.2),)}, "holds 0.5, which breaks its own rule: beta must"),
    "range of one value": ({"params": (replace(BETA, usual=Range(0.1, 0.1)),)}, "got 0.1 to 0.1"),
    "range without end": ({"params": (replace(BETA, usual=Range(0.1, math.inf)),)}, "got 0.1 to inf"),
    "logarithm of zero": ({"params": (Param("slack", 0.5, Range(0, 1), "", lower=-1),)}, "has no logarithm"),
    "no rate": ({"learning_rate_lora": Range(0, 1e-3, log=False)}, "learning_rate_lora must be above 0, got 0"),
    "start of another loss": ({"loss_at_start": lambda params: params["gamma"]}, "fails at the default parameters"),
    "start that is not finite": ({"loss_at_start": lambda params: math.nan}, "None says that it is measured"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_card_is_refused_with_its_rule(case):
    changes, says = BROKEN[case]
    with pytest.raises(ValueError) as refused:
        register_loss(replace(CARD, **changes), lambda stats, params, state: (stats.h, state))
    assert says in str(refused.value)
    assert "mine" not in {card.name for card, _ in registered_losses()}


def test_everything_that_is_wrong_is_said_at_once():
    assert len(card_problems(replace(CARD, reward="margin", scope="epoch", needs=frozenset({"x"})))) == 3


@pytest.mark.parametrize("name", CARDS)
def test_every_built_in_card_keeps_the_rules(name):
    assert card_problems(CARDS[name]) == []


@pytest.mark.parametrize("name", ["sigmoid:alpha", "rpo", "mpo", "ipo_sum:js+nll"])
def test_compositions_keep_all_rules_but_the_plain_name(name):
    assert card_problems(replace(find_card(name), name="composed")) == []

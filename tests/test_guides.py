"""The guides' tables say what the code does."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from prefopt_ray.engine.choose import FAMILIES
from prefopt_ray.losses.card_parts import EXPONENT_LIMIT
from prefopt_ray.losses.cards import CARDS, LossCard, find_card
from prefopt_ray.losses.compositions import ALIASES, DIVERGENCES, LINKABLE
from prefopt_ray.measures.metrics import COLLAPSE_NATS, COLLAPSE_NATS_PER_TOKEN
from prefopt_ray.measures.verdicts import Thresholds
from prefopt_ray.spec.model import GOLD_DRIFT_LIMIT
from prefopt_ray.trial import GuardConfig

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
LOSSES = (GUIDES / "losses.md").read_text()
VERDICTS = (GUIDES / "reading-a-verdict.md").read_text()
WIDELY_USED = ("What each one is", "Where to search")
EXPERIMENTAL = ("Experimental losses", "Where to search the experimental ones")


def test_the_served_families_are_those_that_are_tested() -> None:
    engines = (GUIDES / "engines.md").read_text()
    listed = engines.partition("Served flat, by `model_type`: ")[2].partition(". A family")[0]
    assert tuple(" ".join(listed.split()).split(", ")) == FAMILIES


def test_every_card_is_once_among_its_own_kind_the_widely_used_first() -> None:
    for experimental, sections in ((False, WIDELY_USED), (True, EXPERIMENTAL)):
        names = [card.name for card in CARDS.values() if card.experimental == experimental]
        for section in sections:
            assert list(_table(LOSSES, section)) == names
    assert LOSSES.index(f"## {WIDELY_USED[1]}") < LOSSES.index(f"## {EXPERIMENTAL[0]}")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_ranges_of_a_loss_are_its_card_s(card: LossCard) -> None:
    section = (EXPERIMENTAL if card.experimental else WIDELY_USED)[1]
    beta, default, lora, full, start = _table(LOSSES, section)[card.name]
    if "beta" in card.param_names:
        assert _range(beta) == (card.param("beta").usual.low, card.param("beta").usual.high)
        assert float(default) == card.param("beta").default
    else:
        assert (beta, default) == ("none", "-")
    assert _range(lora) == pytest.approx((card.learning_rate_lora.low, card.learning_rate_lora.high))
    assert _range(full) == (card.learning_rate_full.low, card.learning_rate_full.high)
    if card.loss_at_start is None:
        assert start == "measured"
    else:
        assert math.isclose(float(start), card.loss_at_start(card.defaults), abs_tol=1e-4)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_loss_is_listed_with_its_aliases(card: LossCard) -> None:
    line = next(line for line in LOSSES.splitlines() if line.startswith(f"| `{card.name}`"))
    assert [f"`{alias}`" in line for alias in card.aliases] == [True] * len(card.aliases)


def test_other_parameters_have_the_values_of_their_table() -> None:
    written = _table(LOSSES, "Besides beta")
    params = {f"{card.name}.{p.name}": p for card in CARDS.values() for p in card.params if p.name != "beta"}
    assert list(written) == list(params)
    for name, param in params.items():
        default, usual, searched, meaning = written[name]
        assert (float(default), *_range(usual)) == (param.default, param.usual.low, param.usual.high)
        assert (searched == "yes", meaning) == (param.searched, param.meaning)


def test_compositions_are_those_there_are() -> None:
    text = LOSSES.split("## Compositions\n")[1].split("\n## ")[0]
    tables = [[line for line in part.splitlines() if line.startswith("| `")] for part in text.split("**A mixture**")]
    assert [line.split("`")[1] for line in tables[0]] == list(DIVERGENCES)
    assert f"{', '.join(LINKABLE[:-1])} and {LINKABLE[-1]}" in " ".join(text.split())
    assert f"Exponents are held at {EXPONENT_LIMIT:g}" in text
    for line in tables[1]:
        alias, full = line.split("`")[1:4:2]
        card = find_card(alias)
        weights = [param.default for param in card.params if param.name.endswith("_weight")]
        assert full == card.name == ALIASES[alias] and [float(w) for w in line.split("|")[3].split(",")] == weights
    assert [line.split("`")[1] for line in tables[1]] == list(ALIASES)


def test_every_threshold_is_in_the_guide_with_its_value() -> None:
    written = {name: float(cells[0]) for name, cells in _table(VERDICTS, "Every number").items()}
    assert written == asdict(Thresholds())


def test_guards_collapse_and_drift_are_as_written() -> None:
    guards = GuardConfig()
    actions = {name: action for name, action in asdict(guards).items() if name != "drift_limit_per_token"}
    assert f"diverged: {guards.diverged}, overfit: {guards.overfit}, collapsed: {guards.collapsed}" in VERDICTS
    assert all(f"`{name}`" in VERDICTS for name in actions)
    assert [name for name, action in actions.items() if action == "stop"] == ["diverged"]
    assert f"ln 1000 = {COLLAPSE_NATS:.1f} nats" in VERDICTS and COLLAPSE_NATS_PER_TOKEN == 1
    assert f"{guards.drift_limit_per_token:g} nats per token ({GOLD_DRIFT_LIMIT:g} for" in " ".join(VERDICTS.split())


def _table(text: str, section: str) -> dict[str, list[str]]:
    """The section's only table: first cell's first code word -> the other cells."""
    body = text.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    return {cells[0].split("`")[1]: cells[1:] for cells in rows[2:]}


def _range(cell: str) -> tuple[float, float]:
    low, high = cell.split(" to ")
    return float(low), float(high)

"""The guides' tables say what the code does."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from prefopt_ray.losses.cards import CARDS, LossCard, Range
from prefopt_ray.measures.metrics import COLLAPSE_NATS, COLLAPSE_NATS_PER_TOKEN
from prefopt_ray.measures.verdicts import Thresholds
from prefopt_ray.spec.model import GOLD_DRIFT_LIMIT
from prefopt_ray.trial import GuardConfig

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
LOSSES = (GUIDES / "losses.md").read_text()
VERDICTS = (GUIDES / "reading-a-verdict.md").read_text()


def test_both_loss_tables_have_every_card_once() -> None:
    for section in ("What each one is", "Where to search"):
        assert list(_table(LOSSES, section)) == list(CARDS)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_ranges_of_a_loss_are_its_card_s(card: LossCard) -> None:
    beta, default, lora, full, start = _table(LOSSES, "Where to search")[card.name]
    assert _range(beta) == (card.param("beta").usual.low, card.param("beta").usual.high)
    assert float(default) == card.param("beta").default
    assert _range(lora) == (card.learning_rate_lora.low, card.learning_rate_lora.high)
    assert _range(full) == (card.learning_rate_full.low, card.learning_rate_full.high)
    assert start == "measured" if card.loss_at_start is None else math.isclose(
        float(start), card.loss_at_start({p.name: p.default for p in card.params}), abs_tol=1e-4
    )


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_loss_is_listed_with_its_aliases(card: LossCard) -> None:
    line = next(line for line in LOSSES.splitlines() if line.startswith(f"| `{card.name}`"))
    assert [f"`{alias}`" in line for alias in card.aliases] == [True] * len(card.aliases)


def test_other_parameters_have_the_values_the_text_gives() -> None:
    for name in ("cdpo", "robust"):
        smoothing = CARDS[name].param("label_smoothing")
        assert (smoothing.default, smoothing.usual, smoothing.upper) == (0.1, Range(0.05, 0.3, log=False), 0.5)
        assert not smoothing.searched
    ratio = CARDS["simpo"].param("gamma_ratio")
    assert (ratio.default, ratio.usual) == (0.5, Range(0.0, 1.0, log=False))


def test_every_threshold_is_in_the_guide_with_its_value() -> None:
    written = {name: float(cells[0]) for name, cells in _table(VERDICTS, "Every number").items()}
    assert written == asdict(Thresholds())


def test_guards_collapse_and_drift_are_as_written() -> None:
    guards = GuardConfig()
    assert f"diverged: {guards.diverged}, overfit: {guards.overfit}, collapsed: flag" in VERDICTS
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

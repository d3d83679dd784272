"""Losses that are not built in: registered here, offered by an installed package, or composed by name."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from pair_stats import random_stats

from prefopt_ray.losses import registry
from prefopt_ray.losses.cards import CARDS, LOSS_NAMES, LossCard, Range, closest_loss, every_card, find_card
from prefopt_ray.losses.formulas import LossState, loss_function
from prefopt_ray.losses.registry import LossPluginError, register_loss, registered_losses, unregister_loss
from prefopt_ray.losses.stats import PairStats


def square(stats: PairStats, params: dict[str, float], state: LossState) -> tuple[torch.Tensor, LossState]:
    return (params["beta"] * stats.h - 1) ** 2, state


MINE = replace(CARDS["sigmoid"], name="mine", title="mine", aliases=(), bradley_terry=False)


@pytest.fixture
def mine() -> Iterator[LossCard]:
    register_loss(MINE, square)
    yield MINE
    unregister_loss("mine")


def test_a_registered_loss_is_found_computed_and_suggested(mine: LossCard):
    stats = random_stats(pairs=4, seed=0)
    assert find_card("mine") is mine and loss_function("mine") is square
    assert closest_loss("mien") == "mine"
    assert registered_losses() == ((mine, square),)
    assert list(every_card()) == [*LOSS_NAMES, "mine"]
    losses, _ = loss_function("mine")(stats, {"beta": 0.1}, None)
    assert losses.tolist() == pytest.approx([(0.1 * h - 1) ** 2 for h in stats.h.tolist()])


def test_a_registered_loss_may_be_part_of_a_mixture(mine: LossCard):
    stats = random_stats(pairs=4, seed=0)
    card = find_card("mine+nll")
    assert card.param_names == ("beta", "mine_weight", "nll_weight")
    losses, _ = loss_function("mine+nll")(stats, {"beta": 0.1, "mine_weight": 2.0, "nll_weight": 3.0}, None)
    expected = 2 * square(stats, {"beta": 0.1}, None)[0] - 3 * stats.policy_chosen / stats.chosen_tokens
    torch.testing.assert_close(losses, expected)


def test_an_unregistered_loss_is_forgotten(mine: LossCard):
    register_loss(replace(MINE, name="other"), square)
    unregister_loss("other")
    with pytest.raises(KeyError):
        find_card("other")
    with pytest.raises(KeyError):
        unregister_loss("other")


def test_registering_again_replaces_as_a_notebook_cell_run_twice_does(mine: LossCard):
    def cube(stats: PairStats, params: dict[str, float], state: LossState) -> tuple[torch.Tensor, LossState]:
        return stats.h**3, state

    register_loss(replace(MINE, title="changed"), cube)
    assert find_card("mine").title == "changed" and loss_function("mine") is cube
    assert len(registered_losses()) == 1


@pytest.mark.parametrize("name", ["sigmoid", "dpo", "rpo", "nll"])
def test_a_name_that_is_built_in_is_refused(name: str):
    with pytest.raises(ValueError, match=f"there is a loss {name} already"):
        register_loss(replace(MINE, name=name), square)


@pytest.mark.parametrize("name", ["Mine", "my loss", "a+b", "a:js", "2nd", ""])
def test_a_name_that_could_not_be_written_in_a_spec_is_refused(name: str):
    with pytest.raises(ValueError, match="lower-case letters"):
        register_loss(replace(MINE, name=name), square)


def test_what_is_not_a_card_or_a_function_or_brings_aliases_is_refused():
    with pytest.raises(ValueError, match="LossCard"):
        register_loss("mine", square)
    with pytest.raises(ValueError, match="must be a function"):
        register_loss(MINE, 0.5)
    with pytest.raises(ValueError, match="has no aliases"):
        register_loss(replace(MINE, aliases=("yours",)), square)


# -- entry points ---------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Put a package on the path as pip would: its module, and metadata that names an entry point."""
    known = {card.name for card, _ in registered_losses()}

    def put(module: str, *, source: str, value: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nanything = {value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield put
    for card, _ in registered_losses():
        if card.name not in known:
            unregister_loss(card.name)


CARD_SOURCE = """
from dataclasses import replace
from prefopt_ray.losses.cards import CARDS
def formula(stats, params, state):
    return -stats.h, state
def card(name):
    return replace(CARDS["sigmoid"], name=name, aliases=())
"""


def test_an_installed_package_brings_one_loss_or_several(install):
    install("one_loss", source=CARD_SOURCE + "loss = (card('plugged'), formula)", value="one_loss:loss")
    several = "def losses():\n    return [(card('first'), formula), (card('second'), formula)]"
    install("two_losses", source=CARD_SOURCE + several, value="two_losses:losses")
    for name in ("plugged", "first", "second"):
        assert find_card(name).name == name
        assert loss_function(name)(random_stats(pairs=2, seed=0), {"beta": 1.0}, None)[0].shape == (2,)


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("broken_import", "import no_such_module", "No module named 'no_such_module'"),
        ("no_attribute", "", "no attribute 'loss'"),
        ("no_pair", "loss = 3", "TypeError"),
        ("taken_name", CARD_SOURCE + "loss = (CARDS['hinge'], formula)", "there is a loss hinge already"),
    ],
)
def test_a_broken_package_is_named_and_only_met_by_who_asks_for_an_unknown_loss(install, module, source, says):
    install(module, source=source, value=f"{module}:loss")
    assert find_card("sigmoid").name == "sigmoid"
    with pytest.raises(LossPluginError, match=f"anything = {module}:loss.*{says}"):
        find_card("unheard_of")


# -- compositions ---------------------------------------------------------------------------------------------


def test_a_composition_answers_to_its_full_name_however_it_is_written():
    assert find_card("rpo").name == find_card("dpo+nll").name == "sigmoid+nll"
    assert find_card("mpo").name == "sigmoid+bco+nll"
    assert find_card("ipo:js").name == "ipo_mean:js"
    assert find_card("dpo:alpha+nll").param_names == ("beta", "divergence_alpha", "sigmoid_weight", "nll_weight")


def test_a_mixtures_card_follows_from_its_parts():
    card = find_card("nll+kto+bco")
    assert (card.reward, card.scope, card.stateful, card.bounded_below) == ("sum", "batch", True, True)
    assert card.needs == {"reference", "mismatched", "lengths"}
    assert card.loss_at_start is None  # the likelihood at the start is the model's
    assert find_card("kto+bco").loss_at_start(find_card("kto+bco").defaults) == pytest.approx(1 + 2 * 0.6931472)
    assert not find_card("robust+nll").bounded_below
    assert find_card("simpo+sigmoid").reward == "policy_per_token"
    assert find_card("mpo").defaults["sigmoid_weight"] == 0.8 and find_card("rpo").defaults["nll_weight"] == 1.0


@pytest.mark.parametrize("name", list(map("+".join, permutations(("sigmoid", "bco", "nll")))))
def test_mpo_has_its_weights_in_any_order_and_the_beta_of_the_first_part_that_reads_one(name: str):
    card, mpo, stats = find_card(name), find_card("mpo"), random_stats(pairs=4, seed=0)
    weights = {"sigmoid_weight": 0.8, "bco_weight": 0.2, "nll_weight": 1.0}
    assert card.defaults.items() >= weights.items() and card.source == mpo.source
    assert card.defaults["beta"] == CARDS[next(part for part in name.split("+") if part != "nll")].defaults["beta"]
    losses, expected = (loss_function(each)(stats, mpo.defaults, None)[0] for each in (name, "mpo"))
    torch.testing.assert_close(losses, expected)


def test_a_mixture_says_where_its_parts_count_beta_in_different_units():
    said = "beta is shared by sigmoid and ipo_mean though its unit differs: sigmoid: 1 / nat of summed log-ratio; "
    assert said + "ipo_mean: 1 / (nat per token)." in find_card("sigmoid+nll+ipo").note
    for name in ("mpo", "sigmoid+orpo", "sigmoid_norm+ipo"):
        assert "differs" not in find_card(name).note
    assert find_card("orpo+sigmoid").beta_unit == CARDS["sigmoid"].beta_unit  # orpo itself has no beta


@pytest.mark.parametrize(
    ("name", "default"), [("cdpo+exo", 0.1), ("robust+exo", 0.1), ("exo+cdpo", 0.001), ("aot+exo", 0.001)]
)
def test_parts_that_share_a_parameter_keep_the_tightest_bounds(name: str, default: float):
    share = find_card(name).param("label_smoothing")
    assert share.rule == "label_smoothing must be > 0 and < 0.5" and share.default == default
    assert share.allows(share.usual.low) and share.allows(share.usual.high)
    assert find_card("cdpo+robust").param("label_smoothing").allows(0.0)


@pytest.fixture
def large_and_small_beta() -> Iterator[None]:
    for name, usual, lower, upper in (("large", Range(1.0, 4.0), 0.9, 5.0), ("small", Range(0.1, 0.5), 0.0, 0.9)):
        param = replace(MINE.params[0], default=usual.high, usual=usual, lower=lower, upper=upper)
        register_loss(replace(MINE, name=name, params=(param,)), square)
    yield
    unregister_loss("large")
    unregister_loss("small")


def test_parts_whose_bounds_exclude_each_other_are_refused(large_and_small_beta: None):
    with pytest.raises(KeyError, match="no part's usual beta keeps the bounds of all parts"):
        find_card("large+small")
    assert find_card("sigmoid+large").param("beta").rule == "beta must be > 0.9 and < 5"


def test_a_divergence_keeps_where_the_loss_starts():
    for divergence in ("forward_kl", "js", "alpha"):
        for name in ("sigmoid", "ipo_sum", "hinge", "discopop"):
            card, plain = find_card(f"{name}:{divergence}"), CARDS[name]
            assert card.loss_at_start(card.defaults) == plain.loss_at_start(plain.defaults)
            assert card.reward == plain.reward and not card.bradley_terry


@pytest.mark.parametrize(
    "name",
    ["nll", "nll+nll", "sigmoid+sigmoid", "sigmoid+sigmoid:js", "kto:js", "sigmoid:kl", "sigmoid:", "sigmoid+", "+",
     "sigmoid:js:js", "cpo+tdpo", "dpop+slic", "sigmoid+nope", "SIGMOID", "nll:js+sigmoid"],
)  # fmt: skip
def test_an_undefined_composition_is_an_unknown_name(name: str):
    with pytest.raises(KeyError):
        find_card(name)


@pytest.mark.parametrize(
    ("meant", "written"),
    [("sigmoid", "sigmiod"), ("sigmoid+nll", "sigmod+nl"), ("sigmoid:js", "sigmoid:jss"), ("ipo_sum", "iposum"),
     ("rpo", "rpoo"), ("dpo:forward_kl", "dpo:forwardkl")],
)  # fmt: skip
def test_a_misspelt_loss_is_guessed(meant: str, written: str):
    assert closest_loss(written) == meant


def test_nothing_like_a_loss_is_not_guessed():
    assert closest_loss("quicksort") is None and closest_loss("sigmoid+quicksort") is None

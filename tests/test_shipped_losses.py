"""A blueprint brings a person's own losses to the process that becomes its worker."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray.cloudpickle
import torch
from journeys.journey import spec_text, write_pairs
from tiny import save_chat_model

from prefopt_ray.losses.cards import CARDS, find_card
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.registry import register_loss, registered_losses, unregister_loss
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.prepare import WorkerBlueprint, open_worker
from prefopt_ray.spec import parse_spec

NAMES = ("swept", "mixed", "unused")


@pytest.fixture
def own_losses() -> Iterator[None]:
    for number, name in enumerate(NAMES, start=1):
        register(name, factor=number)
    yield
    for name in {card.name for card, _ in registered_losses()} & set(NAMES):
        unregister_loss(name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    save_chat_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=40)
    return folder


def register(name: str, *, factor: float) -> None:
    card = replace(CARDS["sigmoid"], name=name, aliases=())
    register_loss(card, lambda stats, params, state: (factor * stats.h, state))


def blueprint(home: Path) -> WorkerBlueprint:
    text = spec_text(
        home / "model", home / "pairs.jsonl", storage=str(home / "results"),
        search="{method: grid, losses: {swept: {beta: 0.1}, mixed+nll: {beta: 0.1}, hinge: {beta: 0.1}}}",
    )
    return open_worker(parse_spec(text))[1].blueprint


def factor_of(name: str) -> float:
    one, zero = torch.ones(1), torch.zeros(1)
    stats = PairStats(zero, one, zero, zero, zero, one, one)
    return loss_function(name)(stats, {"beta": 1.0}, None)[0].item()


@pytest.mark.usefixtures("own_losses")
def test_it_carries_the_losses_of_its_spec_and_no_others(home: Path) -> None:
    assert [card.name for card, _ in blueprint(home).losses] == ["swept", "mixed"]


@pytest.mark.usefixtures("own_losses")
def test_a_process_that_never_saw_them_knows_them_once_it_is_the_worker(home: Path) -> None:
    sent = ray.cloudpickle.dumps(blueprint(home))  # as Ray sends it: functions without a module go by value
    for name in NAMES:
        unregister_loss(name)
    with pytest.raises(KeyError):
        find_card("mixed+nll")
    pickle.loads(sent)()
    assert (factor_of("swept"), factor_of("mixed")) == (1, 2)
    assert find_card("mixed+nll").needs >= {"lengths"}


@pytest.mark.usefixtures("own_losses")
def test_a_worker_computes_its_own_sweep_s_loss_though_the_process_knew_another_of_that_name(home: Path) -> None:
    first = blueprint(home)
    unregister_loss("swept")
    register("swept", factor=7)
    second = blueprint(home)
    for sweep, factor in ((first, 1), (second, 7), (first, 1)):
        sweep()
        assert factor_of("swept") == factor

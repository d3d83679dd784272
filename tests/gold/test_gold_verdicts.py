"""Real trials of the gold language, each made to go wrong in one way, get the verdict of that way.

Seconds each: the whole embedded model is trained on 256 pairs, at rates from far too small to far too large.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.measures.proportions import wilson_interval
from prefopt_ray.pairs.tokens import PairTokens, Ragged
from prefopt_ray.prepare import Prepared, open_worker
from prefopt_ray.spec import SweepSpec
from prefopt_ray.train import Worker, make_worker, train
from prefopt_ray.trial import Report

Opened = tuple[Worker, Prepared]


@pytest.fixture(scope="module")
def gold(gold_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    storage = tmp_path_factory.mktemp("gold-verdicts")
    shutil.copytree(gold_base, storage / "cache" / "gold" / gold_base.name)
    return open_worker(SweepSpec.from_dict({
        "name": "verdicts",
        "model": {"policy": "gold", "adapter": {"kind": "none"}, "dtype": "float32"},
        "data": {
            "train": {"source": "gold", "pairs": 256}, "select": {"source": "gold", "pairs": 400},
            "test": {"source": "gold", "pairs": 16}, "max_tokens": 32,
        },
        "training": {"steps": 100, "batch_pairs": 32, "warmup": "0%"},
        "search": {"method": "grid", "losses": {"sigmoid": {"beta": 0.1}}, "shared": {"learning_rate": 1e-3}},
        "eval": {"train_probe": 256},
        "samples": {"prompts": 128, "max_new_tokens": 16},
        "scheduler": {"kind": "none"},
        "storage": str(storage),
    }))


def trained(gold: Opened, *, rate: float, at: tuple[int, ...], sampled: bool, worker: Worker | None = None) -> Report:
    """The last report of DPO at beta .1, evaluated at the given steps, the last of which ends it."""
    config = gold[1].trial_config("sigmoid", {"beta": 0.1, "learning_rate": rate})
    *_, last = train(replace(
        config,
        training=replace(config.training, total_steps=at[-1], stop_step=at[-1]),
        evaluation=replace(config.evaluation, steps=(0, *at), sample_steps=(0, *at) if sampled else ()),
    ), worker or gold[0])
    return last


def test_a_rate_far_too_small_leaves_a_trial_underfit(gold: Opened) -> None:
    """Its gain is above its error: an infinitesimal step points the right way, and the gain is blind to size."""
    last = trained(gold, rate=1e-8, at=(3, 6), sampled=True)
    assert (last.verdict.headline, last.verdict.onset_step) == ("underfit", 3)
    assert abs(last.metrics["samples/kl_per_token"]) < 1e-6


def test_a_rate_far_too_large_breaks_the_policy_while_every_number_is_finite(gold: Opened) -> None:
    last = trained(gold, rate=1e-2, at=(20,), sampled=True)
    assert (last.verdict.headline, last.verdict.onset_step) == ("broken", 20)
    assert last.metrics["samples/eos_rate"] < 0.5 and last.nonfinite == 0
    assert (last.objective, last.best_step) == (-1.0, -1), "its gain is no result"


def test_training_on_against_a_finite_budget_of_pairs_is_over_optimised(gold: Opened) -> None:
    """The gold win rate falls from its peak while the train pairs are ranked ever better."""
    last = trained(gold, rate=1e-3, at=(10, 40, 60, 80), sampled=True)
    assert "over_optimised" in last.verdict.flags and "broken" not in last.verdict.flags
    assert last.metrics["probe/rewards/accuracy"] > 0.95
    assert wilson_interval(128 * last.metrics["gold/win_rate"], 128)[1] < 0.4


def test_labels_drawn_by_lot_are_memorised(gold: Opened) -> None:
    """Sixty-four pairs whose labels mean nothing: all of them learned, nothing about any other."""
    last = trained(gold, rate=3e-3, at=(20, 40), sampled=False, worker=without_meaning(gold))
    assert last.verdict.headline == "memorised" and last.verdict.onset_step <= 40
    assert last.metrics["probe/rewards/accuracy"] >= 0.9


def without_meaning(gold: Opened) -> Worker:
    worker, prepared = gold
    part = worker.parts["train"].take(np.arange(64))
    order = np.stack([np.arange(2)[::step] for step in np.random.default_rng(0).choice([1, -1], size=64)])  # (64, 2)
    sides = part.tokens.chosen, part.tokens.rejected
    first, second = (
        Ragged.from_lists([sides[order[i, column]][i].tolist() for i in range(64)]) for column in (0, 1)
    )
    tokens = PairTokens(part.tokens.row_ids, part.tokens.groups, part.tokens.prompt, first, second)
    shuffled = ReferencedPairs(tokens, np.take_along_axis(part.reference, order, axis=1))
    return make_worker(
        worker.engine, worker.parts | {"train": shuffled}, decode=str, probe_pairs=64, sample_prompts=8
    )

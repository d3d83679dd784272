"""From score columns in a file to the loss that learns from them. Oracle: the file itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from journeys.journey import spec_text, write_pairs
from tiny import save_chat_model

from prefopt_ray.prepare import open_worker
from prefopt_ray.spec import SweepSpec, parse_spec
from prefopt_ray.train import train
from prefopt_ray.trial import unpack_points

PAIRS, ETA, HELD_OUT = 40, 0.5, 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    save_chat_model(folder / "model")
    rows = [json.loads(line) for line in write_pairs(folder / "plain.jsonl", count=PAIRS).read_text().splitlines()]
    rng = np.random.default_rng(0)
    scored = [row | {"good": float(rng.normal(2, 1)), "bad": float(rng.normal(0, 1))} for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, scored)))
    return folder


def spec(home: Path, micro_batch: int) -> SweepSpec:
    part = f"{{from: train, pairs: {HELD_OUT}}}"
    columns = "{chosen_score: good, rejected_score: bad}"
    train_pairs = PAIRS - 2 * HELD_OUT
    return parse_spec(spec_text(
        home / "model", home / "pairs.jsonl", storage=str(home / "results"),
        data=f"{{train: {{source: {home / 'pairs.jsonl'}}}, select: {part}, test: {part}, max_tokens: 64,"
             f" columns: {columns}}}",
        training=f"{{steps: 30, batch_pairs: {train_pairs}, micro_batch_pairs: {micro_batch}, warmup: 0}}",
        search=f"{{method: grid, losses: {{rebel: {{eta: {ETA}, learning_rate: 1e-2}}}},"
               f" baseline: {{loss: rebel, eta: {ETA}, learning_rate: 1e-2}}}}",
        samples="{at: never}",
    ))


@pytest.mark.parametrize("micro_batch", [24, 7])
def test_the_first_loss_is_the_mean_squared_difference_in_score_and_training_lowers_it(home, micro_batch):
    """At step 0 every margin h is 0, so the loss is (eta (score_c - score_r))^2 whatever the model."""
    worker, prepared = open_worker(spec(home, micro_batch))
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    pairs = worker.parts["train"].tokens
    written = np.array([[rows[row]["good"], rows[row]["bad"]] for row in pairs.row_ids])
    assert np.array_equal(pairs.scores, written.astype(np.float32))
    ((loss, values),) = prepared.spec.grid()
    reports = list(train(prepared.trial_config(loss, values), worker))
    losses = [p.metrics["train/loss"] for report in reports for p in unpack_points(report.points)]
    expected = np.mean((ETA * (written[:, 0] - written[:, 1])) ** 2)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.5 * expected
    norms = [p.metrics["train/loss_norm"] for report in reports for p in unpack_points(report.points)]
    assert norms[0] == pytest.approx(1.0, rel=1e-5)


def test_the_scale_of_a_loss_on_scores_is_the_whole_train_part_and_not_an_easy_first_batch(home):
    """One batch of eight is no scale: trials whose first batch was easy looked as if their loss had run away."""
    worker, prepared = open_worker(spec(home, 24))
    ((loss, values),) = prepared.spec.grid()
    config = prepared.trial_config(loss, values)
    small = replace(config, training=replace(config.training, batch_pairs=4, micro_batch_pairs=4))
    first = next(p for report in train(small, worker) for p in unpack_points(report.points))
    differences = np.diff(worker.parts["train"].tokens.scores, axis=1)
    whole = np.mean((ETA * differences.astype(float)) ** 2)
    assert first.metrics["train/loss_norm"] == pytest.approx(first.metrics["train/loss"] / whole, rel=1e-5)

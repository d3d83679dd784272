"""Evaluations: metrics agree with the per-pair log, the log with the engine, and measuring changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engine.oracle import slow_logps
from safetensors.numpy import load_file
from tiny import random_data, random_pairs, referenced, tiny_engine, tiny_llama, tiny_worker, trial_config
from train.runs import assert_same_folders, evaluated_at, points_of, run, tensors_of

from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.losses.cards import CARDS, LossCard
from prefopt_ray.measures.verdicts import EvaluationRecord, TrialHistory, judge
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.worker import make_worker
from prefopt_ray.trial import TrialConfig

EVERY_CARD = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())


def card_config(card: LossCard, **options: object) -> TrialConfig:
    return trial_config(card.name, params={param.name: param.default for param in card.params}, **options)


# -- the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "none"])
@EVERY_CARD
def test_every_loss_starts_at_one_and_margins_at_exactly_zero(card: LossCard, adapter: str) -> None:
    """Over parts of unequal batch shapes: rounding must not show as an accuracy off one half."""
    config = evaluated_at(card_config(card, adapter=adapter, steps=1), 0, 1)
    start, end = run(config, tiny_worker(data=random_data(96, 32)))
    for part in ("eval", "probe"):
        for name in ("mean", "std", "p05", "p50", "p95"):
            assert start.metrics[f"{part}/h/{name}"] == 0.0
        for side in ("chosen", "rejected"):
            assert start.metrics[f"{part}/drift/{side}"] == 0.0
    if "reference" in card.needs:
        assert start.metrics["eval/rewards/accuracy"] == start.metrics["probe/rewards/accuracy"] == 0.5
        assert start.metrics["eval/gain"] == pytest.approx(0.0, abs=1e-12)
        ((_, first),) = points_of([end])
        assert first["train/loss_norm"] == pytest.approx(1.0, abs=1e-4)
    assert (start.best_so_far, start.best_step) == (-1.0, -1), "step 0 is not a result"


def test_a_reference_free_loss_is_normalised_by_the_probe_at_step_zero() -> None:
    worker = tiny_worker()
    params = {"beta": 2.0, "gamma_ratio": 0.5}
    _, end = run(evaluated_at(trial_config("simpo", params=params, steps=1), 0, 1), worker)
    tokens = worker.evaluated_parts["probe"].tokens
    per_token = slow_logps(tiny_llama(), tokens) / np.stack([tokens.chosen.lengths, tokens.rejected.lengths], axis=1)
    start = np.logaddexp(0, -2.0 * (per_token[:, 0] - per_token[:, 1] - 0.5)).mean()
    ((_, first),) = points_of([end])
    assert first["train/loss"] / first["train/loss_norm"] == pytest.approx(start, rel=1e-5)


# -- the log -----------------------------------------------------------------------------------------


def test_the_file_holds_every_evaluation_of_every_pair(tmp_path: Path) -> None:
    worker = tiny_worker()
    config = evaluated_at(trial_config(steps=4, learning_rate=1e-2), 0, 1, 4)
    reports = run(config, worker, folder=tmp_path)
    stored = load_file(tmp_path / "evaluations.safetensors")
    select = worker.evaluated_parts["select"]
    assert np.array_equal(stored["select/row_ids"], select.tokens.row_ids)
    assert np.array_equal(stored["select/reference"], select.reference)
    assert np.array_equal(stored["select/tokens"][:, 1], select.tokens.rejected.lengths)
    for report in reports:
        policy = stored[f"select/policy/{report.step:08d}"]
        h = (policy - stored["select/reference"]).astype(np.float64) @ np.array([1.0, -1.0])
        assert report.metrics["eval/h/mean"] == pytest.approx(h.mean(), abs=1e-6)
        assert report.metrics["eval/rewards/accuracy"] == pytest.approx(((h > 0) + 0.5 * (h == 0)).mean())
    # The last evaluation is of the last checkpoint's weights.
    fresh = tiny_worker().engine
    fresh.open(0, config)
    fresh.load(0, tensors_of(tmp_path, 4))
    assert np.array_equal(fresh.score(0, select.tokens), stored["select/policy/00000004"])


def test_the_log_survives_its_file(tmp_path: Path) -> None:
    worker = tiny_worker()
    log = EvaluationLog.of_parts(worker.evaluated_parts)
    policy = np.random.default_rng(0).normal(size=(48, 2)).astype(np.float32)
    for step in (0, 5, 12):
        log.add("select", step, policy + step)
    log.save(tmp_path / "evaluations.safetensors")
    read = EvaluationLog.load(tmp_path / "evaluations.safetensors")
    assert read.steps("select") == [0, 5, 12] and read.steps("probe") == []
    assert torch.equal(read.stats("select", 5).policy_chosen, torch.from_numpy(policy[:, 0] + 5))
    assert torch.equal(read.stats("select", 5).h, log.stats("select", 5).h)
    read.forget_after(5)
    assert read.steps("select") == [0, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluations.safetensors"]


def test_a_verdict_can_be_made_again_from_the_file_alone(tmp_path: Path) -> None:
    """Margins of a DPO trial by hand from the stored columns."""
    config = evaluated_at(trial_config(steps=6, learning_rate=3e-2), 0, 1, 2, 3, 4, 5, 6)
    last = run(config, folder=tmp_path)[-1]
    stored = load_file(tmp_path / "evaluations.safetensors")

    def margins(part: str, step: int) -> np.ndarray:
        drift = stored[f"{part}/policy/{step:08d}"].astype(np.float64) - stored[f"{part}/reference"]
        return drift[:, 0] - drift[:, 1]

    records = [
        EvaluationRecord(step, margins("select", step), stored["select/groups"], margins("probe", step), 0.0)
        for step in config.evaluation.steps
    ]
    again = judge(TrialHistory("sigmoid", 0, [], records))
    assert (again.headline, again.onset_step) == (last.verdict.headline, last.verdict.onset_step)


# -- measuring changes nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_evaluating_and_sampling_more_often_does_not_change_training(adapter: str, tmp_path: Path) -> None:
    config = trial_config(adapter=adapter, steps=6, learning_rate=1e-2)
    seldom = run(evaluated_at(config, 0, 6), folder=tmp_path / "seldom")
    often = run(evaluated_at(config, *range(7), samples=tuple(range(7))), folder=tmp_path / "often")
    assert points_of(seldom) == points_of(often)
    first, second = tensors_of(tmp_path / "seldom", 6), tensors_of(tmp_path / "often", 6)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_probe_is_the_same_for_every_trial_and_the_prompts_are_distinct() -> None:
    engine, data = tiny_engine(), random_data()
    parts = referenced(engine, data)
    first, second = (make_worker(engine, parts, decode=str, probe_pairs=20, sample_prompts=8) for _ in range(2))
    probe = first.evaluated_parts["probe"].tokens
    assert np.array_equal(probe.row_ids, second.evaluated_parts["probe"].tokens.row_ids)
    assert len(set(probe.row_ids.tolist())) == 20
    samples = first.evaluators[1].prompts
    assert [samples[i].tolist() for i in range(8)] == [data.select.prompt[i].tolist() for i in range(8)]


def test_scorers_see_texts_and_win_rates_count_ties_one_half() -> None:
    """A reward that is always equal wins half of the time, at every step."""

    class Constant:
        name = "even"

        def score(self, prompts: list[str], completions: list) -> np.ndarray:
            assert all(isinstance(prompt, str) for prompt in prompts) and len(prompts) == len(completions)
            assert all(c.tokens <= 8 and isinstance(c.text, str) for c in completions)
            return np.full(len(prompts), 3.0)

    engine = tiny_engine()
    worker = make_worker(
        engine, referenced(engine, random_data()), decode=lambda ids: " ".join(map(str, ids)),
        probe_pairs=8, sample_prompts=8, scorers=(Constant(),),
    )
    start, *_ = run(evaluated_at(trial_config(steps=1), 0, 1, samples=(0,)), worker)
    assert (start.metrics["even/reward"], start.metrics["even/win_rate"]) == (3.0, 0.5)
    assert start.metrics["samples/kl"] == 0.0
    assert 0 < start.metrics["samples/unique_frac"] <= 1


def test_sample_metrics_appear_only_where_samples_were_asked_for() -> None:
    reports = run(evaluated_at(trial_config(steps=4), 0, 1, 4, samples=(4,)))
    assert [any(name.startswith("samples/") for name in report.metrics) for report in reports] == [False, False, True]


def test_the_reference_scores_the_same_pairs_whatever_was_trained(tmp_path: Path) -> None:
    worker, pairs = tiny_worker(), random_pairs(8)
    before = worker.engine.score(REFERENCE, pairs)
    first = run(trial_config(learning_rate=1e-2), worker, folder=tmp_path / "a")
    assert np.array_equal(worker.engine.score(REFERENCE, pairs), before)
    second = run(trial_config(learning_rate=1e-2), worker, folder=tmp_path / "b")
    assert points_of(first) == points_of(second)
    assert_same_folders(tmp_path / "a", tmp_path / "b")

"""Evaluations: metrics agree with the per-pair log, the log with the engine, and measuring changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.oracle import slow_logps
from safetensors.numpy import load_file
from tiny import PLAN, random_data, random_pairs, referenced, tiny_engine, tiny_llama, tiny_worker, trial_config
from train.runs import assert_same_folders, evaluated_at, points_of, run, tensors_of
from transformers import PreTrainedModel

from prefopt_ray.engine.base import REFERENCE, Samples
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.losses.cards import CARDS, LossCard
from prefopt_ray.pairs.tokens import PairTokens, Ragged, SweepData
from prefopt_ray.train import TrialState, train
from prefopt_ray.train.evaluate import sample_metrics
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.history import read_history
from prefopt_ray.train.worker import Worker, make_worker
from prefopt_ray.trial import TrialConfig


def card_config(card: LossCard, **options: object) -> TrialConfig:
    return trial_config(card.name, params={param.name: param.default for param in card.params}, **options)


# -- the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "adapter"),
    [*((card, "lora") for card in CARDS.values()), (CARDS["sigmoid"], "none"), (CARDS["ipo_mean"], "none")],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_loss_starts_at_one_and_margins_at_exactly_zero(card: LossCard, adapter: str) -> None:
    """Over parts of unequal batch shapes: rounding must not show as an accuracy off one half."""
    config = evaluated_at(card_config(card, adapter=adapter, steps=1), 0, 1)
    start, end = run(config, tiny_worker(data=scored(random_data(96, 32)), needs=card.needs))
    for part in ("eval", "probe"):
        for name in ("mean", "std", "p05", "p50", "p95"):
            assert start.metrics[f"{part}/h/{name}"] == 0.0
        for side in ("chosen", "rejected"):
            assert start.metrics[f"{part}/drift/{side}"] == 0.0
    if "reference" in card.needs:
        assert start.metrics["eval/rewards/accuracy"] == start.metrics["probe/rewards/accuracy"] == 0.5
        assert start.metrics["eval/gain"] == pytest.approx(0.0, abs=1e-12)
    if card.loss_at_start is not None:  # else it is of other pairs than this batch
        ((_, first),) = points_of([end])
        assert first["train/loss_norm"] == pytest.approx(1.0, abs=1e-4)
    assert (start.best_so_far, start.best_step) == (-1.0, -1), "step 0 is not a result"


def scored(data: SweepData) -> SweepData:
    """The same pairs, with a score of both completions for the loss that learns from them."""
    draw = np.random.default_rng(0)

    def with_scores(pairs: PairTokens) -> PairTokens:
        return replace(pairs, scores=draw.normal(size=(len(pairs), 2)).astype(np.float32))

    return replace(data, **{part: with_scores(getattr(data, part)) for part in ("train", "select", "test")})


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


def test_what_a_record_says_of_the_chosen_is_what_the_stored_columns_say(tmp_path: Path) -> None:
    """Every number by a loop over pairs, in float64."""
    config = evaluated_at(trial_config(steps=4, learning_rate=3e-2), 0, 4)
    run(config, folder=tmp_path)
    stored = load_file(tmp_path / "evaluations.safetensors")
    columns = [stored[f"select/{name}"].astype(np.float64) for name in ("policy/00000004", "reference", "tokens")]
    drift, per_token, leak, logp = [], [], [], []
    for (chosen, rejected), (was_chosen, was_rejected), (tokens, others) in zip(*columns, strict=True):
        drift.append(chosen - was_chosen)
        per_token.append((chosen - was_chosen) / tokens)
        mass, before = np.exp([chosen, rejected]).sum(), np.exp([was_chosen, was_rejected]).sum()
        leak.append(-np.log(mass / before) / ((tokens + others) / 2))
        logp.append(chosen / tokens)
    record = read_history(tmp_path, config).evaluations[-1]
    assert record.chosen.drift == pytest.approx(drift)
    assert record.chosen.down_frac == np.mean(np.array(drift) < 0)
    assert record.chosen.drift_per_token == pytest.approx(np.mean(per_token))
    assert record.chosen.leak_per_token == pytest.approx(np.mean(leak))
    assert record.chosen.logp_per_token == pytest.approx(np.mean(logp))


def test_a_loss_of_log_probs_is_measured_on_held_out_pairs_too() -> None:
    last = run(evaluated_at(trial_config("ipo_sum", steps=4, learning_rate=1e-2), 0, 4))[-1]
    for part in ("eval", "probe"):  # the mean of squares is the square of the mean plus the variance
        mean, spread = last.metrics[f"{part}/h/mean"], last.metrics[f"{part}/h/std"]
        assert last.metrics[f"{part}/loss"] == pytest.approx((mean - 5) ** 2 + spread**2, rel=1e-5)


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


class Lengths:
    """A reward that wants long completions."""

    name = "length"

    def score(self, prompts: list[str], completions: list) -> np.ndarray:
        assert all(isinstance(prompt, str) for prompt in prompts) and len(prompts) == len(completions)
        assert all(c.tokens <= 8 and isinstance(c.text, str) for c in completions)
        return np.array([float(completion.tokens) for completion in completions])


class Constant(Lengths):
    name = "even"

    def score(self, prompts: list[str], completions: list) -> np.ndarray:
        return np.full(len(super().score(prompts, completions)), 3.0)


def scored_worker(*scorers: Lengths) -> Worker:
    engine = tiny_engine()
    return make_worker(
        engine, referenced(engine, random_data()), decode=lambda ids: " ".join(map(str, ids)),
        probe_pairs=8, sample_prompts=8, scorers=scorers,
    )


def test_scorers_see_texts_and_win_rates_count_ties_one_half() -> None:
    """A reward that is always equal wins half of the time, at every step; Wilson's interval of 4 in 8 by hand."""
    start, *_ = run(evaluated_at(trial_config(steps=1), 0, 1, samples=(0,)), scored_worker(Constant()))
    assert (start.metrics["even/reward"], start.metrics["even/win_rate"]) == (3.0, 0.5)
    assert start.metrics["even/win_lcb"] == pytest.approx(0.2152, abs=1e-4)
    assert start.metrics["samples/kl"] == 0.0
    assert 0 < start.metrics["samples/unique_frac"] <= 1


def test_what_samples_were_given_is_stored_prompt_by_prompt(tmp_path: Path) -> None:
    config = evaluated_at(trial_config(steps=4, learning_rate=3e-2), 0, 2, 4, samples=(0, 4))
    last = run(config, scored_worker(Lengths(), Constant()), folder=tmp_path)[-1]
    stored = load_file(tmp_path / "evaluations.safetensors")
    policy, reference = stored["samples/length/policy/00000004"], stored["samples/length/reference"]
    assert policy.dtype == np.float64 and len(policy) == 8
    assert last.metrics["length/win_rate"] == ((policy > reference) + 0.5 * (policy == reference)).mean()
    assert last.metrics["samples/eos_rate"] == stored["samples/finished/00000004"].mean()
    kl, positions = stored["samples/kl/00000004"], stored["samples/positions/00000004"]
    assert last.metrics["samples/kl_per_token"] == kl.sum() / positions.sum()
    assert not any(name.endswith("00000002") and name.startswith("samples/") for name in stored)
    records = read_history(tmp_path, config).evaluations
    assert [record.samples is None for record in records] == [False, True, False]
    assert sorted(records[2].samples.scores) == ["even", "length"]
    assert records[2].samples.kl == last.metrics["samples/kl"]


def test_repeating_is_measured_within_a_completion_and_over_all() -> None:
    """`1 2 1 2 1 2` has five pairs of neighbours, two distinct, and three 4-grams, two distinct; `7 8` has one pair."""
    completions = Ragged.from_lists([[1, 2, 1, 2, 1, 2], [7, 8]])
    zeros = np.zeros(2)
    metrics = sample_metrics(Samples(completions, np.array([True, False]), zeros, zeros, np.array([7, 2])))
    assert metrics["samples/distinct_2"] == 3 / 6
    assert metrics["samples/repetition"] == pytest.approx((1 / 3 + 0) / 2)
    assert (metrics["samples/unique_frac"], metrics["samples/eos_rate"], metrics["samples/length"]) == (1.0, 0.5, 4.0)


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


def test_before_the_first_step_only_the_probe_is_scored_when_it_shows_the_reference() -> None:
    class CountedEngine(PlainEngine):
        scored = 0

        def score(self, slot: int, pairs: PairTokens, **options: object) -> np.ndarray:
            self.scored += len(pairs)
            return super().score(slot, pairs, **options)

    def scored_at_start(*, reference: PreTrainedModel | None) -> int:
        engine = CountedEngine(
            tiny_llama(), plan=PLAN, pad_id=0, eos_ids=(2,),
            separate_reference=(lambda: reference) if reference is not None else None,
        )
        parts = referenced(engine, random_data())
        worker = make_worker(engine, parts, decode=str, probe_pairs=16, sample_prompts=4,
                             reference_is_start=reference is None)
        trial = TrialState.open(trial_config(), worker)
        before = engine.scored
        moved = trial.report().metrics["eval/h/std"]
        assert (moved == 0.0) == (reference is None)
        return engine.scored - before

    assert scored_at_start(reference=None) == 16
    assert scored_at_start(reference=tiny_llama(seed=5)) == 16 + 48  # another reference: both parts are computed


def test_a_report_says_how_much_of_its_time_was_evaluating() -> None:
    reports = list(train(trial_config(), tiny_worker()))
    shares = [report.evaluating_seconds / report.seconds for report in reports]
    assert all(0 < share < 1 for share in shares) and reports[-1].evaluating_seconds > reports[0].evaluating_seconds

"""A trial from its first report to its end: what it says, when it stops, and what the losses do to one pair."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import PLAN, random_data, random_pairs, referenced, tiny_engine, tiny_llama, tiny_worker, trial_config
from train.runs import all_finite, assert_same_reports, evaluated_at, interrupt_after, points_of, run

from prefopt_ray.engine.base import SteppedTrial
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.measures.metrics import pair_metrics, saturation
from prefopt_ray.measures.verdicts import Thresholds
from prefopt_ray.pairs.tokens import PairTokens, SweepData
from prefopt_ray.train import TrialState, Worker, make_worker, train
from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.trial import EndState, OptimizerConfig, Report, TrialConfig

SGD = OptimizerConfig(kind="sgd")


# -- what it says ------------------------------------------------------------------------------------


def test_reports_come_at_the_planned_steps_and_every_step_is_in_one_of_them() -> None:
    reports = run(evaluated_at(trial_config(steps=7), 0, 2, 3, 7))
    assert [report.step for report in reports] == [0, 2, 3, 7]
    assert [report.pairs_seen for report in reports] == [0, 16, 24, 56]
    assert [step for step, _ in points_of(reports)] == list(range(1, 8))
    assert [report.end_state for report in reports] == [None, None, None, EndState.COMPLETED]
    assert len({frozenset(report.metrics) for report in reports}) == 1, "keys are constant"
    assert all(all_finite(report) for report in reports)


def test_the_time_between_two_reports_is_the_readers_not_the_trials() -> None:
    began = time.monotonic()
    for report in train(evaluated_at(trial_config(steps=4), 0, 2, 4), tiny_worker()):
        whole = time.monotonic() - began
        time.sleep(0.3)
    assert 0 < report.seconds <= whole - 2 * 0.3


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_same_configuration_twice_says_the_same(adapter: str) -> None:
    config = trial_config(adapter=adapter, learning_rate=1e-2)
    assert_same_reports(run(config), run(config))


def test_the_best_so_far_is_the_first_of_the_highest_gains_after_step_zero() -> None:
    reports = run(evaluated_at(trial_config(steps=6, learning_rate=3e-2), *range(7)))
    best, step = -1.0, -1
    for report in reports:
        assert report.objective == report.metrics["eval/gain"]
        if report.step > 0 and report.objective > best:
            best, step = report.objective, report.step
        assert (report.best_so_far, report.best_step) == (best, step)
    assert reports[0].verdict.headline == "inconclusive"
    chosen = next(report for report in reports if report.step == reports[-1].best_step)
    assert reports[-1].verdict_at_best == chosen.verdict


def test_of_equal_gains_the_earliest_is_the_best() -> None:
    reports = run(evaluated_at(trial_config(steps=3, learning_rate=0.0), 0, 1, 2, 3))
    assert {report.objective for report in reports[1:]} == {reports[1].objective}
    assert [report.best_step for report in reports] == [-1, 1, 1, 1]


def test_step_metrics_are_of_the_whole_batch_and_the_rate_is_the_one_used() -> None:
    """Whatever the micro-batch; first step at half the rate with a warm-up of one step."""
    whole, parts = (
        points_of(run(evaluated_at(
            trial_config(steps=2, micro_batch_pairs=micro, warmup_steps=1, learning_rate=1e-2), 0, 2
        )))
        for micro in (8, 3)
    )
    for (step, one), (_, other) in zip(whole, parts, strict=True):
        # Before the first update margins are rounding, and so is which of them count as won.
        names = one.keys() if step > 1 else {name for name in one if "accuracy" not in name and "_frac" not in name}
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    assert [metrics["train/lr"] for _, metrics in whole] == [0.005, 0.01]
    assert whole[0][1]["train/grad_weight"] == pytest.approx(0.5, abs=1e-5)
    assert "train/update_ratio" in whole[0][1] and "train/update_ratio" not in whole[1][1]


@pytest.mark.parametrize("steps", [(1, 8), (0, 4)], ids=["no start", "no end"])
def test_a_plan_without_start_or_end_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must hold 0 and stop_step"):
        next(train(evaluated_at(trial_config(steps=8), *steps), tiny_worker()))


# -- how it ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_numbers_that_blow_up_end_the_trial_at_that_step(adapter: str, tmp_path: Path) -> None:
    """Found by an evaluation right after the step, or by the step that follows."""
    config = trial_config(adapter=adapter, learning_rate=1e30, optimizer=SGD, max_grad_norm=0.0, steps=8)
    for steps, ends_at in (((0, 1, 8), 1), ((0, 8), 2)):
        folder = tmp_path / str(ends_at)
        reports = run(evaluated_at(config, *steps), folder=folder)
        last = reports[-1]
        assert (last.step, last.end_state) == (ends_at, EndState.DIVERGED)
        assert "not finite" in last.reason or "non-finite" in last.reason
        assert (last.verdict.headline, last.objective, last.best_so_far) == ("diverged", -1.0, -1.0)
        assert all(all_finite(report) for report in reports)
        assert Checkpoints(folder / "checkpoints").steps() == [0], "broken weights are not kept"


def test_a_single_pair_without_finite_loss_ends_the_trial() -> None:
    """A NaN reference, as a damaged store would hold, reached at the step that draws it."""
    worker = tiny_worker()
    reference = worker.parts["train"].reference.copy()
    reference[9] = np.nan
    broken = replace(worker, parts=worker.parts | {"train": replace(worker.parts["train"], reference=reference)})
    hit = next(s for s in range(8) if 9 in batch_indices(s, pairs=64, batch=8, seed=0)) + 1
    last = run(evaluated_at(trial_config(steps=8), 0, 8), broken)[-1]
    assert (last.step, last.end_state) == (hit, EndState.DIVERGED)
    assert all_finite(last)
    assert [step for step, _ in points_of([last])] == list(range(1, hit + 1))


def test_a_good_best_step_survives_a_later_blow_up(tmp_path: Path) -> None:
    """Only what was broken is worth nothing: score and export are those of the best step."""
    worker = tiny_worker()
    trial = TrialState.open(evaluated_at(trial_config(steps=8, learning_rate=3e-2), 0, 2, 8), worker, folder=tmp_path)
    trial.report()
    for _ in range(2):
        worker.engine.step([trial])
    good = trial.report()
    tensors = worker.engine.state(0)
    worker.engine.load(0, {name: tensor * float("nan") for name, tensor in tensors.items()})
    worker.engine.step([trial])
    last = trial.report()
    assert last.end_state == EndState.DIVERGED
    assert (last.best_so_far, last.best_step) == (good.objective, 2)
    assert last.verdict_at_best == good.verdict
    assert Checkpoints(tmp_path / "checkpoints").latest().step == 2


def one_pair_worker(*, layers: int = 2) -> Worker:
    """A deterministic preference: one pair, seen at every step."""
    pair = random_pairs(1, seed=4, longest=12)
    engine = tiny_engine(tiny_llama(layers=layers))
    parts = referenced(engine, SweepData(pair, random_pairs(4, first_row=50), pair, pad_id=0, eos_ids=(2,)))
    return make_worker(engine, parts, decode=str, probe_pairs=1, sample_prompts=1)


def one_pair_config(loss: str, beta: float, *, steps: int, **options: object) -> TrialConfig:
    config = trial_config(loss, params={"beta": beta}, adapter="none", steps=steps, **options)
    training = replace(config.training, batch_pairs=1, micro_batch_pairs=1)
    return evaluated_at(replace(config, training=training), 0, 1, steps)


def trajectory(config: TrialConfig, name: str) -> list[float]:
    return [metrics[f"train/{name}"] for _, metrics in points_of(run(config, one_pair_worker()))]


def test_dpo_pushes_the_rejected_completion_down_for_ever_whatever_beta() -> None:
    """Strictly, at every step; a smaller beta ends lower; and the first steps under Adam do not see beta."""
    ends, early = [], []
    for beta in (0.05, 0.1, 0.5, 1.0):
        config = one_pair_config("sigmoid", beta, steps=40, learning_rate=3e-4, max_grad_norm=0.0)
        rejected = trajectory(config, "logps/rejected")
        assert all(later < before for before, later in pairwise(rejected))
        ends.append(rejected[-1])
        early.append(trajectory(replace_steps(config, 6), "h/mean")[-1])
    assert ends == sorted(ends)
    assert max(early[:3]) - min(early[:3]) < 0.1 * max(early[:3])


def replace_steps(config: TrialConfig, steps: int) -> TrialConfig:
    shorter = replace(config.training, stop_step=steps)
    return evaluated_at(replace(config, training=shorter), 0, 1, steps)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_stops_at_half_inverse_beta(beta: float) -> None:
    h = trajectory(one_pair_config("ipo_sum", beta, steps=150, learning_rate=1e-3, max_grad_norm=0.0), "h/mean")
    assert h[-1] == pytest.approx(1 / (2 * beta), abs=0.01)


def test_under_sgd_ipo_diverges_at_a_rate_that_dpo_survives() -> None:
    """IPO is stable below 1 / |grad h|^2 only; DPO with beta .1 up to 400 times that."""
    (norm,) = set(trajectory(one_pair_config("hinge", 1.0, steps=1, optimizer=SGD, learning_rate=0.0), "grad_norm"))
    rate = 8 / norm**2  # the hinge's first gradient is grad h itself
    ends: dict[str, Report] = {}
    for loss in ("ipo_sum", "sigmoid"):
        config = one_pair_config(loss, 0.1, steps=60, learning_rate=rate, optimizer=SGD, max_grad_norm=0.0)
        ends[loss] = run(config, one_pair_worker())[-1]
    assert (ends["ipo_sum"].end_state, ends["ipo_sum"].verdict.headline) == (EndState.DIVERGED, "diverged")
    assert ends["sigmoid"].end_state == EndState.COMPLETED
    assert "diverged" not in ends["sigmoid"].verdict.flags


@pytest.mark.parametrize("guard", ["stop", "flag"])
def test_a_loss_that_ran_up_stops_the_trial_or_is_flagged(guard: str) -> None:
    """Finite all the time: the verdict's rule, not the non-finite guard."""
    config = one_pair_config("ipo_sum", 0.1, steps=40, learning_rate=1.0, max_grad_norm=0.0)
    config = evaluated_at(config, 0, 1, 30, 40)
    config = replace(config, guards=replace(config.guards, diverged=guard))
    reports = run(config, one_pair_worker())
    assert all(point["train/loss"] < 1e30 for _, point in points_of(reports))
    assert reports[-1].verdict.headline == "diverged"
    ended = {"stop": (30, EndState.DIVERGED), "flag": (40, EndState.COMPLETED)}[guard]
    assert (reports[-1].step, reports[-1].end_state) == ended


def test_an_overfit_trial_stops_where_it_is_noticed_and_keeps_its_best(tmp_path: Path) -> None:
    """Random labels are memorised; with a threshold that takes any evaluation after the best for a worse one."""
    config = evaluated_at(trial_config(steps=16, learning_rate=1e-2, seed=1), 0, *range(1, 17, 3))
    reports = {}
    for guard in ("stop", "flag"):
        worker = replace(tiny_worker(), thresholds=Thresholds(overfit_z=-100.0))
        guarded = replace(config, guards=replace(config.guards, overfit=guard))
        reports[guard] = run(guarded, worker, folder=tmp_path / guard)
    stopped, flagged = reports["stop"][-1], reports["flag"][-1]
    assert stopped.end_state == EndState.STOPPED_OVERFIT and "overfit" in stopped.verdict.flags
    assert stopped.reason.startswith("gain fell from") and f"detected at step {stopped.step}" in stopped.reason
    assert f"at step {stopped.best_step} to" in stopped.reason and stopped.best_step < stopped.step < 16
    assert stopped.step in Checkpoints(tmp_path / "stop" / "checkpoints").steps()
    assert flagged.end_state == EndState.COMPLETED and "overfit" in flagged.verdict.flags
    assert points_of(reports["flag"])[: stopped.step] == points_of(reports["stop"])


class CrampedEngine(PlainEngine):
    """A real engine on a machine whose memory ends at the third step, or at the evaluation after the second."""

    calls = 0
    ends_in = "step"

    def step(self, trials: Sequence[SteppedTrial]) -> None:
        self.calls += 1
        if self.calls == 3 and self.ends_in == "step":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nlong tale")
        super().step(trials)

    def score(self, slot: int, pairs: PairTokens, **options: Callable[[int], None]) -> np.ndarray:
        if self.calls == 2 and self.ends_in == "evaluation":
            raise torch.OutOfMemoryError
        return super().score(slot, pairs, **options)


@pytest.mark.parametrize(
    ("ends_in", "reason"),
    [("step", "CUDA out of memory. Tried to allocate 2 GiB."), ("evaluation", "out of memory")],
)
def test_out_of_memory_is_an_end_state_with_its_reason(ends_in: str, reason: str, tmp_path: Path) -> None:
    engine = CrampedEngine(tiny_llama(), plan=PLAN, pad_id=0, eos_ids=(2,))
    worker = make_worker(engine, referenced(engine, random_data()), decode=str, probe_pairs=8, sample_prompts=2)
    engine.ends_in = ends_in
    reports = run(evaluated_at(trial_config(steps=8), 0, 1, 2, 8), worker, folder=tmp_path)
    last = reports[-1]
    assert (last.step, last.end_state, last.reason) == (2, EndState.OUT_OF_MEMORY, reason)
    assert (last.best_step, last.best_so_far) == (reports[-2].best_step, reports[-2].best_so_far)
    assert all_finite(last)


def test_an_interrupted_trial_has_no_end_state(tmp_path: Path) -> None:
    reports = list(train(trial_config(), tiny_worker(), folder=tmp_path, interrupted=interrupt_after(2)))
    assert [report.step for report in reports] == [0, 1]
    assert reports[-1].end_state is None
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 2


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(evaluated_at(trial_config(steps=1), 0, 1))[-1].end_state == EndState.COMPLETED
    assert not list(tmp_path.iterdir())


# -- what it costs -----------------------------------------------------------------------------------


def test_step_metrics_cost_little_beside_a_step() -> None:
    """64 pairs: 10 ms of processor time allowed, about 0.8 ms when measured."""
    rng = torch.Generator().manual_seed(0)
    columns = [torch.randn(64, generator=rng) for _ in range(4)]
    stats = PairStats(torch.arange(64), *columns, torch.full((64,), 9), torch.full((64,), 7))
    card, params = find_card("sigmoid"), {"beta": 0.1}
    taken = []
    for _ in range(20):
        start = time.process_time()
        pair_metrics(stats, card, params)
        saturation(stats, card, params)
        taken.append(time.process_time() - start)
    assert float(np.median(taken)) < 0.01


def test_running_out_of_memory_after_an_evaluation_keeps_what_it_measured(tmp_path: Path) -> None:
    worker = tiny_worker()
    trial = TrialState.open(evaluated_at(trial_config(steps=4), 0, 1, 4), worker, folder=tmp_path)
    trial.report()
    worker.engine.step([trial])
    measured = trial.report()
    ended = trial.end(EndState.OUT_OF_MEMORY, "CUDA out of memory")
    assert ended.end_state is EndState.OUT_OF_MEMORY and ended.step == measured.step
    assert ended.metrics == measured.metrics and ended.best_step == measured.best_step == 1

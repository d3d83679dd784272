"""What a step benchmark runs: one trial from its first step on, by an engine of ours or by TRL, timed alike.

Every run starts afresh and takes the same rows in the same order. The first step warms up and is not timed.
"""

import copy
import gc
import tempfile
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from benchmarks import trl_arm
from benchmarks.timing import Spent, now
from prefopt_ray.engine import choose
from prefopt_ray.engine.base import REFERENCE, Engine, ReferencedPairs
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.train.state import TrialState
from prefopt_ray.train.worker import Worker, make_worker
from prefopt_ray.trial import AdapterConfig, EvaluationConfig, ExecutionPlan, TrainingConfig, TrialConfig

RANK = 8


@dataclass(frozen=True)
class StepRun:
    """What a run of some steps did and took."""

    losses: tuple[float, ...]  # per step, mean over its pairs
    grad_norms: tuple[float, ...]  # before clipping
    spent: Spent  # from the end of the first step to the end of the last
    peak_bytes: int  # of a GPU's memory; 0 on a CPU


class StepArm(Protocol):
    name: str

    def run(self, steps: int, *, logged: bool) -> StepRun:
        """`logged`: losses and norms of every step are wanted; otherwise they may be missing."""
        ...


@dataclass(frozen=True)
class Workbench:
    """What all arms share."""

    model: PreTrainedModel  # nobody's own: whoever changes it copies it first
    pairs: PairTokens
    trial: TrialConfig
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def step_trial(*, steps: int, batch_pairs: int) -> TrialConfig:
    """DPO with a LoRA on every linear, at a rate that moves the loss within a few steps."""
    return TrialConfig(
        loss="sigmoid", loss_params={"beta": 0.1}, learning_rate=1e-3,
        training=TrainingConfig(total_steps=steps, stop_step=steps, batch_pairs=batch_pairs),
        evaluation=EvaluationConfig(steps=(0, steps)), adapter=AdapterConfig(rank=RANK, alpha=2 * RANK), seed=7,
    )


def row_order(trial: TrialConfig, pairs: int) -> np.ndarray:
    """(pairs,) row numbers, batch after batch, as the trial takes them in its first epoch."""
    batch = trial.training.batch_pairs
    steps = range(pairs // batch)
    return np.concatenate([batch_indices(step, pairs=pairs, batch=batch, seed=trial.seed) for step in steps])


def open_engine(kind: str, model: PreTrainedModel, *, trial: TrialConfig) -> Engine:
    """`auto`: the engine that a sweep chooses for the model; `plain`: transformers and peft as they are."""
    plan = ExecutionPlan(
        engine=kind, device=model.device.type, dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.config._attn_implementation), threads=torch.get_num_threads(),
    )
    return choose.open_engine(
        choose.choose_engine(kind, model.config, trial.adapter), model, plan=plan, pad_id=0, eos_ids=(2,)
    )


class OurArm:
    """Our engine, stepped as a trial steps it, metrics of every step included."""

    def __init__(self, bench: Workbench, kind: str, *, micro_batch_pairs: int | None = None) -> None:
        self.name = f"prefopt {kind}"
        self._trial = replace(bench.trial, training=replace(bench.trial.training, micro_batch_pairs=micro_batch_pairs))
        self._device = bench.device
        self._worker = _worker(open_engine(kind, copy.deepcopy(bench.model), trial=self._trial), bench.pairs)

    @property
    def engine(self) -> str:
        """Which one it became."""
        return self._worker.engine.plan.engine

    def run(self, steps: int, *, logged: bool = False) -> StepRun:
        trial = TrialState.open(_shortened(self._trial, steps), self._worker)
        engine, device = self._worker.engine, self._device
        resident = _forget_peak(device)
        engine.step([trial])
        began = now(device)
        for _ in range(steps - 1):
            engine.step([trial])
        spent = now(device) - began
        points = [metrics for _, metrics in trial.state()["points"]]
        return StepRun(
            tuple(point["train/loss"] for point in points), tuple(point["train/grad_norm"] for point in points),
            spent, _peak(device) - resident,
        )


class TrlArm:
    """A DPOTrainer per run, timed by its own callbacks. Copying the model and building the trainer are not timed."""

    def __init__(self, bench: Workbench, *, tuned: bool) -> None:
        self.bench = bench
        self.name = trl_arm.TUNED if tuned else trl_arm.DEFAULT
        self._tuned = tuned
        self._rows = trl_arm.dataset(bench.pairs)
        if tuned:
            with tempfile.TemporaryDirectory() as folder:
                logps = trl_arm.reference_logps(
                    copy.deepcopy(bench.model), bench.trial, self._rows, settings=self._settings(folder)
                )
            self._rows = trl_arm.with_reference(self._rows, logps)

    def run(self, steps: int, *, logged: bool = False) -> StepRun:
        device = self.bench.device
        clock = _StepClock(steps, device)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_arm.open_trainer(
                copy.deepcopy(self.bench.model), _shortened(self.bench.trial, steps),
                rows=self._rows.select(row_order(self.bench.trial, len(self._rows))), callbacks=[clock],
                settings=self._settings(folder, logged_every=1 if logged else 10),
            )
            resident = _forget_peak(device)
            trainer.train()
        points = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        peak = _peak(device) - resident
        del trainer
        gc.collect()  # a trainer refers to itself; its model would stay beside the next arm's
        return StepRun(
            tuple(point["loss"] for point in points), tuple(point["grad_norm"] for point in points), clock.spent, peak
        )

    def _settings(self, folder: str, *, logged_every: int = 10) -> trl_arm.TrlSettings:
        return trl_arm.TrlSettings(
            tuned=self._tuned, folder=folder, logged_every=logged_every,
            bfloat16=self.bench.dtype is torch.bfloat16, on_cpu=self.bench.device.type == "cpu",
        )


class _StepClock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._began = self._ended = now(device)

    @property
    def spent(self) -> Spent:
        return self._ended - self._began

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 1:
            self._began = now(self._device)
        if state.global_step == self._steps:
            self._ended = now(self._device)


def _worker(engine: Engine, pairs: PairTokens) -> Worker:
    scored = ReferencedPairs(pairs, engine.score(REFERENCE, pairs))
    few = scored.take(np.arange(4))  # nothing is evaluated here
    parts = {"train": scored, "select": few, "test": few}
    return make_worker(engine, parts, decode=str, probe_pairs=2, sample_prompts=1)


def _shortened(trial: TrialConfig, steps: int) -> TrialConfig:
    return replace(
        trial, training=replace(trial.training, total_steps=steps, stop_step=steps),
        evaluation=replace(trial.evaluation, steps=(0, steps)),
    )


def _forget_peak(device: torch.device) -> int:
    """Bytes that are resident now: models of all arms, adapters, what this arm has open."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

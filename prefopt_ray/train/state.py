"""TrialState: one trial's life, stepped from outside.

Holds data position, schedule, counters, loss state, histories and best-so-far; weights and optimizer
are the engine's. Everything that must survive is in `state()` and the per-pair log. Data order and
sampling depend on (seed, epoch) and fixed seeds alone, so there is no random stream to carry.
"""

import base64
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt_ray.engine.base import ReferencedPairs, StepOutcome, pair_stats
from prefopt_ray.errors import CheckpointError
from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.measures.metrics import pair_metrics, saturation
from prefopt_ray.measures.verdicts import Reading, StepRecord, conclude, read_rules
from prefopt_ray.train.checkpoints import Checkpoint, Checkpoints, lock_folder
from prefopt_ray.train.evaluate import PolicyView, evaluate, finite_metrics
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.history import EVALUATIONS_FILE, evaluation_record, history_of, trial_thresholds
from prefopt_ray.train.schedule import batch_indices, rate_factor
from prefopt_ray.train.worker import Worker
from prefopt_ray.trial import EndState, Report, StepPoint, TrialConfig, Verdict, pack_points

UPDATE_RATIO_EVERY = 10  # steps; it costs a copy of the trainable weights
WORST = -1.0  # the objective of an invalid evaluation: finite, below every gain
_UNJUDGED = Verdict("inconclusive", evidence="not evaluated after a training step yet")
# Rules that may end a trial: by which guard, and as what. Overfitting has an end state of its own, since it is the
# usual one; the others stop a trial early, and the reason names the guard.
_GUARDS = {
    "diverged": ("diverged", EndState.DIVERGED),
    "broken": ("broken", EndState.STOPPED_EARLY),
    "memorised": ("memorised", EndState.STOPPED_EARLY),
    "overfit": ("overfit", EndState.STOPPED_OVERFIT),
    "over_optimised": ("over_optimised", EndState.STOPPED_EARLY),
    "collapsed_rejected": ("collapsed", EndState.STOPPED_EARLY),
    "likelihood_displaced": ("displaced", EndState.STOPPED_EARLY),
}

log = logging.getLogger(__name__)


class TrialState:
    """SteppedTrial (see engine.base) with evaluation, verdicts, best-so-far and checkpoints."""

    def __init__(self, config: TrialConfig, worker: Worker, *, slot: int = 0, folder: Path | None = None) -> None:
        if not {0, config.training.stop_step} <= set(config.evaluation.steps):
            # Without the first nothing is normalised, without the last the trial never ends.
            raise ValueError(f"evaluation.steps must hold 0 and stop_step, got {config.evaluation.steps}")
        self.config, self.slot = config, slot
        self.card = find_card(config.loss)
        self.end_state: EndState | None = None
        self.reason = ""
        self._worker = worker
        self._train = worker.parts["train"]
        self._formula, self._loss_state = loss_function(self.card.name), None
        self._folder = folder
        self._checkpoints = Checkpoints(folder / "checkpoints") if folder else None
        self._step = 0
        self._best, self._best_step, self._best_verdict = WORST, -1, _UNJUDGED
        self._reported_step = -1
        self._last_report: Report | None = None
        self._loss_at_start = self._analytic_start()
        self._points: list[StepPoint] = []
        self._nonfinite = 0
        self._log = EvaluationLog.of_parts(worker.evaluated_parts)
        self._log.put("trial/vocabulary", worker.engine.vocabulary)
        self._log.put("trial/train_pairs", len(self._train))
        self._history = history_of(self._log, config)
        self._seconds, self._clock, self._evaluating = 0.0, time.monotonic(), 0.0
        self._step_started = self._clock

    @classmethod
    def open(cls, config: TrialConfig, worker: Worker, *, slot: int = 0, folder: Path | None = None) -> "TrialState":
        """A trial in a fresh slot; continued from its newest sound checkpoint when `folder` holds one."""
        trial = cls(config, worker, slot=slot, folder=folder)
        worker.engine.open(slot, config)
        if folder:
            trial._lock = lock_folder(folder)  # released with this object, or this process
            saved = trial._checkpoints.latest()
            if saved is not None:
                trial._restore(saved)
        return trial

    # -- what the outside asks ---------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def running(self) -> bool:
        return self.end_state is None

    @property
    def evaluation_due(self) -> bool:
        """True when this step is in the evaluation plan and has not been reported."""
        return self._reported_step < self._step and self._step in self.config.evaluation.steps

    @property
    def last_report(self) -> Report | None:
        return self._last_report

    # -- what the engine asks (SteppedTrial) -------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate * rate_factor(self.config.training, self._step)

    @property
    def measures_update(self) -> bool:
        return self._step % UPDATE_RATIO_EVERY == 0

    def next_batch(self) -> ReferencedPairs:
        self._step_started = time.monotonic()
        training = self.config.training
        indices = batch_indices(
            self._step, pairs=len(self._train), batch=training.batch_pairs, seed=self.config.seed
        )
        return self._train.take(indices)

    def loss(self, stats: PairStats) -> Tensor:
        return self._formula(stats, self.config.loss_params, self._loss_state)[0]

    def finish_step(self, outcome: StepOutcome) -> None:
        loss, grad_norm = float(outcome.losses.double().mean()), outcome.grad_norm
        if self._loss_at_start is None:  # the first step's, computed before anything was updated
            self._loss_at_start = loss
        metrics = self._step_metrics(outcome)
        _, self._loss_state = self._formula(outcome.stats, self.config.loss_params, self._loss_state)
        self._step += 1
        finite, dropped = finite_metrics(metrics)
        self._points.append(StepPoint(self._step, {f"train/{k}": v for k, v in finite.items()}))
        self._history.steps.append(StepRecord(
            step=self._step, loss=loss, loss_norm=loss / self._start, grad_norm=grad_norm, finite=outcome.applied,
        ))
        if not outcome.applied:
            self._nonfinite += 1
            self._end(EndState.DIVERGED, f"non-finite loss or gradient at step {self._step} ({dropped} values)")

    # -- reporting ---------------------------------------------------------------------------------

    def report(self) -> Report:
        """Evaluate if an evaluation is due, judge, update best-so-far, checkpoint; the trial's next Report."""
        metrics: dict[str, float] = {}
        objective = WORST
        if self.evaluation_due and self.running:
            began = time.monotonic()
            metrics, objective = self._evaluate()
            self._evaluating += time.monotonic() - began
        verdict, readings = self._judge()
        if verdict.headline in ("diverged", "broken"):
            objective = WORST  # a finite gain while the loss runs away, or of a policy that babbles, is not a result
        self._reported_step = self._step
        if objective > self._best and self._step > 0:
            self._best, self._best_step, self._best_verdict = objective, self._step, verdict
        self._apply_guards(readings)
        if self.running and self._step >= self.config.training.stop_step:
            self._end(EndState.COMPLETED, f"all {self._step} steps")
        self._tick()
        self._last_report = Report(
            step=self._step, pairs_seen=self._step * self.config.training.batch_pairs,
            metrics=metrics, objective=objective, best_so_far=self._best, best_step=self._best_step,
            verdict=verdict, verdict_at_best=self._best_verdict, points=pack_points(self._points),
            end_state=self.end_state, reason=self.reason, seconds=self._seconds,
            evaluating_seconds=self._evaluating, nonfinite=self._nonfinite,
        )
        self._points = []
        self.save()
        return self._last_report

    def end(self, end_state: EndState, reason: str) -> Report:
        """End from outside (out of memory, for example) without touching the engine."""
        self._end(end_state, reason)
        if self._last_report is None or self._reported_step < self._step:
            return self.report()
        # What this step's evaluation measured stays true: the report is the same, and ends the trial.
        self._last_report = replace(
            self._last_report, end_state=self.end_state, reason=self.reason, points=pack_points(self._points)
        )
        return self._last_report

    def save(self) -> None:
        """Write the per-pair log and a checkpoint; nothing without a folder.

        A diverged trial's weights are worth nothing: its last sound checkpoint is kept instead.
        """
        if self._folder is None:
            return
        self._tick()
        self._log.put_steps(self._history.steps)
        self._log.save(self._folder / EVALUATIONS_FILE)
        if self.end_state in (EndState.DIVERGED, EndState.OUT_OF_MEMORY):
            return
        checkpoint = Checkpoint(self._step, self._worker.engine.state(self.slot), self.state())
        self._checkpoints.save(checkpoint, keep=self._kept_steps)

    def restart_clock(self) -> None:
        """What passed since the last report was its reader's time, not the trial's."""
        self._clock = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Everything that must survive beside weights, optimizer and the log of evaluations and steps. JSON-ready."""
        report = None
        if self._last_report is not None:
            points = base64.b64encode(self._last_report.points).decode()
            report = {**self._last_report.to_dict(), "points": points}
        return {
            "step": self._step,
            "reported_step": self._reported_step,
            "loss_at_start": self._loss_at_start,
            "loss_state": self._loss_state,
            "best": [self._best, self._best_step, asdict(self._best_verdict)],
            "end": [self.end_state, self.reason],
            "points": [[p.step, dict(p.metrics)] for p in self._points],
            "last_report": report,
            "seconds": [self._seconds, self._evaluating],
            "config": self.config.digest(),
            "plan": self._worker.engine.plan_of(self.slot).to_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; evaluations and steps must already be in the log."""
        self._step, self._reported_step = state["step"], state["reported_step"]
        self._loss_at_start, self._loss_state = state["loss_at_start"], state["loss_state"]
        self._best, self._best_step, verdict = state["best"]
        self._best_verdict = Verdict(**{**verdict, "flags": tuple(verdict["flags"])})
        end, self.reason = state["end"]
        self.end_state = EndState(end) if end else None
        self._points = [StepPoint(step, metrics) for step, metrics in state["points"]]
        if state["last_report"] is not None:
            points = base64.b64decode(state["last_report"]["points"])
            self._last_report = Report.from_dict({**state["last_report"], "points": points})
        self._history = history_of(self._log, self.config).until(self._step)
        (self._seconds, self._evaluating), self._clock = state["seconds"], time.monotonic()

    # -- inside ------------------------------------------------------------------------------------

    def _restore(self, saved: Checkpoint) -> None:
        if saved.state["config"] != self.config.digest():
            raise CheckpointError(f"{self._folder}: holds a trial with another configuration; give it its own folder")
        self._worker.engine.keep_plan(self.slot, saved.state["plan"])
        if saved.state["plan"] != self._worker.engine.plan_of(self.slot).to_dict():
            log.warning("%s: continued under another execution plan, so its last bits may differ", self._folder)
        self._worker.engine.load(self.slot, saved.tensors)
        self._log = EvaluationLog.load(self._folder / EVALUATIONS_FILE)
        self._log.forget_after(saved.state["reported_step"])
        self.load(saved.state)

    def _analytic_start(self) -> float | None:
        if self.card.loss_at_start is None or not self._worker.reference_is_start:
            return self._start_on_data()
        return self.card.loss_at_start(self.config.loss_params)

    def _start_on_data(self) -> float | None:
        """The mean loss of the whole train part while the policy is its reference, for a loss that reads scores or
        prefixes: evaluations do not compute it, and one batch is no scale. None: measured at step 0, or, where nothing
        else can, on the first batch."""
        read = self.card.needs - {"reference", "lengths"}
        if not read or not read <= {"per_token", "scores"} or not self._worker.reference_is_start:
            return None
        untouched = torch.as_tensor(np.array(self._train.reference))
        stats = pair_stats(self._train, untouched)
        if "per_token" in read:
            stats = replace(stats, policy_chosen_prefix=stats.reference_chosen_prefix,
                            policy_rejected_prefix=stats.reference_rejected_prefix)
        losses, _ = self._formula(stats, self.config.loss_params, None)
        return float(losses.double().mean())

    @property
    def _start(self) -> float:
        if self._loss_at_start is None:
            raise RuntimeError("the loss at the start is measured at step 0, which was not made")
        # Measured against another reference it can be near zero (hinge) or negative (robust): no scale for a ratio.
        known = self.card.loss_at_start(self.config.loss_params) if self.card.loss_at_start else 1e-12
        return max(self._loss_at_start, known)

    def _step_metrics(self, outcome: StepOutcome) -> dict[str, float]:
        params = self.config.loss_params
        loss = float(outcome.losses.double().mean())
        metrics = pair_metrics(outcome.stats, self.card, params) | {
            "loss": loss,
            "loss_norm": loss / self._start,
            "grad_norm": outcome.grad_norm,
            "clip_frac": float(outcome.clipped),
            "lr": self.learning_rate,
            "grad_weight": saturation(outcome.stats, self.card, params, state=self._loss_state),
            "pairs_per_s": len(outcome.stats) / max(1e-9, time.monotonic() - self._step_started),
        }
        if outcome.update_ratio is not None:
            metrics["update_ratio"] = outcome.update_ratio
        return metrics

    def _evaluate(self) -> tuple[dict[str, float], float]:
        view = PolicyView(
            self._worker.engine, self.slot, self._step, self.config, self.card, self._log, self._mean_loss
        )
        metrics, dropped = finite_metrics(evaluate(self._worker.evaluators, view))
        probe_loss = self._mean_loss(self._log.stats("probe", self._step))
        if self._loss_at_start is None:
            self._loss_at_start = probe_loss
        if probe_loss is not None:
            self._log.put(f"probe/loss_norm/{self._step:08d}", probe_loss / self._start)
        self._history.evaluations.append(evaluation_record(self._log, self._step, self.card))
        if dropped:
            self._nonfinite += 1
            self._end(EndState.DIVERGED, f"{dropped} measures are not finite at the evaluation of step {self._step}")
        return metrics, WORST if dropped else metrics.get(self.config.evaluation.objective, WORST)

    def _mean_loss(self, stats: PairStats) -> float | None:
        """None for a loss that reads more: evaluations store log-probs and lengths, nothing else."""
        if not self.card.needs <= {"reference", "lengths"}:
            return None
        losses, _ = self._formula(stats, self.config.loss_params, self._loss_state)
        return float(losses.double().mean())

    def _judge(self) -> tuple[Verdict, tuple[Reading, ...]]:
        if self._step == 0:
            return _UNJUDGED, ()
        thresholds = trial_thresholds(self._worker.thresholds, self.config)
        readings = read_rules(self._history, thresholds)
        return conclude(readings, self._history, thresholds), readings

    @property
    def _kept_steps(self) -> set[int]:
        """Evaluated steps whose checkpoints stay beside the last two."""
        if self.config.evaluation.keep == "all":
            return {step for step in self.config.evaluation.steps if 0 < step <= self._step}
        return {self._best_step}

    def _apply_guards(self, readings: Sequence[Reading]) -> None:
        """The first rule by precedence that fired and whose guard says stop ends the trial."""
        for reading in readings:
            guard, end_state = _GUARDS.get(reading.rule, (None, None))
            if reading.fired and guard and getattr(self.config.guards, guard) == "stop":
                named = f"guard {guard}: " if end_state is EndState.STOPPED_EARLY else ""
                self._end(end_state, f"{named}{reading.evidence}")

    def _end(self, end_state: EndState, reason: str) -> None:
        if self.end_state is None:
            self.end_state, self.reason = end_state, reason

    def _tick(self) -> None:
        now = time.monotonic()
        self._seconds, self._clock = self._seconds + now - self._clock, now

"""A trial in miniature, in the process that it is given: what a trial's parts take in seconds and bytes.

The model is loaded and the worker opened as for a trial; then come a step on the widest micro-batch of the real train
part, some usual steps, the scoring of the longest and of some usual select pairs, one draw of samples, a checkpoint.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.engine.extras import DERIVED
from prefopt_ray.engine.local import DRAWN_TOKENS, LocalEngine
from prefopt_ray.pairs.tokens import PairTokens, SweepData
from prefopt_ray.plan.memory import Gauge, Room, room
from prefopt_ray.prepare import WorkerBlueprint
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.train.state import TrialState
from prefopt_ray.trial import ExecutionPlan, TrialConfig

LIBRARIES, MODEL, ADAPTER = "Python, Ray and libraries", "model and pairs", "adapter"
TRAINING, EVALUATING, SAMPLING, SAVING = "training step", "evaluating", "sampling", "checkpoint"
TIMED_STEPS, TIMED_S = 5, 20.0  # usual steps: so many, fewer where they take so long
SCORED_PASSES = 4  # of the usual select pairs


@dataclass(frozen=True)
class Probe:
    """What was measured. Seconds on an otherwise idle device."""

    plan: ExecutionPlan
    widest_tokens: int  # of all micro-batches that the trial will make
    open_s: float  # from a process with libraries to a worker
    step_s: float  # one optimizer step
    pair_s: float  # scoring one select pair
    draw_s: float  # all prompts' completions once, read by policy and reference
    save_s: float  # one checkpoint
    memory: dict[str, int]  # stage -> bytes by which it raised the peak, in order
    room: Room

    @property
    def peak(self) -> int:
        """Bytes that a trial's process takes at most."""
        return sum(self.memory.values())


def probe(blueprint: WorkerBlueprint, data: SweepData, config: TrialConfig) -> Probe:
    """Measure `config` on `data` here. Raises ModelError; OutOfMemoryError where not even this fits."""
    space = room(blueprint.device)
    gauge = Gauge(blueprint.device)
    gauge.mark(LIBRARIES)
    began = time.perf_counter()
    worker = replace(blueprint, parts=_without_reference(data, blueprint.needs), probe_pairs=1)()
    open_s = time.perf_counter() - began
    gauge.mark(MODEL)
    engine = worker.engine
    with tempfile.TemporaryDirectory() as folder:
        trial = _ProbedTrial.open(config, worker, folder=Path(folder))
        gauge.mark(ADAPTER)
        batch, widest = _widest_batch(engine, trial, data.train)
        trial.batch = batch
        engine.step([trial])
        step_s = _usual_step(engine, trial, data.train, avoiding=batch)
        gauge.mark(TRAINING)
        pair_s = _usual_pair(engine, data.select)
        gauge.mark(EVALUATING)
        draw_s = _one_draw(engine, data.select, config)
        gauge.mark(SAMPLING)
        save_s = _seconds(trial.save)
        gauge.mark(SAVING)
    return Probe(engine.plan, widest, open_s, step_s, pair_s, draw_s, save_s, gauge.rises, space)


class _ProbedTrial(TrialState):
    """A trial whose next batch is any of its batches."""

    batch = 0

    def next_batch(self) -> ReferencedPairs:
        return self._train.take(_rows(self.config, self._train.tokens, self.batch))


def _widest_batch(engine: LocalEngine, trial: TrialState, train: PairTokens) -> tuple[int, int]:
    """The step of the first epoch that makes the micro-batch with the most tokens, and those tokens."""
    training = trial.config.training
    steps = min(training.stop_step, -(-len(train) // training.batch_pairs))
    widths = [
        max(engine.forward_tokens(trial, train.take(_rows(trial.config, train, step)))) for step in range(steps)
    ]
    return int(np.argmax(widths)), max(widths)


def _usual_step(engine: LocalEngine, trial: _ProbedTrial, train: PairTokens, *, avoiding: int) -> float:
    """Seconds of a step of mean length, from some of the first ones."""
    training = trial.config.training
    usual = [step for step in range(min(training.stop_step, TIMED_STEPS + 1)) if step != avoiding] or [avoiding]
    seconds, tokens = 0.0, 0
    for step in usual[:TIMED_STEPS]:
        trial.batch = step
        seconds += _seconds(lambda: engine.step([trial]))
        tokens += int(engine.pair_tokens(train.take(_rows(trial.config, train, step))).sum())
        if seconds > TIMED_S:
            break
    mean = float(engine.pair_tokens(train).mean()) * training.batch_pairs
    return seconds / tokens * mean


def _usual_pair(engine: LocalEngine, select: PairTokens) -> float:
    """Seconds of scoring a pair of mean length, after the longest ones were scored once."""
    lengths = engine.pair_tokens(select)
    most = engine.plan.scoring_tokens
    longest = np.argsort(-lengths)[: max(1, most // int(lengths.max()))]
    engine.score(0, select.take(longest))
    usual = np.random.default_rng(0).permutation(len(select))[: max(1, int(SCORED_PASSES * most / lengths.mean()))]
    scored = select.take(usual)
    return _seconds(lambda: engine.score(0, scored)) / lengths[usual].sum() * float(lengths.mean())


def _one_draw(engine: LocalEngine, select: PairTokens, config: TrialConfig) -> float:
    """Seconds of one completion for each prompt that trials sample, from as many as are drawn together."""
    settings = config.evaluation
    if not settings.sample_steps:
        return 0.0
    prompts = select.prompt.take(select.first_of_groups(settings.sample_prompts))
    longest = int(prompts.lengths.max()) + settings.max_new_tokens
    together = max(1, min(len(prompts), max(DRAWN_TOKENS, engine.plan.scoring_tokens) // longest))
    # Those with the longest prompt among them, so that memory and rows per forward are a trial's.
    some = np.sort(np.argsort(-prompts.lengths, kind="stable")[:together])
    drawn = prompts.take(some)
    seconds = _seconds(
        lambda: engine.sample(0, drawn, max_new_tokens=settings.max_new_tokens, seed=settings.sample_seed)
    )
    return seconds / together * len(prompts)


def _rows(config: TrialConfig, train: PairTokens, step: int) -> np.ndarray:
    return batch_indices(step, pairs=len(train), batch=config.training.batch_pairs, seed=config.seed)


def _without_reference(data: SweepData, needs: frozenset[str]) -> dict[str, ReferencedPairs]:
    """The parts with zeros for a reference: what is measured does not depend on it."""
    def zeros(pairs: PairTokens) -> ReferencedPairs:
        return ReferencedPairs(pairs, np.zeros((len(pairs), 2), dtype=np.float32))

    derived = {need: zeros(derive(data.train)) for need, derive in DERIVED.items() if need in needs}
    parts = {name: zeros(pairs) for name, pairs in data.parts.items()}
    return parts | {"train": replace(parts["train"], derived=derived)}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""One engine's steps on the person's pairs: the trial as a sweep trains it, watched step by step."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from prefopt_ray.engine.base import REFERENCE, Engine, ReferencedPairs, StepOutcome
from prefopt_ray.engine.choose import EngineChoice
from prefopt_ray.engine.extras import DERIVED
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.prepare import Prepared
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.train.state import TrialState
from prefopt_ray.train.worker import Worker
from prefopt_ray.trial import ExecutionPlan, TrialConfig


@dataclass(frozen=True)
class VerifiedStep:
    """What one optimizer step computed, before its update."""

    loss: float  # mean over the pairs
    grad_norm: float  # before clipping
    # (B, 2) nats of chosen and rejected, pair by pair; (1, 2) their means where nothing else is known.
    logps: np.ndarray

    @property
    def means(self) -> np.ndarray:  # (2,)
        return self.logps.mean(0)


@dataclass(frozen=True)
class Arm:
    """One way of computing the same steps."""

    name: str
    steps: tuple[VerifiedStep, ...]
    plan: ExecutionPlan | None = None  # None: not an engine of ours
    # |mean margin| of the first step, which the policy makes equal to its reference; None where it is another model.
    margin_at_start: float | None = None


def engine_arm(name: str, choice: EngineChoice, prepared: Prepared, config: TrialConfig) -> Arm:
    """The steps of `config` by the chosen engine; what was really opened is in the arm's plan."""
    engine = replace(prepared.blueprint, choice=choice).open_engine()
    train = _referenced(engine, prepared.loaded.data.train, config, needs=prepared.blueprint.needs)
    is_start = prepared.blueprint.reference is None
    trial = _WatchedTrial.open(config, Worker(engine, {"train": train}, (), {}, is_start))
    while trial.running and trial.step < config.training.stop_step:
        engine.step([trial])
    first = trial.outcomes[0].stats
    arm = Arm(
        name, tuple(_step(outcome) for outcome in trial.outcomes), engine.plan,
        margin_at_start=abs(float(first.h.double().mean())) if is_start else None,
    )
    del engine, trial
    free_memory()
    return arm


def free_memory() -> None:
    """Of models nobody refers to any more, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trained_rows(pairs: PairTokens, config: TrialConfig) -> np.ndarray:
    """Indices of the pairs of all steps, step after step."""
    training = config.training
    return np.concatenate([
        batch_indices(step, pairs=len(pairs), batch=training.batch_pairs, seed=config.seed)
        for step in range(training.stop_step)
    ])


class _WatchedTrial(TrialState):
    """A trial that keeps what its steps computed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.outcomes: list[StepOutcome] = []

    def finish_step(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)
        super().finish_step(outcome)


def _step(outcome: StepOutcome) -> VerifiedStep:
    stats = outcome.stats
    logps = torch.stack([stats.policy_chosen, stats.policy_rejected], dim=1).double().numpy()
    return VerifiedStep(float(outcome.losses.double().mean()), outcome.grad_norm, logps)


def _referenced(
    engine: Engine, train: PairTokens, config: TrialConfig, *, needs: frozenset[str]
) -> ReferencedPairs:
    """The whole train part, so that its order is the trials'; only the pairs of these steps are scored."""
    rows = np.unique(trained_rows(train, config))
    derived: Mapping[str, ReferencedPairs] = {
        need: _scored(engine, derive(train), rows) for need, derive in DERIVED.items() if need in needs
    }
    return replace(_scored(engine, train, rows), derived=derived)


def _scored(engine: Engine, pairs: PairTokens, rows: np.ndarray) -> ReferencedPairs:
    reference = np.zeros((len(pairs), 2), dtype=np.float32)
    reference[rows] = engine.score(REFERENCE, pairs.take(rows))
    return ReferencedPairs(pairs, reference)

"""What stays warm between trials: engine, pairs with their reference, evaluators and thresholds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prefopt_ray.engine.base import REFERENCE, Engine, ReferencedPairs
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.train.evaluate import Evaluator, PairEvaluator, SampleEvaluator
from prefopt_ray.train.scorers import SampleJudge, Scorer


@dataclass(frozen=True)
class Worker:
    """Everything trials share. A new trial costs its adapter and optimizer, nothing else."""

    engine: Engine
    parts: dict[str, ReferencedPairs]  # train, select, test
    evaluators: Sequence[Evaluator]
    evaluated_parts: dict[str, ReferencedPairs]  # select, probe
    reference_is_start: bool = True
    thresholds: Thresholds = field(default_factory=Thresholds)


def make_worker(
    engine: Engine,
    parts: dict[str, ReferencedPairs],
    *,
    decode: Callable[[Sequence[int]], str],
    probe_pairs: int,
    sample_prompts: int,
    scorers: Sequence[Scorer] = (),
    judges: Sequence[SampleJudge] = (),
    reference_is_start: bool = True,
    thresholds: Thresholds = Thresholds(),
) -> Worker:
    """The usual evaluators: select part, a fixed probe of train pairs, samples at the select part's prompts."""
    probe = parts["train"].take(_probe_indices(len(parts["train"]), probe_pairs))
    if reference_is_start:
        # Scored again in the batches that evaluations score it in: rounding depends on a batch's shape, and
        # margins of 1e-6 instead of zero at step 0 would look like an accuracy of .47.
        probe = ReferencedPairs(probe.tokens, engine.score(REFERENCE, probe.tokens))
    pairs = PairEvaluator(parts["select"], probe)
    select = parts["select"].tokens
    prompts = select.prompt.take(select.first_of_groups(sample_prompts))
    samples = SampleEvaluator(prompts, decode, scorers, judges)
    return Worker(engine, parts, (pairs, samples), pairs.parts, reference_is_start, thresholds)


def _probe_indices(pairs: int, wanted: int) -> np.ndarray:
    """The same train pairs for every trial of a sweep, whatever its seed."""
    return np.sort(np.random.default_rng(0).permutation(pairs)[:wanted])

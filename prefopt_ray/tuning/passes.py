"""The two passes over pairs that run where trials run, as Ray tasks: the reference before, the test part after.

The driver may have no accelerator, so it loads no model. Both tasks tell how far they are.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

from prefopt_ray.results.answer import TEST_FILE
from prefopt_ray.engine.base import Share
from prefopt_ray.engine.batches import shared_lengths
from prefopt_ray.engine.loading import load_tokenizer
from prefopt_ray.engine.reference import Progress, score_passes
from prefopt_ray.errors import CheckpointError, PrefoptError
from prefopt_ray.results.ledger import TrialRecord
from prefopt_ray.pairs.tokens import PairTokens, SweepData
from prefopt_ray.prepare import WorkerBlueprint
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.export import export, load_best

PROGRESS_S = 0.25
LEAST_FORWARDS = 16  # of a task of the reference pass

Reserved = dict[str, float]  # cpu, gpu


def reference_pass(
    blueprint: WorkerBlueprint, data: SweepData, *, cache: Path, reserved: Reserved, at_once: int, progress: Progress
) -> WorkerBlueprint:
    """The blueprint with reference log-probs: from the cache without a task, else by as many as can run at once.

    Raises ModelError.
    """
    missing = blueprint.missing_reference(data, cache=cache)
    if not missing:
        return blueprint.keeping_reference(data, [{}], cache=cache)
    count = _shares(missing, at_once=at_once, tokens=blueprint.plan.scoring_tokens)
    task = _reference_task.options(num_cpus=reserved["cpu"], num_gpus=reserved["gpu"])
    model, passes = ray.put(blueprint), ray.put(missing)
    running = {task.remote(model, passes, Share(number, count)): number for number in range(count)}
    done, scored = [0] * count, []
    total = sum(len(pairs) for pairs in missing.values())
    while running:
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        message = task_value(next(ready))
        if isinstance(message, int):
            done[running[ready]] = message
            progress(sum(done), total)
        else:
            scored.append(message)
            del running[ready]
    return blueprint.keeping_reference(data, scored, cache=cache)


def _shares(passes: Mapping[str, PairTokens], *, at_once: int, tokens: int) -> int:
    """As many as run at once, but none for less than some forward passes: each opens the model."""
    forwards = sum(int(shared_lengths(pairs).sum()) for pairs in passes.values()) // tokens
    return max(1, min(at_once, forwards // LEAST_FORWARDS))


def score_on_test(
    blueprint: ray.ObjectRef, folder: Path, trials: list[TrialRecord], *, steps: Mapping[str, int], reserved: Reserved
) -> Iterator[tuple[str, str]]:
    """Score each trial's checkpoint at its step (by trial id) on the test part and export it.

    Yields (trial id, "") when that is stored, or (trial id, why not) for a checkpoint that cannot be read.
    """
    task = _score_task.options(num_cpus=reserved["cpu"], num_gpus=reserved["gpu"])
    for reference in task.remote(blueprint, folder, trials, steps):
        yield task_value(reference)


def task_value(reference: ray.ObjectRef) -> Any:
    """What a task gave; an error that a person should read arrives as itself, not wrapped in Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PrefoptError):
            raise error.cause from error
        raise


@ray.remote(num_returns="streaming", max_retries=0)
def _reference_task(
    blueprint: WorkerBlueprint, passes: Mapping[str, PairTokens], share: Share
) -> Iterator[int | dict[str, np.ndarray]]:
    """Pairs done now and then, at last the share's log-probs by pass."""
    done: list[int] = [0]
    outcome: list[Any] = []

    def work() -> None:
        try:
            engine = blueprint.open_engine()
            outcome.append(score_passes(engine, passes, share=share, progress=lambda pairs, of: done.append(pairs)))
        except BaseException as error:  # noqa: BLE001 - raised in the task below
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        thread.join(PROGRESS_S)
        yield done[-1]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    yield outcome[0]


@ray.remote(num_returns="streaming", max_retries=0)
def _score_task(
    blueprint: WorkerBlueprint, folder: Path, trials: list[TrialRecord], steps: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    worker = blueprint()
    test = worker.parts["test"]
    for rank, trial in enumerate(trials):
        home, step = folder / "trials" / trial.trial_id, steps[trial.trial_id]
        try:
            load_best(trial.config, worker, home, best_step=step)
        except CheckpointError as error:
            yield trial.trial_id, str(error)
            continue
        if trial.config.adapter.kind != "none":
            export(trial.config, worker, home)
        elif rank == 0:  # whole models are large: the first finalist's only, complete with its tokenizer
            load_tokenizer(blueprint.model).save_pretrained(export(trial.config, worker, home))
        stored = EvaluationLog.of_parts({"test": test})
        stored.add("test", step, worker.engine.score(0, test.tokens))
        stored.save(home / TEST_FILE)
        yield trial.trial_id, ""

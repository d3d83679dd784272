"""The two passes over pairs that run where trials run, as Ray tasks: the reference before, the test part after.

The driver may have no accelerator, so it loads no model. Both tasks tell how far they are.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from prefopt_ray.results.answer import TEST_FILE
from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.engine.loading import load_tokenizer
from prefopt_ray.engine.reference import Progress
from prefopt_ray.errors import CheckpointError, PrefoptError
from prefopt_ray.results.ledger import TrialRecord
from prefopt_ray.pairs.tokens import SweepData
from prefopt_ray.prepare import WorkerBlueprint
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.export import export, load_best

PROGRESS_S = 0.25

Reserved = dict[str, float]  # cpu, gpu


def reference_pass(
    blueprint: WorkerBlueprint, data: SweepData, *, cache: Path, reserved: Reserved, progress: Progress
) -> WorkerBlueprint:
    """The blueprint with reference log-probs: from the cache without a task, else by one. Raises ModelError."""
    known = blueprint.stored_reference(data, cache=cache)
    if known is not None:
        return replace(blueprint, parts=known)
    task = _reference_task.options(num_cpus=reserved["cpu"], num_gpus=reserved["gpu"])
    for reference in task.remote(blueprint, data, cache):
        message = task_value(reference)
        if isinstance(message, dict):
            return replace(blueprint, parts=message)
        progress(*message)
    raise RuntimeError("the reference pass ended without a result")


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
    blueprint: WorkerBlueprint, data: SweepData, cache: Path
) -> Iterator[tuple[int, int] | dict[str, ReferencedPairs]]:
    """(done, total) now and then, at last the parts."""
    latest: list[tuple[int, int]] = [(0, 1)]
    outcome: list[Any] = []

    def work() -> None:
        try:
            done = blueprint.with_reference(data, cache=cache, progress=lambda *point: latest.append(point))
            outcome.append(done.parts)
        except BaseException as error:  # noqa: BLE001 - raised in the task below
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        thread.join(PROGRESS_S)
        yield latest[-1]
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

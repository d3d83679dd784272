"""The two passes over pairs that run where trials run: the reference before, the test part after.

As Ray tasks, since a driver may have no accelerator and no room for a model; in this process where trials run on the
CPUs of this machine alone: a task's process would first import for seconds what this one has.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
from prefopt_ray.tuning.resources import trials_run_here

PROGRESS_S = 0.25
RETRIES = 2  # of a task whose process or machine is lost
LEAST_FORWARDS = 64  # of a task of the reference pass: fewer take less time than a new process that imports and loads

Reserved = dict[str, float]  # cpu, gpu

log = logging.getLogger(__name__)


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
    shares = [Share(number, count) for number in range(count)]
    heard: queue.Queue[tuple[int, int | dict[str, np.ndarray] | BaseException]] = queue.Queue()
    for share, messages in zip(shares, _scorings(blueprint, missing, shares, reserved=reserved), strict=True):
        threading.Thread(target=_forward, args=(messages, share.number, heard), daemon=True).start()
    done, scored = [0] * count, []
    total = sum(len(pairs) for pairs in missing.values())
    while len(scored) < count:
        number, message = heard.get()
        if isinstance(message, BaseException):
            raise message
        if isinstance(message, dict):
            scored.append(message)
        else:
            done[number] = message
            progress(sum(done), total)
    return blueprint.keeping_reference(data, scored, cache=cache)


def _scorings(
    blueprint: WorkerBlueprint, passes: Mapping[str, PairTokens], shares: list[Share], *, reserved: Reserved
) -> Iterator[Iterator[int | dict[str, np.ndarray]]]:
    """Each share's messages (see `_score_share`). The first is scored in this process where trials run on its cores:
    it has imported everything already."""
    here = blueprint.device == "cpu" and trials_run_here()
    if here:
        yield _score_share(blueprint, passes, shares[0])
    if here and len(shares) == 1:
        return
    task = ray.remote(_score_share).options(
        num_cpus=reserved["cpu"], num_gpus=reserved["gpu"], num_returns="streaming", max_retries=0
    )
    model, tokens = ray.put(blueprint), ray.put(passes)
    for share in shares[here:]:
        yield _retried(partial(task.remote, model, tokens, share))


def _forward(messages: Iterator[Any], number: int, heard: queue.Queue) -> None:
    """What a share says, or the error that ended it."""
    try:
        for message in messages:
            heard.put((number, message))
    except BaseException as error:  # noqa: BLE001 - raised by the one who listens
        heard.put((number, error))


def _shares(passes: Mapping[str, PairTokens], *, at_once: int, tokens: int) -> int:
    """As many as run at once, but none for less than some forward passes: each opens the model."""
    forwards = sum(int(shared_lengths(pairs).sum()) for pairs in passes.values()) // tokens
    return max(1, min(at_once, forwards // LEAST_FORWARDS))


def score_on_test(
    blueprint: ray.ObjectRef, folder: Path, trials: list[TrialRecord], *, steps: Mapping[str, int], reserved: Reserved
) -> Iterator[tuple[str, str]]:
    """Score each trial's checkpoint at its step (by trial id) on the test part and export it, as trials are computed.

    Yields (trial id, "") when that is stored, or (trial id, why not) for a checkpoint that cannot be read.
    """
    if reserved["gpu"] == 0 and trials_run_here():
        return _score_checkpoints(ray.get(blueprint), folder, trials, steps)
    task = ray.remote(_score_checkpoints).options(
        num_cpus=reserved["cpu"], num_gpus=reserved["gpu"], num_returns="streaming", max_retries=0
    )
    return _first_of_each(_retried(partial(task.remote, blueprint, folder, trials, steps)))


def _first_of_each(scored: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """A task that was begun again scores all trials again, to the same numbers; each is told once."""
    told: set[str] = set()
    for trial_id, problem in scored:
        if trial_id not in told:
            told.add(trial_id)
            yield trial_id, problem


def _retried(begin: Callable[[], Iterator[ray.ObjectRef]]) -> Iterator[Any]:
    """What a task yields; begun again when its process or machine is lost. Ray's own retries go on at the item where
    they stopped, and ours are not as many the second time."""
    for left in reversed(range(1 + RETRIES)):
        try:
            yield from map(task_value, begin())
            return
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            if not left:
                raise
            log.warning("a pass is begun again: %s", error)


def task_value(reference: ray.ObjectRef) -> Any:
    """What a task gave; an error that a person should read arrives as itself, not wrapped in Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PrefoptError):
            raise error.cause from error
        raise


def _score_share(
    blueprint: WorkerBlueprint, passes: Mapping[str, PairTokens], share: Share
) -> Iterator[int | dict[str, np.ndarray]]:
    """Pairs done now and then, at last the share's log-probs by pass."""
    done: list[int] = [0]
    outcome: list[Any] = []

    def work() -> None:
        try:
            engine = blueprint.open_engine()
            outcome.append(score_passes(engine, passes, share=share, progress=lambda pairs, of: done.append(pairs)))
        except BaseException as error:  # noqa: BLE001 - raised below
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(PROGRESS_S)
        yield done[-1]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    yield outcome[0]


def _score_checkpoints(
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

"""Training one trial: TrialState stepped from outside, and the short loop over it.

The loop is what a notebook uses:

    for report in train(config, worker):
        print(report.step, report.objective, report.verdict.headline)
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from prefopt_ray.train.state import TrialState
from prefopt_ray.train.worker import Worker, make_worker
from prefopt_ray.trial import EndState, Report, TrialConfig

__all__ = ["TrialState", "Worker", "make_worker", "train"]


def _never() -> bool:
    return False


def train(
    config: TrialConfig, worker: Worker, *, folder: Path | None = None, interrupted: Callable[[], bool] = _never
) -> Iterator[Report]:
    """Train one trial and yield a Report at every evaluation and at the end.

    With a `folder`, checkpoints and per-pair evaluations are kept there and a trial found there is
    continued; its last report is yielded once more. `interrupted` is asked at first and before every step: True
    checkpoints and returns without an end state.
    """
    trial = TrialState.open(config, worker, folder=folder)
    if interrupted():
        return  # nothing new to keep
    if trial.last_report is not None:
        yield trial.last_report
    elif trial.evaluation_due:
        yield _report(trial)
    trial.restart_clock()
    while trial.running:
        if interrupted():
            trial.save()
            return
        shortage = _step(trial, worker)
        if shortage:
            yield trial.end(EndState.OUT_OF_MEMORY, shortage)
        elif trial.evaluation_due or not trial.running:
            yield _report(trial)
            trial.restart_clock()


def _step(trial: TrialState, worker: Worker) -> str:
    """One optimizer step; what memory was short of, or nothing. The error and the tensors it holds end here."""
    try:
        worker.engine.step([trial])
    except torch.OutOfMemoryError as error:
        return _shortage(error)
    return ""


def _report(trial: TrialState) -> Report:
    """The report that is due; evaluating and sampling can run out of memory too."""
    try:
        return trial.report()
    except torch.OutOfMemoryError as error:
        shortage = _shortage(error)
    return trial.end(EndState.OUT_OF_MEMORY, shortage)


def _shortage(error: torch.OutOfMemoryError) -> str:
    return (str(error).strip().splitlines() or ["out of memory"])[0]

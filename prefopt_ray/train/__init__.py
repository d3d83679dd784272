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
    continued; its last report is yielded once more. `interrupted` is asked between steps: True
    checkpoints and returns without an end state.
    """
    trial = TrialState.open(config, worker, folder=folder)
    if trial.last_report is not None:
        yield trial.last_report
    elif trial.evaluation_due:
        yield trial.report()
    while trial.running:
        if interrupted():
            trial.save()
            return
        try:
            worker.engine.step([trial])
        except torch.OutOfMemoryError as error:
            yield trial.end(EndState.OUT_OF_MEMORY, str(error).splitlines()[0])
            return
        if trial.evaluation_due or not trial.running:
            yield trial.report()

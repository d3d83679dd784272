"""A judge inside every trial, wherever completions are sampled: never longer than its time limit.

A judge that is late or out of order costs a trial that evaluation's win rate, and nothing else. Knows no trial.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefopt_ray.judges.base import Judge, Prompt
from prefopt_ray.judges.opening import open_judge
from prefopt_ray.judges.tournament import compare
from prefopt_ray.spec.sections import JudgeSpec
from prefopt_ray.train.scorers import Completion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RungJudgePlan:
    """What a worker process needs to open its judge; `prompts` are those that trials sample, in their order."""

    spec: JudgeSpec
    prompts: tuple[Prompt, ...]
    storage: Path

    def open(self, *, device: str) -> "RungJudge":
        """Raises JudgeError."""
        judge = open_judge(self.spec, storage=self.storage, device=device)
        return RungJudge(judge, self.prompts, time_limit_s=self.spec.time_limit_s)


class RungJudge:
    """A SampleJudge (see train.evaluate). Its metrics are named `judge/...` whoever judges."""

    name = "judge"

    def __init__(self, judge: Judge, prompts: Sequence[Prompt], *, time_limit_s: float) -> None:
        self._judge = judge
        self._prompts = prompts
        self._time_limit_s = time_limit_s
        self._thread: threading.Thread | None = None

    def outcomes(self, policy: Sequence[Completion], reference: Sequence[Completion]) -> np.ndarray:
        """(M,) 1 = the policy's completion is better, .5 tie, 0; NaN where there is no verdict, or none in time."""
        nothing = np.full(len(policy), np.nan)
        if self._thread is not None and self._thread.is_alive():
            log.warning("the judge %s is still busy with an earlier evaluation: this one has no win rate",
                        self._judge.name)
            return nothing
        work = _Work(self._judge, self._prompts, policy, reference, deadline=time.monotonic() + self._time_limit_s)
        # A thread of its own: a person's function cannot be told to stop, so it is left behind.
        self._thread = threading.Thread(target=work.run, name="judge", daemon=True)
        self._thread.start()
        self._thread.join(self._time_limit_s)
        if self._thread.is_alive() or isinstance(work.error, _TooLate):
            log.warning("the judge %s was not ready in %g s; this evaluation has no win rate", self._judge.name,
                        self._time_limit_s)
            return nothing
        if isinstance(work.error, Exception):
            log.warning("this evaluation has no win rate: %s: %s", type(work.error).__name__, work.error)
            return nothing
        if work.error is not None:
            raise work.error
        return work.found


class _TooLate(Exception):
    """Raised inside the judge's own progress, where it can stop."""


class _Work:
    def __init__(
        self, judge: Judge, prompts: Sequence[Prompt], policy: Sequence[Completion], reference: Sequence[Completion],
        *, deadline: float,
    ) -> None:
        self._judge, self._prompts = judge, prompts
        self._policy, self._reference, self._deadline = policy, reference, deadline
        self.found = np.full(len(policy), np.nan)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            outcomes = compare(self._judge, self._prompts, [(self._policy, self._reference)], advance=self._advance)
            self.found = outcomes.values[0]
        except BaseException as error:  # noqa: BLE001 - the trial's own thread looks at it
            self.error = error

    def _advance(self, done: int) -> None:
        if time.monotonic() > self._deadline:
            raise _TooLate

"""The trial as a Ray Tune trainable: a thin handle around `train`, on a worker that stays warm.

The worker (base model, pairs, reference) is opened once per process; a new trial rebuilds adapter,
optimizer and seeds only. A trial lives in its own folder and continues from there, whoever starts it.
Exceptions of a trial become its reason, not the sweep's end.
"""

import json
import logging
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray._private.state import state
from ray.exceptions import RayActorError

from prefopt_ray.results.ledger import stop_requested
from prefopt_ray.train import Worker, train
from prefopt_ray.train.state import WORST
from prefopt_ray.trial import Report, TrialConfig

STOP_POLL_S = 0.2  # the command folder may be on a network filesystem
NODE_POLL_S = 5.0  # a cloud gives two minutes' notice or less

log = logging.getLogger(__name__)


class PreferenceTrainable(tune.Trainable):
    """One trial. `config` holds `trial_id`, `trial` (TrialConfig.to_dict()) and `folder`, or None for no files;
    at its evaluations of the steps in `holds`, if given, it leaves its process to others until it is ordered again.

    A result is {"report": Report | None, "placement": JSON, "paused": bool, "failure": str, "done": bool} and,
    for Ray's own schedulers, searchers, loggers and tables, flat values of the newest report: the finite numbers
    `step` and `objective/current|best_so_far|best_step`, which are in every result, `verdict` and every metric.
    Give `open_worker` (anything that makes a Worker, such as a WorkerBlueprint) through
    `ray.tune.with_parameters`, or in the config when it is used without Tune.
    """

    def setup(self, config: dict[str, Any], open_worker: Callable[[], Worker] | None = None) -> None:
        self._worker = (open_worker or config["open_worker"])()
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._next_look = 0.0
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            report = self._last = next(self._reports)
        except StopIteration:
            if self._leaving:
                # As Ray tells it when the machine has gone: tried again elsewhere, and not counted as the trial's fault.
                raise RayActorError(error_msg="its machine is being taken away", preempted=True) from None
            return self._result(paused=True)
        except Exception as error:
            # Whatever a trial dies of is its row's reason. A broken device breaks every later trial of this process
            # too: that, like the death of the process, is Ray's to handle, with a new process and bounded retries.
            if _is_device_error(error):
                raise
            return self._result(failure=self._record_failure())
        held = report.step in self._holds and report.end_state is None
        if held:
            self._reports.close()  # it is checkpointed; another process may be the one that continues it
        return self._result(report, held=held)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: trials keep their own checkpoints, in their own folder."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing, see `save_checkpoint`."""

    def cleanup(self) -> None:
        self._reports.close()

    def _start(self, config: dict[str, Any]) -> None:
        folder = config.get("folder")
        self._folder = Path(folder) if folder else None
        self._holds = frozenset(config.get("holds", ()))
        self._next_poll, self._stop, self._leaving = 0.0, False, False
        self._last: Report | None = None
        self._reports: Iterator[Report] = train(
            TrialConfig.from_dict(config["trial"]), self._worker, folder=self._folder, interrupted=self._interrupted
        )

    def _interrupted(self) -> bool:
        now = time.monotonic()
        if self._folder is not None and now >= self._next_poll:
            self._next_poll = now + STOP_POLL_S
            self._stop = stop_requested(self._folder.parent.parent)
        if self._folder is not None and self._node and now >= self._next_look:
            self._next_look = now + NODE_POLL_S
            self._leaving = not self._stop and self._node in state.get_draining_nodes()
        return self._stop or self._leaving

    def _placement(self) -> dict[str, Any]:
        """Where and how it is computed: execution plan (complete once a trial has opened), process, machine, Ray's node."""
        where = {"pid": os.getpid(), "host": platform.node(), "node": self._node}
        gpus = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0) if self._node else 0.0
        return {**self._worker.engine.plan_of(0).to_dict(), **where, "gpus": gpus}

    def _record_failure(self) -> str:
        text = traceback.format_exc()
        log.error("trial failed: %s", text)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "error.txt").write_text(text)
        return text.strip().splitlines()[-1]

    def _result(
        self, report: Report | None = None, *, held: bool = False, paused: bool = False, failure: str = ""
    ) -> dict[str, Any]:
        """`report` is the new one, if any; the numbers are of the newest there is, so that they never go missing."""
        last = self._last
        ended = report is not None and report.end_state is not None
        return {
            "report": report,
            "placement": json.dumps(self._placement()),
            "paused": paused,
            "failure": failure,
            "done": bool(ended or held or paused or failure),
            "step": last.step if last else 0,
            "objective/current": last.objective if last and not failure else WORST,
            "objective/best_so_far": last.best_so_far if last else WORST,
            "objective/best_step": last.best_step if last else -1,
            "verdict": last.verdict.headline if last else "",
            **(last.metrics if last else {}),
        }


def _is_device_error(error: Exception) -> bool:
    """A CUDA context that is lost for good; being out of memory is not, and is caught where it happens."""
    return isinstance(error, RuntimeError) and ("CUDA error" in str(error) or "CUBLAS_STATUS" in str(error))

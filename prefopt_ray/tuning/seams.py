"""Where Ray Tune calls in: a searcher, a scheduler and a callback that only pass words to the SweepDriver.

Tune pickles them into its own folder; ours pickle to nothing, since a sweep is rebuilt from the ledger
and Tune's state is never read back.
"""

import json
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from prefopt_ray.tuning.driver import SweepDriver


class DriverSearcher(Searcher):
    """Asks the driver for the next trial."""

    def __init__(self, driver: SweepDriver) -> None:
        super().__init__(metric=None, mode=None)
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        order = self._driver.next_order()
        if order is None:
            return None if self._driver.more_may_come else Searcher.FINISHED
        return order.ray_config()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the scheduler hears of every end."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save, see the module."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its ledger")

    def __reduce__(self) -> tuple[type, tuple]:
        return _Absent, ()


class DriverScheduler(FIFOScheduler):
    """Passes results to the driver and its decisions back."""

    def __init__(self, driver: SweepDriver) -> None:
        super().__init__()
        self._driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self._driver.placed(trial.config["trial_id"], json.loads(result["placement"]))
        keep = self._driver.take(trial.config["trial_id"], result["report"])
        return TrialScheduler.CONTINUE if keep else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        trial_id = trial.config["trial_id"]
        if result.get("failure"):
            self._driver.failed(trial_id, result["failure"])
        elif result.get("paused"):
            self._driver.paused(trial_id)
        elif result.get("report") is not None:
            self._driver.placed(trial_id, json.loads(result["placement"]))
            self._driver.take(trial_id, result["report"])

    def __reduce__(self) -> tuple[type, tuple]:
        return _Absent, ()


class DriverCallback(tune.Callback):
    """Tells the driver of trials that Tune gives up. (The scheduler hears of every death, also of those retried.)"""

    def __init__(self, driver: SweepDriver) -> None:
        self._driver = driver

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._driver.failed(trial.config["trial_id"], _death(trial))

    def __reduce__(self) -> tuple[type, tuple]:
        return _Absent, ()


class _Absent:
    """What a driver's seams unpickle to: nothing that could be used by mistake."""


def _death(trial: Trial) -> str:
    """The last line of what Ray knows about a dead process."""
    lines = [line for line in str(trial.get_error() or "process died").strip().splitlines() if line.strip()]
    return lines[-1].strip()

"""What a sweep has spent of its budget: by its ledger before this session, by the clock within it."""

import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from prefopt_ray.results.ledger import SESSION, SweepRecord
from prefopt_ray.spec.sections import BudgetSpec


class Meter:
    """Asked several times a second while trials run."""

    def __init__(self, budget: BudgetSpec, sweep: SweepRecord, *, earlier_s: float) -> None:
        """`earlier_s`: what earlier sessions took (see `sessions_s`)."""
        self._budget, self._sweep = budget, sweep
        self._began, self._earlier = time.monotonic(), earlier_s
        self._seen: dict[str, tuple[int, float]] = {}  # trial -> newest step, when it was first seen

    def used_up(self) -> str:
        """The limit that is reached, in words; empty while none is."""
        hours, seconds = self._budget.gpu_hours, self._budget.wall_clock
        if seconds is not None and self._earlier + time.monotonic() - self._began >= seconds:
            return f"budget: {seconds / 3600:.3g} hours on the wall are spent"
        if hours is not None and self._gpu_hours() >= hours:
            return f"budget: {hours:.3g} GPU-hours are spent"
        return ""

    def _gpu_hours(self) -> float:
        """Reported seconds, and those since a running trial's newest report, by the GPUs that each reserves."""
        total = 0.0
        for trial in list(self._sweep.trials.values()):
            step = trial.last.step if trial.last else -1
            if self._seen.get(trial.trial_id, (None, 0.0))[0] != step:
                self._seen[trial.trial_id] = step, time.monotonic()
            since = time.monotonic() - self._seen[trial.trial_id][1] if trial.state == "running" else 0.0
            total += ((trial.last.seconds if trial.last else 0.0) + since) * trial.placement.get("gpus", 0.0)
        return total / 3600


def sessions_s(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds from the first to the last event of every session; what lies between sessions does not count."""
    return sum(
        max(0.0, later["at"] - event["at"]) for event, later in pairwise(events) if later["event"] != SESSION
    )

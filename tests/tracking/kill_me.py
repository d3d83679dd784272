"""Run as a process by the kill -9 test: tracks a sweep until it is killed. Arguments: the URI and the sweep folder."""

import sys
import time
from pathlib import Path

from tracking_cases import report, trial_config

from prefopt_ray.tracking.delivery import TrackingSettings
from prefopt_ray.tracking.runs import SweepIdentity, SweepTracker


def main(uri: str, folder: str) -> None:
    tracker = SweepTracker(
        TrackingSettings(uri, "exp"), SweepIdentity("s1", "demo", Path(folder)), on_run_created=lambda key, run_id: None
    )
    tracker.start("a: 1\n", {}, [])
    for number in range(3):
        tracker.trial_started(f"t{number}", trial_config(), number=number)
    for step in range(10, 10_000, 10):
        for number in range(3):
            tracker.report(f"t{number}", report(step))
        print(step, flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])

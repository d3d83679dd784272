"""A driver over a sweep folder and a machine that plays Ray: runs what is ordered, reports drawn gains, no cluster."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sweep_folder import VERDICT, report
from tiny import trial_config

from prefopt_ray.results.configurations import configurations
from prefopt_ray.results.ledger import Ledger, SweepRecord, read_events, read_sweep
from prefopt_ray.tracking.delivery import TrackingSettings
from prefopt_ray.tracking.runs import SweepIdentity, SweepTracker
from prefopt_ray.trial import EndState, Report
from prefopt_ray.tuning.driver import ConfirmRun, Replicas, SweepDriver, TrialOrder
from prefopt_ray.tuning.rungs import StopRule, SuccessiveHalving
from prefopt_ray.tuning.search import Listed, Point

POINTS = [Point("sigmoid", {"beta": b, "learning_rate": 1e-3}, baseline=b == 0.1) for b in (0.1, 0.2, 0.3, 0.4)]
STEPS, RUNGS, LAST = (1, 2, 4, 8), (2, 4), 8
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # every ledger line is synced, which a disk takes time for
GainOf = Callable[[float, int, int], float]  # (beta, seed, step) -> gain


class Told(Listed):
    """A list that remembers what it is told: what a searcher would see."""

    def __init__(self, points: list[Point], *, done: int) -> None:
        super().__init__(points, done=done)
        self.told: list[tuple[float, float]] = []

    def tell(self, point: Point, score: float) -> None:
        self.told.append((point.values["beta"], score))


class Session:
    """A driver over a sweep folder, as one run or one resume has it. The tracker's server is never reached."""

    def __init__(
        self, folder: Path, *, replicas: Replicas, plan: Callable[[SweepRecord], list[ConfirmRun]] | None = None,
        rule: StopRule | None = None, points: Sequence[Point] = POINTS,
    ) -> None:
        new = not (folder / "ledger.jsonl").exists()
        self.ledger = Ledger(folder / "ledger.jsonl")
        if new:
            self.ledger.append("sweep", format=1, sweep_id="cafe", name="made", spec_hash="0", facts={})
        sweep = SweepRecord(folder) if new else read_sweep(folder)
        self.tracker = SweepTracker(
            TrackingSettings("http://127.0.0.1:9", "made"), SweepIdentity("cafe", "made", folder),
            on_run_created=lambda *_: None,
        )
        self.proposer = Told(list(points), done=len(configurations(sweep)))
        self.driver = SweepDriver(
            sweep, ledger=self.ledger, tracker=self.tracker, proposer=self.proposer,
            rule=rule or SuccessiveHalving(RUNGS, 2), within_loss=True, stopping=lambda: False, replicas=replicas,
            make_config=lambda point, seed: trial_config(params={"beta": point.values["beta"]}, seed=seed),
            plan_confirmation=plan,
        )

    def close(self) -> None:
        self.ledger.close()
        self.tracker.close(0.01)


class Machine:
    """Plays Ray with some slots: runs ordered trials step by step, in an order drawn from a seed."""

    def __init__(self, session: Session, gain: GainOf, *, slots: int = 2, seed: int = 0) -> None:
        self.driver, self.gain, self.slots = session.driver, gain, slots
        self.rng = np.random.default_rng(seed)
        self.running: list[TrialOrder] = []
        self.seen: list[TrialOrder] = []
        self.ordered: list[str] = []

    def run(self, *, reports: int = 10_000) -> None:
        """Until there is nothing more to do, or so many reports were taken."""
        for _ in range(reports):
            self._fill()
            if not self.running:
                assert not self.driver.more_may_come, "everybody waits and nobody runs"
                return
            self._step(self.running[int(self.rng.integers(len(self.running)))])

    def _fill(self) -> None:
        while len(self.running) < self.slots and (order := self.driver.next_order()):
            self.running.append(order)
            self.ordered.append(order.trial_id)

    def _step(self, order: TrialOrder) -> None:
        """The trial's next evaluation; one that is continued says its last one again, as real ones do."""
        trial = self.driver.sweep.trials[order.trial_id]
        again = trial.last.step if trial.last and not any(order is seen for seen in self.seen) else None
        self.seen.append(order)
        length = order.config.training.stop_step
        step = again or next(s for s in (*STEPS, length) if s > (trial.last.step if trial.last else 0))
        made = made_report(self._curve(order, step), step, end=step == length)
        goes_on = self.driver.take(order.trial_id, made)
        held = step in order.holds
        assert not (goes_on and held)
        if not goes_on or held:
            self.running.remove(order)

    def _curve(self, order: TrialOrder, step: int) -> float:
        return self.gain(order.config.loss_params["beta"], order.config.seed, step)


def made_report(gain: float, step: int, *, end: bool) -> Report:
    made = vars(report(gain, step=step))
    ending = {"end_state": EndState.COMPLETED, "reason": "all steps"} if end else {}
    return Report(**{**made, "verdict": VERDICT, **ending})


def decisions(folder: Path) -> list[dict]:
    return [event for event in read_events(folder / "ledger.jsonl") if event["event"] == "decision"]

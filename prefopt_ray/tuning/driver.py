"""The driver of a sweep: proposes trials, takes their reports, decides, and writes everything down.

Every event goes to the ledger first, then to MLflow's journal. Ray only calls in from outside (see
`seams`), so a sweep is rebuilt by replaying the ledger into a new driver, and tests need no cluster.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt_ray.ledger import Ledger, SweepRecord, TrialRecord, drift_per_token
from prefopt_ray.tracking.runs import SweepTracker
from prefopt_ray.trial import EndState, Report, TrialConfig
from prefopt_ray.tuning.rungs import Arrival, StopRule
from prefopt_ray.tuning.search import Point, Proposer

MAX_PROCESS_DEATHS = 2  # a trial whose process dies is continued twice, then it is a failed row


@dataclass(frozen=True)
class TrialOrder:
    """What a worker needs to know to run one trial."""

    trial_id: str
    config: TrialConfig
    folder: Path

    def ray_config(self) -> dict[str, Any]:
        return {"trial_id": self.trial_id, "trial": self.config.to_dict(), "folder": str(self.folder)}


class SweepDriver:
    """One sweep's decisions. `sweep` is its record so far, empty or read from a ledger."""

    def __init__(
        self,
        sweep: SweepRecord,
        *,
        ledger: Ledger,
        tracker: SweepTracker,
        proposer: Proposer,
        rule: StopRule,
        make_config: Callable[[Point], TrialConfig],
        within_loss: bool,
        stopping: Callable[[], bool],
    ) -> None:
        self.sweep = sweep
        self._ledger, self._tracker = ledger, tracker
        self._proposer, self._rule = proposer, rule
        self._make_config = make_config
        self._within_loss = within_loss
        self._stopping = stopping
        self._points: dict[str, Point] = {}
        self._unfinished = self._replay()

    # -- what Ray asks -----------------------------------------------------------------------------

    def next_order(self) -> TrialOrder | None:
        """The next trial to run: unfinished ones of an earlier session first, then new points."""
        if self._stopping():
            return None
        if self._unfinished:
            return self._resume(self._unfinished.pop(0))
        point = self._proposer.propose()
        return self._create(point) if point else None

    def take(self, trial_id: str, report: Report) -> bool:
        """Record a report; True = go on. Reports sent again after a resume change nothing."""
        trial = self.sweep.trials[trial_id]
        if trial.end_state is not None:
            return False
        if report.step not in trial.reports or (report.end_state and not trial.reports[report.step].end_state):
            trial.reports[report.step] = report
            trial.paused = False
            self._ledger.append("report", trial=trial_id, report=report.to_dict())
            self._tracker.report(trial_id, report)
        if report.end_state is not None:
            self._end(trial, report.end_state, report.reason)
            return False
        return self._decide(trial, report)

    def placed(self, trial_id: str, placement: Mapping[str, Any]) -> None:
        """Where a trial is computed and by which plan; written once per process it runs in."""
        trial = self.sweep.trials[trial_id]
        if trial.placement != placement:
            trial.placement = dict(placement)
            self._ledger.append("placed", trial=trial_id, placement=trial.placement)

    def paused(self, trial_id: str) -> None:
        """The trial has checkpointed because the sweep was asked to stop."""
        trial = self.sweep.trials[trial_id]
        if trial.end_state is None:
            trial.paused = True
            self._ledger.append("paused", trial=trial_id)
            self._tracker.trial_paused(trial_id)

    def failed(self, trial_id: str, reason: str) -> None:
        """The trial raised, or its process died too often."""
        trial = self.sweep.trials[trial_id]
        if trial.end_state is None:
            self._end(trial, EndState.FAILED, reason)

    # -- inside ------------------------------------------------------------------------------------

    def _create(self, point: Point) -> TrialOrder:
        number = len(self.sweep.trials)
        trial_id = f"{number:04d}"
        trial = TrialRecord(trial_id, number, dict(point.values), self._make_config(point), point.baseline)
        self.sweep.trials[trial_id] = trial
        self._points[trial_id] = point
        self._ledger.append(
            "trial", trial=trial_id, number=number, values=trial.values, baseline=point.baseline,
            config=trial.config.to_dict(),
        )
        self._track(trial)
        return self._order(trial)

    def _resume(self, trial: TrialRecord) -> TrialOrder:
        trial.paused = False
        self._track(trial)
        self._tracker.trial_resumed(trial.trial_id)
        return self._order(trial)

    def _track(self, trial: TrialRecord) -> None:
        tags = {"baseline": "true"} if trial.baseline else {}
        self._tracker.trial_started(
            trial.trial_id, trial.config, number=trial.number, run_id=trial.run_id, tags=tags
        )

    def _order(self, trial: TrialRecord) -> TrialOrder:
        return TrialOrder(trial.trial_id, trial.config, self.sweep.folder / "trials" / trial.trial_id)

    def _decide(self, trial: TrialRecord, report: Report) -> bool:
        if report.step == 0 or any(d.rung == report.step for d in trial.decisions):
            return True
        decision = self._rule.decide(self._arrival(trial, step=report.step, value=report.best_so_far))
        if decision is None:
            return True
        trial.decisions.append(decision)
        self._ledger.append("decision", trial=trial.trial_id, decision=asdict(decision))
        if decision.keep:
            return True
        self._end(trial, EndState.STOPPED_EARLY, stop_reason(decision.rung, decision.value, cutoff=decision.cutoff,
                                                             recorded=decision.recorded, rule=decision.reason))
        return False

    def _arrival(self, trial: TrialRecord, *, step: int, value: float) -> Arrival:
        group = trial.config.loss if self._within_loss else "all"
        return Arrival(trial.trial_id, trial.number, group, step, value, protected=trial.baseline)

    def _end(self, trial: TrialRecord, end_state: EndState, reason: str) -> None:
        trial.end_state, trial.reason, trial.paused = end_state, reason, False
        self._ledger.append("end", trial=trial.trial_id, end_state=end_state, reason=reason)
        self._track_end(trial)
        if trial.trial_id in self._points:
            self._proposer.tell(self._points[trial.trial_id], trial.score)

    def _track_end(self, trial: TrialRecord) -> None:
        self._tracker.trial_ended(
            trial.trial_id, trial.last, trial.end_state, reason=trial.reason, headline=headline_values(trial),
            tags={"unopposed": "true"} if trial.unopposed else {},
        )

    def _replay(self) -> list[TrialRecord]:
        """Tell rule and proposer what the ledger knows; the trials left to finish, oldest first."""
        unfinished = []
        for trial in self.sweep.trials.values():
            self._points[trial.trial_id] = Point(trial.config.loss, trial.values, baseline=trial.baseline)
            for decision in trial.decisions:
                self._rule.replay(self._arrival(trial, step=decision.rung, value=decision.value))
            refused = next((d for d in trial.decisions if not d.keep), None)
            if trial.end_state is not None:
                if not self._tracker.has_ended(trial.trial_id):  # killed between ledger and journal
                    self._track(trial)
                    self._track_end(trial)
                self._proposer.tell(self._points[trial.trial_id], trial.score)
            elif refused is not None:
                self._track(trial)
                self._end(trial, EndState.STOPPED_EARLY, stop_reason(
                    refused.rung, refused.value, cutoff=refused.cutoff, recorded=refused.recorded, rule=refused.reason
                ))
            elif trial.last is not None and trial.last.end_state is not None:
                self._track(trial)
                self._end(trial, trial.last.end_state, trial.last.reason)
            else:
                unfinished.append(trial)
        return unfinished


def stop_reason(rung: int, value: float, *, cutoff: float | None, recorded: int, rule: str) -> str:
    """One line for tables: where, why, by how much."""
    if cutoff is None:
        return f"step {rung}: {rule}"
    return f"rung at step {rung}: gain {value:.4f} {rule} {cutoff:.4f} ({recorded} there)"


def headline_values(trial: TrialRecord) -> Mapping[str, float]:
    """The numbers of a trial that MLflow's table shows, slash-free. Only what is known and finite."""
    values: dict[str, float] = {"score": trial.score, "nonfinite_steps": trial.last.nonfinite if trial.last else 0}
    best = trial.reports.get(trial.best_step)
    if best is not None:
        values |= {"best_step": trial.best_step, "best_gain": trial.score}
        values["best_accuracy"] = best.metrics["eval/rewards/accuracy"]
    evaluated = [r for r in trial.reports.values() if "eval/drift/chosen" in r.metrics]
    if evaluated:
        values["final_drift"] = drift_per_token(evaluated[-1].metrics)
    sampled = [r for r in trial.reports.values() if "samples/kl" in r.metrics]
    if sampled:
        values["final_kl"] = sampled[-1].metrics["samples/kl"]
    if trial.last is not None and trial.last.verdict.onset_step is not None:
        values["onset_step"] = trial.last.verdict.onset_step
    return {name: value for name, value in values.items() if math.isfinite(value)}

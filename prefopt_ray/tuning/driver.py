"""The driver of a sweep: proposes trials, takes their reports, decides, and writes everything down.

Every event goes to the ledger first, then to MLflow's journal. Ray only calls in from outside (see
`seams`), so a sweep is rebuilt by replaying the ledger into a new driver, and tests need no cluster.

Seeds of one configuration are trials of their own. At a rung the configuration is judged once, by the mean over
its seeds, when all that still run are there: those that come first leave their process to other trials meanwhile
(a checkpoint and 20 ms to come back; Tune's PAUSE would hold the process). Until the first seed has passed
`Replicas.from_step` it is alone, and judged alone.

A configuration that the rule pauses waits in the same way, until the rule calls it back for a free slot. Those still
paused when nothing else is left to do have ended there: stopped_early.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefopt_ray.results.configurations import Configuration, configuration_of, configurations
from prefopt_ray.results.ledger import CONFIRM, SEARCH, Decision, Ledger, SweepRecord, TrialRecord, drift_per_token
from prefopt_ray.tracking.runs import SweepTracker
from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.trial import EndState, Report, TrialConfig
from prefopt_ray.tuning.rungs import Arrival, StopRule
from prefopt_ray.tuning.search import Point, Proposer

MAX_PROCESS_DEATHS = 2  # a trial whose process dies is continued twice, then it is a failed row
# A first seed that ended so is no reason to pay for others.
_WORTHLESS = (EndState.DIVERGED, EndState.OUT_OF_MEMORY, EndState.FAILED, EndState.STOPPED_BY_USER)


@dataclass(frozen=True)
class TrialOrder:
    """What a worker needs to know to run one trial."""

    trial_id: str
    config: TrialConfig
    folder: Path
    holds: tuple[int, ...] = ()  # steps where it leaves its process and waits for other seeds

    def ray_config(self) -> dict[str, Any]:
        return {
            "trial_id": self.trial_id, "trial": self.config.to_dict(), "folder": str(self.folder),
            "holds": list(self.holds),
        }


@dataclass(frozen=True)
class Replicas:
    """The seeds of every configuration, and the step its first one must pass before the others start (0 = none)."""

    seeds: tuple[int, ...]
    from_step: int = 0


@dataclass(frozen=True)
class ConfirmRun:
    """One run of the confirmation: a searched configuration with a fresh seed, to exactly its selected length."""

    searched: Configuration
    config: TrialConfig


class SweepDriver:
    """One sweep's decisions. `sweep` is its record so far, empty or read from a ledger.

    `make_config` is told a point and a seed. `plan_confirmation` is asked once, when the search is over.
    """

    def __init__(
        self,
        sweep: SweepRecord,
        *,
        ledger: Ledger,
        tracker: SweepTracker,
        proposer: Proposer,
        rule: StopRule,
        make_config: Callable[[Point, int], TrialConfig],
        replicas: Replicas,
        within_loss: bool,
        stopping: Callable[[], bool],
        plan_confirmation: Callable[[SweepRecord], Sequence[ConfirmRun]] | None = None,
    ) -> None:
        self.sweep = sweep
        self._ledger, self._tracker = ledger, tracker
        self._proposer, self._rule = proposer, rule
        self._make_config, self._replicas = make_config, replicas
        self._plan_confirmation = plan_confirmation
        self._confirm_runs: Sequence[ConfirmRun] | None = None
        self._within_loss = within_loss
        self._stopping = stopping
        self._points: dict[str, Point] = {}  # by configuration
        self._told: set[str] = set()  # configurations whose score the proposer knows
        self._concluded: set[str] = set()  # those that have ended
        self._holds: dict[str, tuple[int, ...]] = {}  # by trial, of its latest order
        self._unfinished: list[TrialRecord] = []
        self._replay()

    # -- what Ray asks -----------------------------------------------------------------------------

    def next_order(self) -> TrialOrder | None:
        """The next trial to run: unfinished ones first, then further seeds, those called back by the rule, new points,
        those that only wait for a search that has nothing else to do, and the confirmation.
        """
        if self._stopping():
            return None
        if self._unfinished:
            return self._resume(self._unfinished.pop(0))
        for configuration in configurations(self.sweep):
            for seed in self._missing_seeds(configuration)[:1]:
                return self._next_seed(configuration, seed)
        if self._call_back():
            return self.next_order()
        point = self._proposer.propose()
        if point:
            return self._first_seed(point)
        if self._search_runs and not self._running:
            self._rule.exhausted()
            if not self._call_back():
                self._end_paused()
            return self.next_order()
        return self._next_confirmation()

    @property
    def more_may_come(self) -> bool:
        """Whether `next_order`, which gave nothing, may give a trial once those that run have gone on."""
        return self._search_runs and not self._stopping()

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
        if report.step == 0 or trial.role == CONFIRM:
            return True
        return self._decide(trial, report.step)

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

    def end_all(self, reason: str) -> None:
        """Nothing more will be paid for: whatever has not ended, ends here."""
        for trial in list(self.sweep.trials.values()):
            if trial.end_state is None:
                self._end(trial, EndState.STOPPED_EARLY, reason)

    def failed(self, trial_id: str, reason: str) -> None:
        """The trial raised, or its process died too often."""
        trial = self.sweep.trials[trial_id]
        if trial.end_state is None:
            self._end(trial, EndState.FAILED, reason)

    # -- orders ------------------------------------------------------------------------------------

    def _first_seed(self, point: Point) -> TrialOrder:
        config = self._make_config(point, self._replicas.seeds[0])
        order = self._create(point.values, config, baseline=point.baseline)
        self._points[order.trial_id] = point
        return order

    def _next_seed(self, configuration: Configuration, seed: int) -> TrialOrder:
        point = self._points[configuration.key]
        config = self._make_config(point, seed)
        return self._create(point.values, config, baseline=point.baseline, configuration=configuration.key)

    def _next_confirmation(self) -> TrialOrder | None:
        if self._plan_confirmation is None or self._search_runs:
            return None
        if self._confirm_runs is None:  # the search is over, so this is the same list in every session
            self._confirm_runs = self._plan_confirmation(self.sweep)
        known = {(t.configuration, t.seed) for t in self.sweep.trials.values() if t.role == CONFIRM}
        for run in self._confirm_runs:
            key, first = run.searched.key, run.searched.first
            if (key, run.config.seed) not in known:
                return self._create(
                    first.values, run.config, baseline=first.baseline, configuration=key, role=CONFIRM
                )
        return None

    def _create(
        self, values: Mapping[str, float], config: TrialConfig, *, baseline: bool, configuration: str | None = None,
        role: str = SEARCH,
    ) -> TrialOrder:
        number = len(self.sweep.trials)
        trial_id = f"{number:04d}"
        trial = TrialRecord(
            trial_id, number, dict(values), config, baseline, configuration=configuration or trial_id, role=role
        )
        self.sweep.trials[trial_id] = trial
        self._ledger.append(
            "trial", trial=trial_id, number=number, values=trial.values, baseline=baseline,
            configuration=trial.configuration, role=role, config=trial.config.to_dict(),
        )
        self._track(trial)
        return self._order(trial)

    def _resume(self, trial: TrialRecord) -> TrialOrder:
        trial.paused = False
        self._track(trial)
        self._tracker.trial_resumed(trial.trial_id)
        return self._order(trial)

    def _track(self, trial: TrialRecord) -> None:
        tags = {"configuration": trial.configuration, "seed": str(trial.seed), "role": trial.role}
        tags |= {"baseline": "true"} if trial.baseline else {}
        self._tracker.trial_started(
            trial.trial_id, trial.config, number=trial.number, run_id=trial.run_id, tags=tags
        )

    def _order(self, trial: TrialRecord) -> TrialOrder:
        folder = self.sweep.folder / "trials" / trial.trial_id
        holds = self._holds[trial.trial_id] = self._waiting_steps(trial)
        return TrialOrder(trial.trial_id, trial.config, folder, holds)

    def _waiting_steps(self, trial: TrialRecord) -> tuple[int, ...]:
        """The rungs where it may have to wait. The first seed waits for nobody before the others are there."""
        if trial.role == CONFIRM or len(self._replicas.seeds) == 1:
            return ()
        alone_until = self._replicas.from_step if trial.trial_id == trial.configuration else 0
        configuration = configuration_of(self.sweep, trial)
        return tuple(r for r in self._rule.rungs if r > alone_until and configuration.decision(r) is None)

    # -- seeds of one configuration ----------------------------------------------------------------

    def _missing_seeds(self, configuration: Configuration) -> list[int]:
        """Seeds that are to be trained and have no trial yet."""
        if not self._is_past_start(configuration):
            return []
        started = {trial.seed for trial in configuration.trials}
        return [seed for seed in self._replicas.seeds if seed not in started]

    def _is_past_start(self, configuration: Configuration) -> bool:
        """Whether the first seed has passed the step where the others start, a rung at that step included."""
        first, start = configuration.first, self._replicas.from_step
        if first.end_state in _WORTHLESS:
            return False
        if start == 0 or first.end_state in (EndState.COMPLETED, EndState.STOPPED_OVERFIT):
            return True
        reached = max(first.reports, default=0)
        if reached == start and start in self._rule.rungs:
            decision = configuration.decision(start)
            return decision is not None and decision.keep
        return reached >= start

    @property
    def _search_runs(self) -> bool:
        """Whether a trial of the search has not ended, though it may be waiting."""
        return any(t.end_state is None for t in self.sweep.trials.values() if t.role == SEARCH)

    @property
    def _running(self) -> bool:
        """Whether a trial of the search is in a process, or on its way to one."""
        return any(t.end_state is None and not t.waiting for t in self.sweep.trials.values() if t.role == SEARCH)

    # -- decisions ---------------------------------------------------------------------------------

    def _decide(self, trial: TrialRecord, step: int) -> bool:
        """True = go on at once."""
        configuration = configuration_of(self.sweep, trial)
        held = step in self._holds.get(trial.trial_id, ())
        known = configuration.decision(step)
        if known is not None:
            if known.pause:
                trial.waiting = True
            elif not known.keep:
                self._end(trial, EndState.STOPPED_EARLY, stop_reason(known, trial))
            elif held:
                self._line_up(trial)
        elif held:
            trial.waiting = True
            self._ledger.append("waiting", trial=trial.trial_id)
            self._settle(configuration)
        else:
            self._judge(configuration, step)
        return trial.end_state is None and not held and not trial.waiting

    def _settle(self, configuration: Configuration) -> None:
        """Judge a configuration at the rung where its seeds wait, if all that still run are there."""
        waiting = [trial for trial in configuration.live if trial.waiting]
        if not waiting or self._missing_seeds(configuration):
            return
        step = waiting[0].last.step
        if configuration.decision(step) is None and all(step in trial.reports for trial in configuration.live):
            self._judge(configuration, step)

    def _judge(self, configuration: Configuration, step: int) -> None:
        decision = self._rule.decide(self._arrival(configuration, step=step, value=configuration.score_until(step)))
        if decision is not None:
            self._carry_out(decision, configuration)

    def _carry_out(self, decision: Decision, configuration: Configuration) -> None:
        if len(configuration.trials) > 1:
            decision = replace(decision, seeds=configuration.gains_until(decision.rung))
        configuration.decisions.append(decision)
        self._ledger.append("decision", trial=configuration.key, decision=asdict(decision))
        there = [trial for trial in configuration.live if decision.rung in trial.reports]
        held = [trial for trial in there if trial.waiting]
        for trial in there:  # before any of them ends: nobody waits for this decision any more
            trial.waiting = decision.pause
        if decision.keep:
            for trial in held:
                self._line_up(trial)
        elif decision.pause:
            self._tell(configuration)
        else:
            for trial in there:
                self._end(trial, EndState.STOPPED_EARLY, stop_reason(decision, trial))

    def _call_back(self) -> bool:
        """Line up the next configuration that the rule says goes on; False = nobody does."""
        while (resolved := self._rule.resolve()) is not None:
            self._carry_out(resolved.decision, configuration_of(self.sweep, self.sweep.trials[resolved.trial_id]))
            if resolved.decision.keep:
                return True
        return False

    def _end_paused(self) -> None:
        """The search is over for those that the rule has left at a rung."""
        for configuration in configurations(self.sweep):
            for trial in configuration.live:
                reason = stop_reason(configuration.decisions[-1], trial)
                self._end(trial, EndState.STOPPED_EARLY, f"{reason}, and was not called back")

    def _line_up(self, trial: TrialRecord) -> None:
        if all(other is not trial for other in self._unfinished):
            self._unfinished.append(trial)

    def _arrival(self, configuration: Configuration, *, step: int, value: float) -> Arrival:
        first = configuration.first
        group = first.config.loss if self._within_loss else "all"
        number = [c.key for c in configurations(self.sweep)].index(configuration.key)
        return Arrival(configuration.key, number, group, step, value, protected=first.baseline)

    def _end(self, trial: TrialRecord, end_state: EndState, reason: str) -> None:
        trial.end_state, trial.reason, trial.paused, trial.waiting = end_state, reason, False, False
        self._ledger.append("end", trial=trial.trial_id, end_state=end_state, reason=reason)
        self._track_end(trial)
        if trial.role == SEARCH:
            configuration = configuration_of(self.sweep, trial)
            self._settle(configuration)  # the others wait for one less
            self._conclude(configuration)

    def _conclude(self, configuration: Configuration) -> None:
        """When its last seed has ended: one score for the proposer, and the checkpoints that no answer needs go."""
        if configuration.live or self._missing_seeds(configuration) or configuration.key in self._concluded:
            return
        self._concluded.add(configuration.key)
        self._tell(configuration)
        for trial in configuration.trials:
            if trial.config.evaluation.keep == "all":
                checkpoints = Checkpoints(self.sweep.folder / "trials" / trial.trial_id / "checkpoints")
                checkpoints.prune({configuration.best_step, trial.best_step})

    def _tell(self, configuration: Configuration) -> None:
        """The proposer hears of a score once: where the configuration is paused first, or when it ends.

        Most of the paused never go on, and a searcher that waited for them would learn nothing before the end.
        """
        if configuration.key not in self._told:
            self._told.add(configuration.key)
            self._proposer.tell(self._points[configuration.key], configuration.score)

    def _track_end(self, trial: TrialRecord) -> None:
        self._tracker.trial_ended(
            trial.trial_id, trial.last, trial.end_state, reason=trial.reason, headline=headline_values(trial),
            tags={"unopposed": "true"} if trial.unopposed else {},
        )

    # -- resume ------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Tell rule and proposer what the ledger knows, and line up the trials left to finish, oldest first."""
        searched = configurations(self.sweep)
        for configuration in searched:
            first = configuration.first
            self._points[configuration.key] = Point(first.config.loss, first.values, baseline=first.baseline)
            for decision in configuration.decisions:
                self._rule.replay(
                    self._arrival(configuration, step=decision.rung, value=decision.value), decision
                )
        for trial in list(self.sweep.trials.values()):
            self._replay_trial(trial)
        for configuration in searched:
            self._settle(configuration)
            if any(decision.pause for decision in configuration.decisions):
                self._tell(configuration)
            self._conclude(configuration)

    def _replay_trial(self, trial: TrialRecord) -> None:
        decisions = configuration_of(self.sweep, trial).decisions if trial.role == SEARCH else []
        refused = next((d for d in decisions if not (d.keep or d.pause) and d.rung in trial.reports), None)
        if trial.end_state is not None:
            if not self._tracker.has_ended(trial.trial_id):  # killed between ledger and journal
                self._track(trial)
                self._track_end(trial)
        elif refused is not None:
            self._track(trial)
            self._end(trial, EndState.STOPPED_EARLY, stop_reason(refused, trial))
        elif trial.last is not None and trial.last.end_state is not None:
            self._track(trial)
            self._end(trial, trial.last.end_state, trial.last.reason)
        elif not trial.waiting:
            self._line_up(trial)


def stop_reason(decision: Decision, trial: TrialRecord) -> str:
    """One line for tables: where, why, by how much."""
    if decision.cutoff is None:
        return f"step {decision.rung}: {decision.reason}"
    digits = _digits_apart(decision.value, decision.cutoff)
    value = f"{trial.config.evaluation.objective_name} {decision.value:.{digits}f}"
    value = f"mean {value} of {len(decision.seeds)} seeds" if decision.seeds else value
    cutoff = f"{decision.cutoff:.{digits}f}"
    return f"rung at step {decision.rung}: {value} {decision.reason} {cutoff} ({decision.recorded} there)"


def _digits_apart(value: float, cutoff: float) -> int:
    """Decimals to print: four, or as many as it takes to see which of two different numbers is larger."""
    return next((digits for digits in range(4, 18) if f"{value:.{digits}f}" != f"{cutoff:.{digits}f}"), 4)


def headline_values(trial: TrialRecord) -> Mapping[str, float]:
    """The numbers of a trial that MLflow's table shows, slash-free. Only what is known and finite."""
    values: dict[str, float] = {"score": trial.score, "nonfinite_steps": trial.last.nonfinite if trial.last else 0}
    best = trial.reports.get(trial.best_step)
    if best is not None:
        values |= {"best_step": trial.best_step, "best_gain": best.metrics["eval/gain"]}
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

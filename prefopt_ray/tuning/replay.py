"""What a scheduler would have cost, and lost, on recorded curves: the sweep's own rules, told again in simulated time.

Trials take slots in many random orders; each goes on as far as the rule lets it. Nothing is trained and no value is
made up: rungs are moved to steps that were evaluated. Knows neither Ray nor how a sweep is driven for real.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from statistics import fmean, stdev
from typing import NoReturn, get_args

import numpy as np

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.results.curves import Curve, CurveTable
from prefopt_ray.spec.sections import PRESETS, SchedulerSpec
from prefopt_ray.spec.steps import rung_steps
from prefopt_ray.tuning.candidate_rungs import MedianStops, async_hyperband, hyperband
from prefopt_ray.tuning.rungs import Arrival, FixedStops, StopRule, rule_of

DEFAULT_SCHEDULERS = (
    "none", "asha:conservative", "asha:standard", "asha:aggressive", "asha_promotion:conservative",
    "asha_promotion:standard", "asha_promotion:aggressive", "lockstep:conservative", "lockstep:standard",
    "lockstep:aggressive", "hyperband:standard", "async_hyperband:standard", "median:standard",
)
SHIPPED: tuple[str, ...] = get_args(SchedulerSpec.model_fields["kind"].annotation)
RANGE = (5, 95)  # percent of the orders

RuleMaker = Callable[[tuple[int, ...], int], StopRule]  # rungs, keep one in -> rule
# Measured here and built by no spec; see docs/decisions/0004-schedulers.md. Add your own: a name and a rule.
CANDIDATES: dict[str, RuleMaker] = {
    "hyperband": hyperband,
    "async_hyperband": async_hyperband,
    "median": lambda rungs, keep_one_in: MedianStops(rungs),
}


@dataclass(frozen=True)
class Scheduler:
    """One `--scheduler`: `asha:standard`, `asha_promotion:10%/3` (first rung / keep one in), `fixed:80`, `none`."""

    text: str
    kind: str
    settings: SchedulerSpec  # where the rungs are, and how many of a rung go on
    stop_step: int | None = None  # fixed only: of every trial but the baseline

    def rungs(self, table: CurveTable) -> tuple[int, ...]:
        """The evaluated steps nearest to the spec's rungs (by ratio), below the last."""
        if self.kind in ("none", "fixed"):
            return ()
        wanted = rung_steps(self.settings, table.last_step, table.last_step)
        there = [step for step in table.common_steps if step < table.last_step]
        if self.kind == "median":  # it judges at every evaluation past the first rung
            return tuple(step for step in there if step >= min(wanted, default=0))
        return tuple(sorted({min(there, key=lambda s: abs(np.log(s / rung))) for rung in wanted} if there else ()))

    def rule(self, table: CurveTable) -> StopRule:
        """A new one, without a past."""
        if self.kind == "fixed":
            assert self.stop_step is not None
            return FixedStops(steps={number: self.stop_step for number in range(1, len(table.curves) + 1)})
        if self.kind in CANDIDATES:
            return CANDIDATES[self.kind](self.rungs(table), self.settings.factor)
        return rule_of(self.settings, self.rungs(table))


@dataclass(frozen=True)
class Played:
    """One order played to its end: how many evaluations of each trial were made, and when the last slot was free."""

    evaluations: dict[str, int]
    time: float  # seconds where the table has them, otherwise steps


@dataclass(frozen=True)
class Run:
    """One order under one scheduler, against training everything."""

    regret: float  # best score of the table minus the best one that was reached
    regret_in_errors: float  # by the standard error of the best, or by the spread where that was not recorded
    steps: float  # trained, as a share of all
    time: float  # until the last trial ended, as a share of what training everything takes with these slots
    best_reached: bool  # the table's best trial came to its best step
    baseline_whole: bool  # or there is none
    whole: float  # share of trials that were trained to their end


@dataclass(frozen=True)
class Range:
    """Mean over tables and orders, and where 90 % of them lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One scheduler over all tables and orders."""

    scheduler: str
    rungs: tuple[tuple[int, ...], ...]  # by table, as they were used
    regret: Range
    regret_in_errors: Range
    steps: Range
    time: Range
    best_reached: float  # share of orders
    baseline_whole: float
    whole: float
    runs: int


def parse_scheduler(text: str) -> Scheduler:
    """KIND, KIND:PRESET, KIND:FIRST_RUNG/KEEP_ONE_IN, or fixed:STEP. Raises SweepError."""
    kind, _, setting = text.partition(":")
    if kind not in (*SHIPPED, *CANDIDATES):
        near = get_close_matches(kind, (*SHIPPED, *CANDIDATES), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        _refuse(text, f"kinds are {', '.join((*SHIPPED, *CANDIDATES))}{meant}")
    if kind in ("none", "fixed"):
        wrong = bool(setting) if kind == "none" else not (setting.isdecimal() and int(setting) > 0)
        if wrong:
            _refuse(text, "write none, or fixed:STEP such as fixed:80")
        return Scheduler(text, kind, SchedulerSpec(kind="none"), int(setting) if setting else None)
    spaced = kind if kind in SHIPPED else "asha"  # a candidate's rungs are ASHA's
    if not setting or setting in PRESETS:
        return Scheduler(text, kind, SchedulerSpec(kind=spaced, preset=setting or None))
    first, _, factor = setting.partition("/")
    try:
        return Scheduler(text, kind, SchedulerSpec(
            kind=spaced, first_rung=int(first) if first.isdecimal() else first, keep_one_in=int(factor)
        ))
    except ValueError as error:
        _refuse(text, f"write {kind}:PRESET of {', '.join(PRESETS)}, or {kind}:10%/3 (first rung / keep one in)", error)


def _refuse(text: str, rule: str, cause: Exception | None = None) -> NoReturn:
    raise SweepError(Problem("command line", "--scheduler", repr(text[:200]), rule)) from cause


def measure(
    tables: Sequence[CurveTable], schedulers: Sequence[Scheduler], *, slots: int, orders: int, within_loss: bool
) -> list[Measured]:
    """Every scheduler on the same orders, so that their differences are not those of luck."""
    everything = parse_scheduler("none")
    runs: dict[str, list[Run]] = {scheduler.text: [] for scheduler in schedulers}
    for table in tables:
        for curves in arrival_orders(table, orders):
            full = play(curves, everything.rule(table), slots=slots, within_loss=within_loss)
            for scheduler in schedulers:
                played = play(curves, scheduler.rule(table), slots=slots, within_loss=within_loss)
                runs[scheduler.text].append(_run(table, played, full_time=full.time))
    return [_measured(s, tables, runs[s.text]) for s in schedulers]


def arrival_orders(table: CurveTable, orders: int) -> Iterator[list[Curve]]:
    """Random orders of the trials, always the same ones; the baseline comes first, as in a sweep."""
    first = [curve for curve in table.curves if curve.baseline]
    rest = [curve for curve in table.curves if not curve.baseline]
    for order in range(orders):
        yield [*first, *(rest[i] for i in np.random.default_rng(order).permutation(len(rest)))]


def play(curves: Sequence[Curve], rule: StopRule, *, slots: int, within_loss: bool) -> Played:
    """Trials in this order under one rule. The order of work is the driver's: called back, then new."""
    trials = {
        f"{number:04d}": (number, curve)
        for number, curve in enumerate(curves, start=0 if curves[0].baseline else 1)
    }
    new, evaluations = iter(trials), dict.fromkeys(trials, 0)
    running: list[tuple[float, int, str]] = []  # (end of its next evaluation, number, trial)
    clock = 0.0

    def start(trial_id: str) -> None:
        number, curve = trials[trial_id]
        heapq.heappush(running, (clock + _duration(curve, evaluations[trial_id]), number, trial_id))

    while True:
        while len(running) < slots:
            trial_id = _called_back(rule) or next(new, None)
            if trial_id is None and not running:
                rule.exhausted()
                trial_id = _called_back(rule)
            if trial_id is None:
                break
            start(trial_id)
        if not running:
            return Played({trials[trial_id][1].trial: made for trial_id, made in evaluations.items()}, clock)
        clock, number, trial_id = heapq.heappop(running)
        curve = trials[trial_id][1]
        at = evaluations[trial_id]
        evaluations[trial_id] += 1
        if at + 1 == len(curve.steps):
            continue
        group = curve.loss if within_loss else "all"
        decision = rule.decide(
            Arrival(trial_id, number, group, curve.steps[at], curve.values[at], protected=curve.baseline)
        )
        if decision is None or decision.keep:
            start(trial_id)


def _called_back(rule: StopRule) -> str | None:
    """The next of the paused that goes on; those that are stopped instead have ended where they are."""
    while (resolved := rule.resolve()) is not None:
        if resolved.decision.keep:
            return resolved.trial_id
    return None


def _duration(curve: Curve, at: int) -> float:
    """From the evaluation before to this one."""
    spent = curve.seconds or tuple(step * curve.seeds for step in curve.steps)
    return spent[at] - (spent[at - 1] if at else 0.0)


# -- what it means ---------------------------------------------------------------------------------


def _run(table: CurveTable, played: Played, *, full_time: float) -> Run:
    best = max(table.curves, key=lambda curve: curve.score)
    reached = max(c.values[played.evaluations[c.trial] - 1] for c in table.curves if played.evaluations[c.trial])
    trained = sum(_steps(curve, played.evaluations[curve.trial]) for curve in table.curves)
    whole = [played.evaluations[curve.trial] == len(curve.steps) for curve in table.curves]
    return Run(
        regret=best.score - reached,
        regret_in_errors=(best.score - reached) / unit(table),
        steps=trained / sum(_steps(curve, len(curve.steps)) for curve in table.curves),
        time=played.time / full_time,
        best_reached=_steps(replace(best, seeds=1), played.evaluations[best.trial]) >= best.best_step,
        baseline_whole=all(done for done, curve in zip(whole, table.curves, strict=True) if curve.baseline),
        whole=fmean(whole),
    )


def unit(table: CurveTable) -> float:
    """Standard error of the best curve's value; where it was not recorded, the spread of the valid scores; or 1."""
    if table.error:
        return table.error
    valid = [curve.score for curve in table.curves if curve.score >= 0]
    return (stdev(valid) if len(valid) > 1 else 0.0) or 1.0


def _steps(curve: Curve, evaluations: int) -> int:
    return curve.steps[evaluations - 1] * curve.seeds if evaluations else 0


def _measured(scheduler: Scheduler, tables: Sequence[CurveTable], runs: Sequence[Run]) -> Measured:
    return Measured(
        scheduler.text, tuple(scheduler.rungs(table) for table in tables),
        regret=_range([run.regret for run in runs]),
        regret_in_errors=_range([run.regret_in_errors for run in runs]),
        steps=_range([run.steps for run in runs]),
        time=_range([run.time for run in runs]),
        best_reached=fmean(run.best_reached for run in runs),
        baseline_whole=fmean(run.baseline_whole for run in runs),
        whole=fmean(run.whole for run in runs),
        runs=len(runs),
    )


def _range(values: Sequence[float]) -> Range:
    low, high = np.percentile(values, RANGE)
    return Range(fmean(values), float(low), float(high))


# -- for people ------------------------------------------------------------------------------------


def replay_lines(tables: Sequence[CurveTable], measured: Sequence[Measured], *, slots: int, orders: int) -> list[str]:
    """What was replayed, one row for each scheduler, and how to read it."""
    regret = "regret, bits" if all(table.objective == "gain" for table in tables) else "regret"
    rows = [("scheduler", "rungs", regret, "in errors", "steps", "time", "best", "baseline", "whole")]
    rows += [_row(m) for m in measured]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        *(_table_line(table) for table in tables),
        f"{orders} orders of arrival for each table, {slots} slots; mean [5 %, 95 % of the orders]",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
        *_LEGEND,
    ]


_LEGEND = (
    "regret: best score of the table minus the best one reached; errors: its standard error, or the scores' spread",
    "steps, time: share of training everything; best: orders in which the best trial came to its best step",
    "baseline: orders in which it was trained to its end; whole: trials trained to their end",
)


def _table_line(table: CurveTable) -> str:
    left_out = ", ".join(f"{count} {why}" for why, count in table.left_out.items())
    cut = f"; left out, since nobody knows how they go on: {left_out}" if left_out else ""
    clock = "seconds as recorded" if table.has_seconds else "time in steps"
    best = max(table.curves, key=lambda curve: curve.score)
    return (
        f"{table.name}: {len(table.curves)} curves to step {table.last_step}, {clock}, "
        f"best {table.objective} {best.score:.4f}{cut}"
    )


def _row(measured: Measured) -> tuple[str, ...]:
    rungs = {" ".join(map(str, rungs)) or "-" for rungs in measured.rungs}
    regret, errors = measured.regret, measured.regret_in_errors
    return (
        measured.scheduler, rungs.pop() if len(rungs) == 1 else "by table",
        f"{regret.mean:.4f} [{regret.low:.4f}, {regret.high:.4f}]", f"{errors.mean:.2f}",
        _percent(measured.steps), _percent(measured.time), f"{measured.best_reached:.0%}",
        f"{measured.baseline_whole:.0%}", f"{measured.whole:.0%}",
    )


def _percent(share: Range) -> str:
    return f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"

"""Recorded curves: what a scheduler would have seen, read from a sweep's ledger or from a plain table.

A curve is whole when its trial ended by itself. One that was cut (stopped by a scheduler, a person or a failure) says
nothing of what would have come: it is left out and counted, never filled in. Knows no scheduler.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.results.configurations import INVALID, Configuration, configurations
from prefopt_ray.results.ledger import LEDGER_FILE, TrialRecord, read_sweep
from prefopt_ray.trial import EndState

# What a trial does whatever the scheduler: it trains to the end, or its own guards end it. (Some guards end it as
# stopped_early, as schedulers do; then its own last report says so, see `_cut`.)
WHOLE = (EndState.COMPLETED, EndState.DIVERGED, EndState.STOPPED_OVERFIT, EndState.OUT_OF_MEMORY)
REQUIRED, OPTIONAL = ("trial", "step", "value"), ("loss", "seconds", "baseline", "end")


@dataclass(frozen=True)
class Curve:
    """One configuration by evaluation, after step 0. All tuples have the same length, at least one."""

    trial: str
    loss: str
    steps: tuple[int, ...]  # rising
    values: tuple[float, ...]  # best so far, -1 while no evaluation was valid; higher is better
    seconds: tuple[float, ...] = ()  # spent until each evaluation, by all its seeds; empty = not recorded
    baseline: bool = False
    seeds: int = 1  # its steps cost so often

    @property
    def score(self) -> float:
        return self.values[-1]

    @property
    def best_step(self) -> int:
        """The first evaluation with the score."""
        return self.steps[self.values.index(self.score)]


@dataclass(frozen=True)
class CurveTable:
    """Whole curves of trials that competed in one sweep, in the order in which they were created."""

    name: str
    curves: tuple[Curve, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)  # why -> how many curves
    error: float | None = None  # standard error of the best curve's value, where it was recorded
    objective: str = "objective"  # what the values are: gain (in bits), judge/win_lcb, ...; unknown in a plain table

    @property
    def last_step(self) -> int:
        return max(curve.steps[-1] for curve in self.curves)

    @property
    def common_steps(self) -> tuple[int, ...]:
        """Where every curve that got so far was evaluated: the only steps that can be rungs."""
        steps = {step for curve in self.curves for step in curve.steps}
        return tuple(sorted(
            step for step in steps if all(step in curve.steps for curve in self.curves if curve.steps[-1] >= step)
        ))

    @property
    def has_seconds(self) -> bool:
        return all(curve.seconds for curve in self.curves)


def read_table(path: Path) -> CurveTable:
    """A sweep folder, its ledger, or a .csv or .jsonl table of curves. Raises SweepError and DataError.

    A plain table has a row for each evaluation: `trial`, `step`, `value` (the objective there; -1 or empty = not
    valid), and if wanted `loss`, `seconds` (since the trial began), `baseline` (true on one trial), `end` (the end
    state, on any row of the trial).
    """
    folder = path.parent if path.name == LEDGER_FILE else path
    table = _from_sweep(folder) if folder.is_dir() else _from_rows(path)
    if len(table.curves) < 2:
        counted = ", ".join(f"{count} {why}" for why, count in table.left_out.items()) or "no others"
        raise DataError(Problem(
            str(path), "", f"{len(table.curves)} whole curves; left out: {counted}", "a replay compares at least two",
            "record a sweep with scheduler: {kind: none}",
        ))
    return _by_one_clock(table)


def _by_one_clock(table: CurveTable) -> CurveTable:
    """Seconds count where every curve has them; times of two kinds cannot be added."""
    if all(curve.seconds and curve.seconds[-1] > 0 for curve in table.curves):
        return table
    return replace(table, curves=tuple(replace(curve, seconds=()) for curve in table.curves))


# -- from a sweep ----------------------------------------------------------------------------------


def _from_sweep(folder: Path) -> CurveTable:
    sweep = read_sweep(folder)
    found: list[tuple[Curve, float | None]] = []
    left_out: Counter[str] = Counter()
    for configuration in configurations(sweep):
        cut = next((trial.state for trial in configuration.trials if _cut(trial)), None)
        steps = tuple(sorted(set.intersection(*({s for s in t.reports if s > 0} for t in configuration.trials))))
        if cut is not None or not steps:
            left_out[cut or "without an evaluation after step 0"] += 1
            continue
        found.append((_curve(configuration, steps), _error(configuration)))
    best = max(found, key=lambda pair: pair[0].score, default=None)
    objectives = {trial.config.evaluation.objective_name for trial in sweep.trials.values()}
    return CurveTable(
        folder.name, tuple(curve for curve, _ in found), dict(left_out), best[1] if best else None,
        ", ".join(sorted(objectives)),
    )


def _cut(trial: TrialRecord) -> bool:
    """Whether somebody else ended it: an end that a guard of its own decided is in its last report too."""
    by_guard = trial.end_state is EndState.STOPPED_EARLY and trial.last is not None and trial.last.end_state is not None
    return trial.end_state not in WHOLE and not by_guard


def _curve(configuration: Configuration, steps: tuple[int, ...]) -> Curve:
    return Curve(
        configuration.key, configuration.config.loss, steps,
        tuple(configuration.score_until(step) for step in steps),
        tuple(sum(trial.reports[step].seconds for trial in configuration.trials) for step in steps),
        configuration.baseline, len(configuration.trials),
    )


def _error(configuration: Configuration) -> float | None:
    """Over pairs, of its first seed, where it is best; not known of objectives other than gain."""
    report = configuration.first.reports.get(configuration.best_step)
    return report.metrics.get(f"{configuration.config.evaluation.objective}_se") if report else None


# -- from a plain table ----------------------------------------------------------------------------


def _from_rows(path: Path) -> CurveTable:
    trials: dict[str, list[_Row]] = {}
    for number, raw in _raw_rows(path):
        row = _row(raw, place=f"{path}:{number}")
        trials.setdefault(row.trial, []).append(row)
    last = max((row.step for rows in trials.values() for row in rows), default=0)
    curves: list[Curve] = []
    left_out: Counter[str] = Counter()
    for trial, rows in trials.items():
        end = next((row.end for row in rows if row.end), "")
        rows = sorted((row for row in rows if row.step > 0), key=lambda row: row.step)
        if len({row.step for row in rows}) < len(rows):
            twice = f"trial {trial} twice at one step"
            raise DataError(Problem(str(path), "step", twice, "one row for each evaluation"))
        if any(later.seconds < row.seconds for row, later in pairwise(rows) if None not in (row.seconds, later.seconds)):
            raise DataError(Problem(
                str(path), "seconds", f"trial {trial} has fewer at a later step",
                "counts from the trial's begin, so it rises with the steps",
            ))
        if not rows or not _is_whole(end, rows[-1].step, last=last):
            left_out[end or "ended before the last step, without a reason"] += 1
            continue
        curves.append(_curve_of(trial, rows))
    baselines = sum(curve.baseline for curve in curves)
    if baselines > 1:
        raise DataError(Problem(str(path), "baseline", f"{baselines} trials", "at most one is the baseline"))
    return CurveTable(path.stem, tuple(sorted(curves, key=lambda curve: not curve.baseline)), dict(left_out))


@dataclass(frozen=True)
class _Row:
    trial: str
    loss: str
    step: int
    value: float
    seconds: float | None
    baseline: bool
    end: str


def _raw_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and fields."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets begin a file with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        rule = "is neither a sweep folder nor a readable table"
        raise DataError(Problem(str(path), "", str(error), rule, "see `prefopt list`")) from error
    if path.suffix not in (".csv", ".jsonl"):
        rule = "a table of curves is a .csv or .jsonl file"
        raise DataError(Problem(str(path), "", path.name, rule, "give a sweep, its folder, or such a table"))
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(lines), start=2)
        return
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(Problem(f"{path}:{number}", "", repr(line[:60]), "must be one JSON object")) from error
        if not isinstance(row, dict):
            raise DataError(Problem(f"{path}:{number}", "", repr(line[:60]), "must be one JSON object"))
        yield number, row


def _row(raw: Mapping[str, Any], *, place: str) -> _Row:
    """Raises DataError with the line."""
    absent = [key for key in REQUIRED if raw.get(key) is None]
    if absent:
        keys = ", ".join((*REQUIRED, *OPTIONAL))
        found = "null" if absent[0] in raw else ""
        raise DataError(Problem(place, absent[0], found, "is missing", f"a row has {keys}; the last four if known"))
    end = str(raw.get("end") or "")
    if end and end not in list(EndState):
        raise DataError(Problem(place, "end", repr(end[:60]), f"must be one of {', '.join(EndState)}"))
    return _Row(
        str(raw["trial"]), str(raw.get("loss") or "all"), int(_number(raw, "step", place=place)),
        INVALID if raw["value"] == "" else _number(raw, "value", place=place),
        None if raw.get("seconds") in (None, "") else _number(raw, "seconds", place=place),
        str(raw.get("baseline")).lower() in ("true", "1"), end,
    )


def _number(raw: Mapping[str, Any], key: str, *, place: str) -> float:
    try:
        number = float(raw[key])
    except (TypeError, ValueError) as error:
        raise DataError(Problem(place, key, repr(raw[key]), "must be a number")) from error
    if not math.isfinite(number) or (key == "step" and (number < 0 or number != int(number))):
        rule = "must be a whole number from 0" if key == "step" else "must be finite; -1 where nothing valid is known"
        raise DataError(Problem(place, key, repr(raw[key]), rule))
    return number


def _is_whole(end: str, step: int, *, last: int) -> bool:
    return end in WHOLE if end else step == last


def _curve_of(trial: str, rows: list[_Row]) -> Curve:
    seconds = tuple(row.seconds for row in rows if row.seconds is not None)
    return Curve(
        trial, rows[0].loss, tuple(row.step for row in rows), _best_so_far(row.value for row in rows),
        seconds if len(seconds) == len(rows) else (), any(row.baseline for row in rows),
    )


def _best_so_far(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate((max(value, INVALID) for value in values), max))

"""The ledger: what happened in a sweep, one JSON line per event, appended and flushed to disk by the driver.

It is the one source for resume, status and answer. A torn last line (power loss) is dropped when
read and cut off before the next append. Knows nothing of Ray or MLflow.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.trial import EndState, Report, TrialConfig

FORMAT = 1
LEDGER_FILE = "ledger.jsonl"
SESSION = "session"  # the event that begins a session of a sweep: its start, and every resume
SEARCH, CONFIRM = "search", "confirm"  # a trial's role

log = logging.getLogger(__name__)


class Ledger:
    """Append-only writer. One process writes, from any of its threads; any number read.

    Raises SweepError when another process is writing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        _lock(self._file, path)
        _cut_torn_line(path)
        self._lock = threading.Lock()

    def append(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "at": round(time.time(), 3), **fields}, ensure_ascii=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Decision:
    """Why a trial went on, was stopped or was paused at a rung."""

    rung: int  # optimizer step
    value: float  # best gain so far
    cutoff: float | None  # None: nobody was there before
    recorded: int  # values at the rung, this one included
    keep: bool
    reason: str
    seeds: Mapping[str, float] = field(default_factory=dict)  # trial -> its gain there, where value is a mean of several
    pause: bool = False  # not kept, not stopped: it waits at the rung, checkpointed, and may be called back


@dataclass
class TrialRecord:
    """One trial as the ledger tells it."""

    trial_id: str
    number: int
    values: dict[str, float]  # what the searcher drew: loss parameters and learning_rate
    config: TrialConfig
    baseline: bool
    configuration: str = ""  # the first trial of these values; trials that share it differ in their seed
    role: str = SEARCH  # or CONFIRM: trained with a fresh seed to check `configuration`, and selects nothing
    run_id: str | None = None  # MLflow
    placement: dict[str, Any] = field(default_factory=dict)  # the latest: execution plan, pid, host
    reports: dict[int, Report] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    end_state: EndState | None = None
    reason: str = ""
    paused: bool = False
    waiting: bool = False  # it is at a rung: other seeds of its configuration are not, or the stop rule paused it

    def __post_init__(self) -> None:
        self.configuration = self.configuration or self.trial_id

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def last(self) -> Report | None:
        return self.reports[max(self.reports)] if self.reports else None

    @property
    def score(self) -> float:
        """Best gain so far; -1 when no evaluation after a training step was valid. A confirmation's is at its length."""
        if self.role == CONFIRM:
            end = self.reports.get(self.config.training.stop_step)
            return end.objective if end else -1.0
        return self.last.best_so_far if self.last else -1.0

    @property
    def best_step(self) -> int:
        if self.role == CONFIRM:
            return self.config.training.stop_step if self.score >= 0 else -1
        return self.last.best_step if self.last else -1

    @property
    def state(self) -> str:
        """Its end state, or paused, waiting or running."""
        if self.end_state is not None:
            return self.end_state.value
        return "paused" if self.paused else "waiting" if self.waiting else "running"

    @property
    def unopposed(self) -> bool:
        """It passed a rung where nobody had been before, and was never compared there."""
        return any(d.cutoff is None and d.keep for d in self.decisions) and not self.baseline


@dataclass
class SweepRecord:
    """A sweep as its ledger tells it."""

    folder: Path
    sweep_id: str = ""
    name: str = ""
    spec_hash: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # counts and digests of the data, model and plan
    run_id: str | None = None  # MLflow parent run
    trials: dict[str, TrialRecord] = field(default_factory=dict)
    tested: dict[str, int] = field(default_factory=dict)  # trial -> step scored on the test part
    untested: dict[str, str] = field(default_factory=dict)  # finalist -> why it could not be scored there
    finished: bool = False

    @property
    def baseline(self) -> TrialRecord | None:
        return next((t for t in self.trials.values() if t.baseline), None)

    @property
    def state_counts(self) -> str:
        """`5 completed, 7 stopped_early, 1 paused`."""
        counts = Counter(trial.state for trial in list(self.trials.values()))  # the driver may be adding one
        return ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"


def read_sweep(folder: Path) -> SweepRecord:
    """Fold a sweep folder's ledger. Raises SweepError when there is none, or for a line that is no event of ours."""
    path = folder / LEDGER_FILE
    if not path.is_file():
        raise SweepError(Problem(
            place=str(folder), key="", found="no ledger.jsonl", rule="this is not a sweep folder",
            fix="name a sweep from `prefopt list`, or the folder that `prefopt run` printed",
        ))
    record = SweepRecord(folder)
    for number, event in enumerate(read_events(path), start=1):
        try:
            fold(record, event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a key, a kind of value, a trial unknown
            raise SweepError(Problem(
                place=f"{path}:{number}", key="", found=_shown(json.dumps(event).encode()),
                rule=f"this ledger line cannot be read ({type(error).__name__}: {error})",
                fix="restore the file from a backup, or read it with the version of prefopt that wrote it",
            )) from error
    if not record.sweep_id:
        raise SweepError(Problem(
            place=str(path), key="", found="no line that begins a sweep", rule="this sweep ended before it began",
            fix="remove its folder and run the spec again",
        ))
    return record


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Events in order. A last line without its end is torn and left out; other unreadable ones raise SweepError."""
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        log.warning("%s: the last line is torn and was left out", path)
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise SweepError(Problem(
                place=f"{path}:{number}", key="", found=_shown(line), rule="a ledger line must be JSON",
                fix="restore the file from a backup; a line in the middle is never torn by a crash",
            )) from error


def drift_per_token(metrics: Mapping[str, float]) -> float:
    """How far an evaluation's policy is from the reference: mean over both sides of |mean log-ratio per token|, nats."""
    sides = (metrics[f"eval/drift/{side}/per_token"] for side in ("chosen", "rejected"))
    return sum(abs(side) for side in sides) / 2


def request_stop(folder: Path, *, spent: str = "") -> None:
    """Ask a running sweep to checkpoint its trials and stop; seen by its driver and by every trial.

    `spent`: which budget is used up; the sweep then ends with its answer instead of waiting to be resumed.
    """
    commands = folder / "commands"
    commands.mkdir(parents=True, exist_ok=True)
    (commands / "stop").write_text(spent, encoding="utf-8")


def stop_requested(folder: Path) -> bool:
    return (folder / "commands" / "stop").exists()


def spent_budget(folder: Path) -> str:
    """The budget that a requested stop is for; empty for a person's stop, or none."""
    path = folder / "commands" / "stop"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def clear_stop(folder: Path) -> None:
    (folder / "commands" / "stop").unlink(missing_ok=True)


def fold(sweep: SweepRecord, event: Mapping[str, Any]) -> None:
    """The record after one more event of its ledger."""
    kind = event["event"]
    trial = sweep.trials.get(event.get("trial", ""))
    if kind == "sweep":
        if event["format"] > FORMAT:
            raise SweepError(Problem(
                place=str(sweep.folder / LEDGER_FILE), key="format", found=str(event["format"]),
                rule=f"this version of prefopt reads ledgers up to format {FORMAT}", fix="update prefopt",
            ))
        sweep.sweep_id, sweep.name, sweep.spec_hash = event["sweep_id"], event["name"], event["spec_hash"]
        sweep.facts = dict(event["facts"])
    elif kind == "trial":
        config = TrialConfig.from_dict(event["config"])
        sweep.trials[event["trial"]] = TrialRecord(
            event["trial"], event["number"], dict(event["values"]), config, event["baseline"],
            configuration=event.get("configuration", event["trial"]), role=event.get("role", SEARCH),
        )
    elif kind == "tracked" and trial is None:
        sweep.run_id = event["run_id"]
    elif kind == "tracked":
        trial.run_id = event["run_id"]
    elif kind == "placed":
        trial.placement = dict(event["placement"])
    elif kind == "report":
        report = Report.from_dict(event["report"])
        trial.reports[report.step] = report
        trial.paused = trial.waiting = False
    elif kind == "decision":
        decision = Decision(**event["decision"])
        trial.decisions.append(decision)
        for seed in sweep.trials.values():
            if seed.configuration == trial.configuration and seed.role == trial.role and seed.end_state is None:
                seed.waiting = decision.pause and decision.rung in seed.reports
    elif kind == "end":
        trial.end_state, trial.reason, trial.paused = EndState(event["end_state"]), event["reason"], False
        trial.waiting = False
    elif kind == "paused":
        trial.paused = True
    elif kind == "waiting":
        trial.waiting = True
    elif kind == "tested":
        sweep.tested[event["trial"]] = event["step"]
        sweep.untested.pop(event["trial"], None)
    elif kind == "untested":
        sweep.untested[event["trial"]] = event["reason"]
    elif kind == "finished":
        sweep.finished = True


def _lock(file: TextIO, path: Path) -> None:
    """Held until the file is closed or the process dies, however it dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SweepError(Problem(
            place=str(path), key="", found="another process is writing it", rule="a sweep has one driver at a time",
            fix="wait for it, or stop it with Ctrl-C in its terminal",
        )) from error


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="backslashreplace"))


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as handle:
        data = handle.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            handle.truncate(whole)

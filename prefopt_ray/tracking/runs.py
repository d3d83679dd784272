"""What a sweep looks like in MLflow: one parent run, one child run per trial for life.

Turns the driver's events into journaled operations under the metric names used everywhere; what was said before
is read back from the journal, so a resumed driver or trial repeats nothing. Imports no mlflow and never waits for a
server. Called from one thread, the driver's; it does not decide anything about a trial.
"""

import getpass
import json
import math
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefopt_ray.tracking.delivery import Delivery, TrackingSettings
from prefopt_ray.tracking.journal import Journal, Shipper
from prefopt_ray.tracking.operations import (
    SWEEP,
    DatasetInfo,
    LogBatch,
    LogDatasets,
    LogFolder,
    LogText,
    OpenRun,
    Operation,
    SetExperimentTag,
    SetStatus,
)
from prefopt_ray.tracking.views import best_view
from prefopt_ray.trial import EndState, EvaluationConfig, Report, StepPoint, TrialConfig, unpack_points

RUNNING = "running"  # the tag end_state of a trial that has not ended
SUMMARY_STEP = 0  # headline values are not series; MLflow shows the latest by (step, time)
NONFINITE = "nonfinite_metrics"  # how many NaN or Inf values were kept out of this run
KEY_CHARACTERS = 250  # MLflow's limits
NOTE_CHARACTERS = 8000
LEADERBOARD = "leaderboard.json"

_STATUS = {
    EndState.COMPLETED: "FINISHED",
    EndState.STOPPED_EARLY: "FINISHED",  # KILLED is drawn like a crash, and stopping a bad trial is the point
    EndState.STOPPED_OVERFIT: "FINISHED",
    EndState.DIVERGED: "FINISHED",
    EndState.OUT_OF_MEMORY: "FAILED",
    EndState.FAILED: "FAILED",
    EndState.STOPPED_BY_USER: "KILLED",
}


@dataclass(frozen=True)
class SweepIdentity:
    """`sweep_id` is unique for ever, `name` is for people, `folder` is the sweep's own."""

    sweep_id: str
    name: str
    folder: Path


@dataclass(frozen=True)
class SweepSummary:
    """The answer. `answer_text`: first line in plain words. `leaderboard`: one mapping per trial, best first."""

    best_trial: str | None
    answer_text: str
    leaderboard: Sequence[Mapping[str, str | float | None]]


class SweepTracker:
    """Everything the driver tells MLflow. Each call appends to the journal and returns.

    Creating one resumes the delivery of whatever an earlier driver left in `<folder>/journal`.
    `on_run_created(trial id or "sweep", run id)` is called from the shipping thread, again after every resume.
    """

    def __init__(
        self, settings: TrackingSettings, sweep: SweepIdentity, *, on_run_created: Callable[[str, str], None]
    ) -> None:
        self._sweep = sweep
        self._datasets: tuple[DatasetInfo, ...] = ()
        self._journal = Journal(sweep.folder / "journal")
        self._said = _Said()
        for entry in self._journal.entries():
            self._said.add(entry.operation)
        delivery = Delivery(settings, sweep.sweep_id, on_run_created=on_run_created)
        self._shipper = Shipper(self._journal, delivery.deliver, server_answers=delivery.ready)

    def start(self, spec_yaml: str, params: Mapping[str, object], datasets: Sequence[DatasetInfo]) -> None:
        """Open the parent run, also of a sweep that is resumed."""
        self._datasets = tuple(datasets)
        self._say(OpenRun(SWEEP, name=f"{self._sweep.name} {self._sweep.sweep_id}"))
        self._say_new(SWEEP, params=flat_params(params), tags=_source_tags(self._sweep.name))
        self._say(LogText(SWEEP, "spec.yaml", spec_yaml))
        self._say_datasets(SWEEP)
        self._say(SetExperimentTag(*best_view(self._sweep.sweep_id)))

    def trial_started(
        self,
        trial_id: str,
        config: TrialConfig,
        *,
        number: int,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Open the run of a trial, new or resumed. `run_id` is the ledger's, if it has one."""
        name = f"{config.label.replace('beta=', 'β=')} #{number}"
        self._say(OpenRun(trial_id, name, run_id))
        self._say_new(
            trial_id,
            params=flat_params({**config.to_dict(), "number": number}),
            tags={"end_state": RUNNING, **_source_tags(self._sweep.name), **(tags or {})},
            summary={**hyperparameter_metrics(config), NONFINITE: self._said.dropped[trial_id]},
        )
        self._say_datasets(trial_id)

    def report(self, trial_id: str, report: Report) -> None:
        """All points of a report in one batch, at their optimizer steps; steps said before are left out."""
        objective = {
            "objective/current": report.objective,
            "objective/best_so_far": report.best_so_far,
            "objective/best_step": report.best_step,
        }
        at_report = StepPoint(report.step, {**report.metrics, **objective})
        points = [*unpack_points(report.points), at_report] if report.points else [at_report]
        self._say_new(trial_id, points=points, tags=_verdict_tags(report))

    def trial_ended(
        self,
        trial_id: str,
        report: Report | None,
        end_state: EndState,
        *,
        reason: str,
        headline: Mapping[str, float],
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """The last report (None if it never gave one), the headline values and the end state."""
        if report is not None:
            self.report(trial_id, report)
        self._say_new(
            trial_id,
            tags={
                "end_state": end_state.value,
                "stop_reason": reason,
                "mlflow.note.content": _note(
                    report, end_state, reason, objective=self._said.objective(trial_id)
                )[:NOTE_CHARACTERS],
                **(tags or {}),
            },
            summary={name: _rounded(value) for name, value in headline.items()},
        )
        self._say_status(trial_id, _STATUS[end_state])

    def has_ended(self, trial_id: str) -> bool:
        """Whether the journal holds this trial's end."""
        return self._said.status.get(trial_id) in ("FINISHED", "FAILED")

    def trial_paused(self, trial_id: str) -> None:
        """Stopped by the user, and may go on later."""
        self._say_new(trial_id, tags={"end_state": EndState.STOPPED_BY_USER.value})
        self._say_status(trial_id, "KILLED")

    def trial_resumed(self, trial_id: str) -> None:
        self._say_new(trial_id, tags={"end_state": RUNNING})
        self._say_status(trial_id, "RUNNING")

    def rank(self, configurations_in_order: Sequence[Sequence[str]]) -> None:
        """The metric `rank`, 1 = best, of every trial of a configuration; only ranks that changed are sent."""
        for rank, trial_ids in enumerate(configurations_in_order, start=1):
            for trial_id in trial_ids:
                self._say_new(trial_id, summary={"rank": rank})

    def tested(self, trial_id: str, values: Mapping[str, float]) -> None:
        """What the test part says of a finalist, as metrics of its run."""
        self._say_new(trial_id, summary=values)

    def adapter(self, trial_id: str, folder: Path) -> None:
        """Upload an exported adapter as `adapter/`. The folder must stay until it is delivered."""
        self._say(LogFolder(trial_id, str(folder.resolve()), "adapter"))

    def finish(self, summary: SweepSummary) -> None:
        """The answer on the parent run."""
        self._say_leaderboard(summary.leaderboard)
        self._say_new(
            SWEEP,
            tags={
                "mlflow.note.content": summary.answer_text[:NOTE_CHARACTERS],
                "best_trial": summary.best_trial or "none",
            },
            summary=self._said.end_state_counts(),
        )
        if summary.best_trial is not None:
            self._say(LogBatch(SWEEP, run_tags={"best_run_id": summary.best_trial}))
        self._say_status(SWEEP, "FINISHED")

    def paused(self) -> None:
        """The whole sweep was interrupted and may be resumed (`start` does)."""
        self._say_status(SWEEP, "KILLED")

    def close(self, timeout_s: float) -> int:
        """Deliver for up to `timeout_s` seconds. How many operations are left; the next tracker ships them."""
        if self._shipper.close(timeout_s):
            self._journal.close()
        return self._journal.undelivered

    def _say(self, operation: Operation) -> None:
        self._journal.append(operation)
        self._said.add(operation)
        self._shipper.wake()

    def _say_new(
        self,
        key: str,
        *,
        points: Sequence[StepPoint] = (),
        summary: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One batch of what this run has not been told yet, if anything."""
        finite, dropped = _finite(points)
        totals, dropped_totals = _finite([StepPoint(SUMMARY_STEP, summary or {})])
        dropped += dropped_totals
        if dropped:
            totals.append(StepPoint(SUMMARY_STEP, {NONFINITE: self._said.dropped[key] + dropped}))
        fresh = self._said.fresh_points(key, finite) + self._said.changed_summary(key, totals)
        batch = LogBatch(
            key,
            points=tuple((point.step, point.metrics) for point in fresh),
            params=self._said.new_params(key, params or {}),
            tags=self._said.new_tags(key, tags or {}),
            dropped=dropped,
        )
        if batch.points or batch.params or batch.tags:
            self._say(batch)

    def _say_status(self, key: str, status: str) -> None:
        """Said once: a repeated end would move the run's end time."""
        if self._said.status.get(key) != status:
            self._say(SetStatus(key, status))

    def _say_datasets(self, key: str) -> None:
        if self._datasets and key not in self._said.datasets:
            self._say(LogDatasets(key, self._datasets))

    def _say_leaderboard(self, rows: Sequence[Mapping[str, str | float | None]]) -> None:
        """MLflow's table artifact, written by us: its own `log_table` appends to the table of the run before."""
        self._say(LogText(SWEEP, LEADERBOARD, leaderboard_json(rows)))
        self._say_new(SWEEP, tags={"mlflow.loggedArtifacts": json.dumps([{"path": LEADERBOARD, "type": "table"}])})


def tracking_uri(setting: str, storage: Path) -> str:
    """`sqlite` is the database in the storage folder; any other URI is kept as it is.

    Except that sqlite's file becomes absolute: the UI's server and a resumed driver have other folders to be in.
    """
    if setting == "sqlite":
        # SQLAlchemy unquotes the path: a folder with these characters would be another one, or none.
        folder = re.sub("[%?#]", lambda found: f"%{ord(found[0]):02X}", str(storage.resolve()))
        return f"sqlite:///{folder}/mlflow.db"
    if setting.startswith("sqlite:///"):
        return f"sqlite:///{Path(setting.removeprefix('sqlite:///')).resolve()}"
    return setting


def metric_key(name: str) -> str:
    """The name with characters and path shapes replaced that MLflow, or its filter box, cannot take."""
    safe = re.sub(r"[^A-Za-z0-9/_.-]", "_", name.replace("@", "_at_"))
    safe = re.sub(r"\.{2,}", ".", re.sub(r"/{2,}", "/", safe)).strip("/")
    return safe[:KEY_CHARACTERS] or "_"


def flat_params(params: Mapping[str | int, object], prefix: str = "") -> dict[str, str]:
    """`{"training": {"epochs": 1}}` -> `{"training.epochs": "1"}`. Loss parameters stand at the top."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flat_params(value, prefix if name == "loss_params" else f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            flat[metric_key(f"{prefix}{name}")] = ",".join(str(item) for item in value)
        elif value is not None:
            flat[metric_key(f"{prefix}{name}")] = str(value)
    return flat


def hyperparameter_metrics(config: TrialConfig) -> dict[str, float]:
    """Numbers that MLflow can filter, sort and draw; its params are text. Logarithms give a usable axis."""
    numbers = {**config.loss_params, "learning_rate": config.learning_rate}
    logs = {"lr_log10": config.learning_rate, "beta_log10": config.loss_params.get("beta", 0.0)}
    return numbers | {name: _rounded(math.log10(value)) for name, value in logs.items() if value > 0}


def leaderboard_json(rows: Sequence[Mapping[str, str | float | None]]) -> str:
    """What MLflow shows as a table: pandas' `split` form. NaN and Inf become empty cells."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    data = [[_cell(row.get(column)) for column in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data}, allow_nan=False)


@dataclass
class _Said:
    """What the journal already holds, per run key: rebuilt from it when a driver starts."""

    last_step: dict[tuple[str, str], int] = field(default_factory=dict)  # (key, metric)
    latest: dict[tuple[str, str], float] = field(default_factory=dict)
    params: dict[tuple[str, str], str] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    datasets: set[str] = field(default_factory=set)
    status: dict[str, str] = field(default_factory=dict)

    def add(self, operation: Operation) -> None:
        match operation:
            case OpenRun():
                self.status[operation.key] = "RUNNING"
            case SetStatus():
                self.status[operation.key] = operation.status
            case LogDatasets():
                self.datasets.add(operation.key)
            case LogBatch():
                self._add_batch(operation)

    def _add_batch(self, operation: LogBatch) -> None:
        key = operation.key
        for step, metrics in operation.points:
            for name, value in metrics.items():
                self.last_step[key, name] = max(step, self.last_step.get((key, name), step))
                self.latest[key, name] = value
        self.params |= {(key, name): value for name, value in operation.params.items()}
        self.tags |= {(key, name): value for name, value in operation.tags.items()}
        self.dropped[key] += operation.dropped

    def objective(self, key: str) -> str:
        """What ranks this trial, in a word."""
        return "gain" if self.params.get((key, "evaluation.objective")) == EvaluationConfig.objective else "objective"

    def fresh_points(self, key: str, points: Iterable[StepPoint]) -> list[StepPoint]:
        """Values beyond the last step of their series: a trial resumed from a checkpoint repeats a stretch."""
        last: dict[str, int] = defaultdict(lambda: -1)
        fresh = []
        for point in points:
            metrics = {}
            for name, value in point.metrics.items():
                if point.step > max(last[name], self.last_step.get((key, name), -1)):
                    metrics[name] = value
                    last[name] = point.step
            if metrics:
                fresh.append(StepPoint(point.step, metrics))
        return fresh

    def changed_summary(self, key: str, points: Iterable[StepPoint]) -> list[StepPoint]:
        changed = [
            StepPoint(point.step, {n: v for n, v in point.metrics.items() if self.latest.get((key, n)) != v})
            for point in points
        ]
        return [point for point in changed if point.metrics]

    def new_params(self, key: str, params: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in params.items() if self.params.get((key, name)) != value}

    def new_tags(self, key: str, tags: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in tags.items() if self.tags.get((key, name)) != value}

    def end_state_counts(self) -> dict[str, float]:
        """`sweep/n_<end state>` for every end state, also those that did not happen."""
        ended = Counter(value for (_, name), value in self.tags.items() if name == "end_state")
        return {f"sweep/n_{state.value}": ended[state.value] for state in EndState}


def _finite(points: Iterable[StepPoint]) -> tuple[list[StepPoint], int]:
    """The points under safe names, without NaN and Inf, and how many of those there were.

    MLflow drops a metric whose last value is NaN from the run's page and sorts Inf first.
    """
    kept, dropped = [], 0
    for point in points:
        values = {metric_key(name): float(value) for name, value in point.metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        dropped += len(values) - len(finite)
        if finite:
            kept.append(StepPoint(point.step, finite))
    return kept, dropped


def _rounded(value: float) -> float:
    """Four decimals, and four significant digits below one: MLflow cuts longer numbers in its table."""
    if not math.isfinite(value):
        return value  # left to the filter that counts it
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")


def _cell(value: str | float | None) -> str | float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verdict_tags(report: Report) -> dict[str, str]:
    """The verdict now and at the best step, each with its flags, onset and evidence; `none` where there is no onset."""
    tags = {}
    for suffix, verdict in (("", report.verdict), ("_at_best", report.verdict_at_best)):
        tags |= {
            f"verdict{suffix}": verdict.headline,
            f"flags{suffix}": ",".join(verdict.flags),
            f"onset_step{suffix}": "none" if verdict.onset_step is None else str(verdict.onset_step),
            f"evidence{suffix}": verdict.evidence,
        }
    return tags


def _note(report: Report | None, end_state: EndState, reason: str, *, objective: str) -> str:
    """The run's description; its first line is plain text because MLflow's table shows it unrendered."""
    state = end_state.value.replace("_", " ")
    if report is None:
        return f"{state} before its first evaluation\n\n{reason}"
    onset = f" from step {report.verdict.onset_step}" if report.verdict.onset_step is not None else ""
    best = f"no valid {objective}"
    if report.best_step >= 0:
        best = f"best {objective} {report.best_so_far:.4g} at step {report.best_step}"
    first = f"{report.verdict.headline}{onset}; {state} at step {report.step}; {best}"
    at_best = ""
    if report.best_step >= 0 and report.verdict_at_best != report.verdict:
        at_best = f"at step {report.best_step} {report.verdict_at_best.headline}: {report.verdict_at_best.evidence}"
    return "\n\n".join(line for line in (first, reason, report.verdict.evidence, at_best) if line)


def _source_tags(sweep_name: str) -> dict[str, str]:
    """MLflow's own columns, which its client API leaves empty."""
    tags = {"mlflow.source.name": f"prefopt run {sweep_name}", "mlflow.source.type": "PROJECT"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        pass
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str | None:
    """The commit of this package when it runs from its repository, not of a repository around a virtualenv."""
    package = Path(__file__).parent.parent
    command = ["git", "-C", str(package), "rev-parse", "--show-prefix", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    prefix, commit = done.stdout.split("\n")[:2]
    return commit if prefix == f"{package.name}/" else None

"""Applies journaled operations to MLflow: the only module of the sweep that talks to its API.

Idempotent: runs are found again by run id or by the tags sweep_id and trial_id, points keep the journal's
timestamps (MLflow ignores a point it has), texts and folders overwrite. Does not know what a sweep means.
Measured on mlflow 3.17.2 (sqlite, and server with sqlite).
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from prefopt_ray.tracking.journal import Entry, Refused
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

if TYPE_CHECKING:  # mlflow takes 2 to 3 s to import: the shipper's thread pays that, not the driver
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run
    from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

# One failed call must cost 5 s, not the 247 s of MLflow's own retries: the journal retries, in order.
_FORCED = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
_UNLESS_SET = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # it announces every table it creates
}
# Answers that will be the same next time. A wrong password (401, 403) and a busy server (409, 429) are not
# among them: those are put right outside, and the journal waits.
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "NOT_FOUND",
    "INVALID_STATE",
}
_DIGEST_CHARACTERS = 36  # MLflow's column width


@dataclass(frozen=True)
class TrackingSettings:
    """`uri`: MLflow's tracking URI. `artifact_root`: a folder or URI under which a new experiment's artifacts go;
    None = beside the database file, or the server's own choice."""

    uri: str
    experiment: str
    artifact_root: str | None = None


class Delivery:
    """Delivers one sweep's operations. Used from one thread; the first call imports mlflow and may create the database.

    `on_run_created(key, run_id)` is called whenever a run is created or found again.
    """

    def __init__(
        self, settings: TrackingSettings, sweep_id: str, *, on_run_created: Callable[[str, str], None]
    ) -> None:
        self._settings = settings
        self._sweep_id = sweep_id
        self._on_run_created = on_run_created
        self._run_ids: dict[str, str] = {}

    def deliver(self, entry: Entry) -> None:
        """Raises `Refused` for what MLflow will never take, anything else for what may work later."""
        client, experiment_id = self._client, self._experiment_id  # a missing experiment is never a refusal
        from mlflow.exceptions import MlflowException

        try:
            match entry.operation:
                case OpenRun() as operation:
                    self._open_run(operation, entry.at_ms)
                case LogBatch() as operation:
                    self._log_batch(operation, entry.at_ms)
                case LogDatasets() as operation:
                    client.log_inputs(self._run_id(operation), [_dataset_input(info) for info in operation.datasets])
                case SetStatus(status="RUNNING") as operation:
                    client.update_run(self._run_id(operation), status="RUNNING")
                case SetStatus() as operation:
                    client.set_terminated(self._run_id(operation), operation.status, end_time=entry.at_ms)
                case LogText() as operation:
                    client.log_text(self._run_id(operation), operation.text, operation.file)
                case LogFolder() as operation:
                    self._log_folder(operation)
                case SetExperimentTag() as operation:
                    client.set_experiment_tag(experiment_id, operation.name, operation.value)
        except MlflowException as error:
            if _is_refusal(error):
                raise Refused(entry.operation, _one_line(error)) from error
            raise

    def ready(self) -> bool:
        """Whether the tracking store answers a read and our experiment is in use."""
        try:
            return self._client.get_experiment(self._experiment_id).lifecycle_stage == "active"
        except Exception as error:  # noqa: BLE001  (any failure at all is the answer to this question)
            log.debug("MLflow is not ready: %s", error)
            return False

    @cached_property
    def _client(self) -> "MlflowClient":
        prepare_environment()
        from mlflow import MlflowClient

        return MlflowClient(self._settings.uri)

    @cached_property
    def _experiment_id(self) -> str:
        name = self._settings.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return self._client.create_experiment(name, artifact_location=artifact_location(self._settings))
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(f"the experiment {name!r} is in MLflow's trash: restore it, or name another")
        return experiment.experiment_id

    def _open_run(self, operation: OpenRun, at_ms: int) -> None:
        run = self._existing_run(operation) or self._create_run(operation, at_ms)
        run_id = run.info.run_id
        if run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        self._run_ids[operation.key] = run_id
        self._on_run_created(operation.key, run_id)

    def _existing_run(self, operation: OpenRun) -> "Run | None":
        from mlflow.exceptions import MlflowException

        if operation.run_id is not None:
            try:
                run = self._client.get_run(operation.run_id)
            except MlflowException as error:
                if not _is_refusal(error):
                    raise
                log.warning("MLflow has no run %s any more (%s)", operation.run_id, operation.key)
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        return self._find_run(operation.key)

    def _create_run(self, operation: OpenRun, at_ms: int) -> "Run":
        tags = self._identity_tags(operation.key)
        if operation.key != SWEEP:
            tags["mlflow.parentRunId"] = self._run_id(operation, key=SWEEP)
        return self._client.create_run(self._experiment_id, start_time=at_ms, tags=tags, run_name=operation.name)

    def _find_run(self, key: str) -> "Run | None":
        """The oldest run with our tags: a create request that timed out may have been obeyed all the same."""
        filters = [f"tags.{name} = '{value}'" for name, value in self._identity_tags(key).items()]
        runs = self._client.search_runs(
            [self._experiment_id], " and ".join(filters), order_by=["attributes.start_time ASC"], max_results=1
        )
        return runs[0] if runs else None

    def _identity_tags(self, key: str) -> dict[str, str]:
        if key == SWEEP:
            return {"kind": "sweep", "sweep_id": self._sweep_id}
        return {"kind": "trial", "sweep_id": self._sweep_id, "trial_id": key}

    def _run_id(self, operation: Operation, *, key: str | None = None) -> str:
        """The run id of the operation's key. Raises Refused when there is no such run."""
        key = key or operation.key
        if key not in self._run_ids:
            run = self._find_run(key)
            if run is None:
                raise Refused(operation, f"there is no run of {key!r} in sweep {self._sweep_id}")
            self._run_ids[key] = run.info.run_id
        return self._run_ids[key]

    def _log_batch(self, operation: LogBatch, at_ms: int) -> None:
        """One request; if MLflow refuses it, one request per name, so that one bad key costs only itself."""
        from mlflow.exceptions import MlflowException

        linked = {name: self._run_id(operation, key=key) for name, key in operation.run_tags.items()}
        whole = replace(operation, tags={**operation.tags, **linked}, run_tags={})
        try:
            self._send(whole, at_ms)
        except MlflowException as error:
            parts = _split_by_name(whole)
            if not _is_refusal(error) or len(parts) == 1:
                raise
            self._send_parts(parts, at_ms)

    def _send_parts(self, parts: Sequence[LogBatch], at_ms: int) -> None:
        from mlflow.exceptions import MlflowException

        refused: list[LogBatch] = []
        reasons: list[str] = []
        for part in parts:
            try:
                self._send(part, at_ms)
            except MlflowException as error:
                if not _is_refusal(error):
                    raise
                refused.append(part)
                reasons.append(_one_line(error))
        if refused:
            raise Refused(_joined(refused), "; ".join(reasons))

    def _send(self, batch: LogBatch, at_ms: int) -> None:
        from mlflow.entities import Param, RunTag

        self._client.log_batch(
            self._run_id(batch),
            metrics=_metrics(batch, at_ms),
            params=[Param(name, value) for name, value in batch.params.items()],
            tags=[RunTag(name, value) for name, value in batch.tags.items()],
        )

    def _log_folder(self, operation: LogFolder) -> None:
        if not Path(operation.folder).is_dir():
            raise Refused(operation, f"{operation.folder} is gone")
        self._client.log_artifacts(self._run_id(operation), operation.folder, operation.artifact_path)


def prepare_environment() -> None:
    """MLflow reads these at every call or at import; all are global to the process."""
    os.environ.update(_FORCED)
    for name, value in _UNLESS_SET.items():
        os.environ.setdefault(name, value)


def artifact_location(settings: TrackingSettings) -> str | None:
    """Where a new experiment keeps its artifacts. MLflow's default for sqlite is ./mlruns of whoever asks."""
    root = settings.artifact_root
    if root is None and settings.uri.startswith("sqlite:///"):
        root = str(Path(unquote(settings.uri.removeprefix("sqlite:///"))).parent / "artifacts")
    if root is None:
        return None
    folder = re.sub(r"[^\w.-]+", "_", settings.experiment).strip(".") or "experiment"
    if "://" in root:
        return f"{root.rstrip('/')}/{folder}"
    return (Path(root).resolve() / folder).as_uri()


def _is_refusal(error: "MlflowException") -> bool:
    return error.error_code in _REFUSALS


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _metrics(batch: LogBatch, at_ms: int) -> "list[Metric]":
    from mlflow.entities import Metric

    return [Metric(name, value, at_ms, step) for step, metrics in batch.points for name, value in metrics.items()]


def _split_by_name(batch: LogBatch) -> list[LogBatch]:
    """One batch per metric name, param and tag."""
    names = dict.fromkeys(name for _, metrics in batch.points for name in metrics)
    by_metric = [
        LogBatch(batch.key, points=tuple((step, {name: m[name]}) for step, m in batch.points if name in m))
        for name in names
    ]
    by_param = [LogBatch(batch.key, params={name: value}) for name, value in batch.params.items()]
    by_tag = [LogBatch(batch.key, tags={name: value}) for name, value in batch.tags.items()]
    return by_metric + by_param + by_tag


def _joined(parts: Sequence[LogBatch]) -> LogBatch:
    return LogBatch(
        parts[0].key,
        points=tuple(point for part in parts for point in part.points),
        params={name: value for part in parts for name, value in part.params.items()},
        tags={name: value for part in parts for name, value in part.tags.items()},
    )


def _dataset_input(info: DatasetInfo) -> "DatasetInput":
    """Made as an entity: `mlflow.data` raises on sources it cannot resolve, and needs pandas."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source_type = _source_type(info)
    place = "path" if source_type == "hugging_face" else "uri"
    source = {place: info.source, "split": info.split, "revision": info.revision}
    dataset = Dataset(
        name=info.name,
        digest=info.digest[:_DIGEST_CHARACTERS],
        source_type=source_type,
        source=json.dumps({name: value for name, value in source.items() if value}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", info.context)])


def _source_type(info: DatasetInfo) -> str:
    """The UI makes a link to the hub out of `hugging_face`, so only what comes from there is called so."""
    if Path(info.source).exists():
        return "local"
    return "hugging_face" if "/" in info.source or info.revision else "embedded"

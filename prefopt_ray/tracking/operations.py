"""What can be said to MLflow, as plain data: the lines of the journal.

Every operation can be delivered twice with the same result, which is what makes replay after a crash safe.
Knows the shapes and JSON only: not MLflow, not files, not what a sweep means. Runs are named by our own
keys (a trial id, or SWEEP for the parent), because MLflow's run id exists only once the server has answered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SWEEP = "sweep"  # the key of the parent run; trial ids are never this word


@dataclass(frozen=True)
class OpenRun:
    """Get or create the run of `key`, and make it RUNNING. A known `run_id` is tried first."""

    key: str
    name: str
    run_id: str | None = None


@dataclass(frozen=True)
class LogBatch:
    """Params, tags and metric points of one run, sent in one request (more than one past MLflow's limits).

    `points`: (optimizer step, {metric: finite value}). `run_tags`: tags whose value is the run id of another key.
    `dropped`: how many non-finite values were left out when this was made.
    """

    key: str
    points: tuple[tuple[int, Mapping[str, float]], ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    run_tags: Mapping[str, str] = field(default_factory=dict)
    dropped: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """One part of the pairs: `source` is a hub id or a file, `context` is train, select or test."""

    name: str
    source: str
    digest: str
    context: str
    split: str = ""
    revision: str = ""


@dataclass(frozen=True)
class LogDatasets:
    """The parts of the pairs that a run reads."""

    key: str
    datasets: tuple[DatasetInfo, ...]


@dataclass(frozen=True)
class SetStatus:
    """`status` is MLflow's: RUNNING, FINISHED, FAILED or KILLED."""

    key: str
    status: str


@dataclass(frozen=True)
class LogText:
    """A small file whose whole content is in the journal; an earlier one of the same name is replaced."""

    key: str
    file: str
    text: str


@dataclass(frozen=True)
class LogFolder:
    """Upload every file of `folder` (absolute) under `artifact_path`. The folder must live until then."""

    key: str
    folder: str
    artifact_path: str


@dataclass(frozen=True)
class SetExperimentTag:
    """A tag of the experiment. Cosmetic (a saved view): refused ones are dead letters like any other."""

    name: str
    value: str


Operation = OpenRun | LogBatch | LogDatasets | SetStatus | LogText | LogFolder | SetExperimentTag

_KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (OpenRun, LogBatch, LogDatasets, SetStatus, LogText, LogFolder, SetExperimentTag)
}


def to_dict(operation: Operation) -> dict[str, Any]:
    """JSON-ready; empty fields are left out, since most batches carry only points."""
    # Not dataclasses.asdict: it copies every float of every point on the driver's thread.
    fields = {name: value for name, value in vars(operation).items() if value not in (None, (), {}, 0)}
    if "datasets" in fields:
        fields["datasets"] = [vars(dataset) for dataset in fields["datasets"]]
    return {"op": type(operation).__name__, **fields}


def from_dict(data: Mapping[str, Any]) -> Operation:
    """The inverse of `to_dict`. Raises KeyError or TypeError on anything else."""
    fields = dict(data)
    kind = _KINDS[fields.pop("op")]
    if "points" in fields:
        fields["points"] = tuple((step, metrics) for step, metrics in fields["points"])
    if "datasets" in fields:
        fields["datasets"] = tuple(DatasetInfo(**dataset) for dataset in fields["datasets"])
    return kind(**fields)

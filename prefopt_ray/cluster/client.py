"""A sweep on a cluster from outside: an address and a token are all that is needed.

The token is Ray's own: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token.
"""

import asyncio
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from prefopt_ray.cluster.messages import ACCEPTED, REFUSED, SUMMARY, Message, heard
from prefopt_ray.cluster.upload import pack
from prefopt_ray.errors import ClusterError, Problem
from prefopt_ray.spec import SweepSpec

POLL_S = 0.5
_TALKATIVE = (  # each sets its own level; every upload and every closed log is told
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging",
)
STOP_S = 120  # a trial checkpoints between two steps, and the driver delivers what it has
PREFIX = "prefopt-"
# Ray's own default would end the driver before a trial has checkpointed.
_STOPPED_BY = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True)
class Submitted:
    """A sweep that a cluster has taken."""

    job: str
    sweep: str
    folder: str
    resumed: bool
    finished: bool  # there is nothing to go on with: its answer is there


@dataclass(frozen=True)
class Job:
    """A job of ours on a cluster."""

    job: str
    name: str  # of the sweep
    state: str
    started: float | None  # seconds since 1970
    ended: float | None
    metadata: Mapping[str, str]


class Cluster:
    """One cluster's jobs. Raises ClusterError for an address that does not answer or does not know the token."""

    def __init__(self, address: str) -> None:
        self.address = address
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        token = _token()
        with _explained(address):
            self._client = JobSubmissionClient(
                address, headers={"Authorization": f"Bearer {token}"} if token else None
            )

    def submit(self, spec: SweepSpec, *, fresh: bool, versions: Mapping[str, str]) -> Submitted:
        """Upload and start; wait until the cluster has checked everything. Raises ClusterError with its problems."""
        job = f"{PREFIX}{re.sub(r'[^a-zA-Z0-9-]', '-', spec.name)}-{secrets.token_hex(3)}"
        with tempfile.TemporaryDirectory(prefix="prefopt-upload-") as folder, _explained(self.address):
            pack(spec, Path(folder), fresh=fresh, versions=versions)
            self._client.submit_job(
                entrypoint="python -m prefopt_ray.cluster.job run", submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": _STOPPED_BY},
                metadata={"prefopt": spec.name, "storage": str(spec.storage)},
            )
        answer = self._answer(job, (ACCEPTED, REFUSED))
        if answer.kind == REFUSED:
            raise ClusterError(*(Problem(**problem) for problem in answer.value["problems"]))
        return Submitted(job, **{name: answer.value[name] for name in ("sweep", "folder", "resumed", "finished")})

    def status(self, folder: str) -> dict[str, Any]:
        """What the sweep's ledger says, by a short job that only reads."""
        job = f"{PREFIX}status-{secrets.token_hex(3)}"
        with _explained(self.address):
            self._client.submit_job(
                entrypoint=f"python -m prefopt_ray.cluster.job status '{folder}'", submission_id=job
            )
            answer = self._answer(job, (SUMMARY, REFUSED))
            self._wait(job, seconds=30)
            self._client.delete_job(job)
        if answer.kind == REFUSED:
            raise ClusterError(*(Problem(**problem) for problem in answer.value["problems"]))
        return dict(answer.value)

    def jobs(self) -> list[Job]:
        """Sweeps' jobs, the latest first."""
        with _explained(self.address):
            found = [details for details in self._client.list_jobs() if (details.metadata or {}).get("prefopt")]
        jobs = [
            Job(
                details.submission_id, details.metadata["prefopt"], str(details.status).lower(),
                _seconds(details.start_time), _seconds(details.end_time), details.metadata,
            )
            for details in found
        ]
        return sorted(jobs, key=lambda job: -(job.started or 0.0))

    def find(self, wanted: str) -> tuple[Job, dict[str, Any]]:
        """The latest job by its id, its sweep's name or id; with what it was told on its acceptance."""
        jobs = self.jobs()
        for job in jobs:
            accepted = next((m.value for m in self.messages(job.job) if m.kind == ACCEPTED), None)
            if accepted and wanted in (job.job, job.name, accepted["sweep"], Path(accepted["folder"]).name):
                return job, dict(accepted)
        known = ", ".join(f"{job.job} ({job.name})" for job in jobs) or "none"
        raise ClusterError(Problem(
            self.address, "SWEEP", repr(wanted[:200]), "no sweep of this name, id or job on the cluster", f"there: {known}"
        ))

    def stop(self, job: str) -> None:
        """Ask for a clean end: every trial checkpoints. Waits for it."""
        with _explained(self.address):
            self._client.stop_job(job)
            self._wait(job, seconds=STOP_S + 30)

    def kill(self, job: str) -> None:
        """End its driver at once; what was reported is on disk."""
        with _explained(self.address):
            driver = self._client.get_job_info(job).driver_info
            if driver is not None and self.state(job) not in _ENDED:
                self._client.submit_job(
                    entrypoint=f"python -m prefopt_ray.cluster.job kill {driver.pid}",
                    submission_id=f"{PREFIX}kill-{secrets.token_hex(3)}",
                )
                self._wait(job, seconds=30)

    def state(self, job: str) -> JobStatus:
        with _explained(self.address):
            return self._client.get_job_status(job)

    def log(self, job: str) -> str:
        with _explained(self.address):
            return self._client.get_job_logs(job)

    def messages(self, job: str) -> Iterator[Message]:
        yield from filter(None, map(heard, self.log(job).split("\n")))

    def follow(self, job: str, told: Callable[[str], None]) -> JobStatus:
        """Every line of the log, those so far first, until the job has ended."""
        async def tail() -> None:
            rest = ""
            async for chunk in self._client.tail_job_logs(job):
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    told(line)

        with _explained(self.address):
            asyncio.run(tail())
        return self._wait(job, seconds=10)

    def _answer(self, job: str, kinds: tuple[str, ...]) -> Message:
        while True:
            ended = self.state(job) in _ENDED
            answer = next((message for message in self.messages(job) if message.kind in kinds), None)
            if answer is not None:
                return answer
            if ended:
                shown = "\n".join(self.log(job).strip().splitlines()[-5:])
                raise ClusterError(Problem(
                    self.address, job, shown, "the job ended before it answered",
                    "the cluster's python must have this package: `pip install prefopt_ray` on every node",
                ))
            time.sleep(POLL_S)

    def _wait(self, job: str, *, seconds: float) -> JobStatus:
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in _ENDED and time.monotonic() < end:
            time.sleep(POLL_S)
        return state


class _explained:  # noqa: N801 - reads as a statement
    """Ray's errors in a person's words."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, AuthenticationError):
            rule = "the cluster does not accept this token" if _token() else "the cluster wants a token, and there is none"
            raise ClusterError(Problem(
                self._address, "token", "", rule,
                "put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_TOKEN",
            )) from error
        if isinstance(error, (ConnectionError, OSError)) and not isinstance(error, ClusterError):
            raise ClusterError(Problem(
                self._address, "--address", "", f"does not answer ({type(error).__name__})",
                "start a tunnel to the head's port 8265, such as `ray attach cluster.yaml -p 8265`, or mend the address",
            )) from error


def _token() -> str:
    """As Ray looks for it; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000

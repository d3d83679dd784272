"""`prefopt ui`: MLflow's own web server on loopback for a local database, or just the link to a remote one.

Knows how to start it small and private, wait until it answers, and end it; knows nothing of trials.
Options measured on mlflow 3.17.2: without its job runner it is 2 processes and 0.5 GB instead of 10 and 2.4 GB.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt_ray.errors import PrefoptError, Problem, ResourceError, SweepError
from prefopt_ray.tracking.delivery import prepare_environment
from prefopt_ray.tracking.views import best_view_url, saved_view_url, view_is_of

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 120.0  # 13 to 23 s were measured on a busy machine
END_TIMEOUT_S = 10.0
_SHOWN_LOG_LINES = 15


@contextmanager
def serve_ui(
    uri: str,
    artifact_root: str | None,
    *,
    experiment: str,
    sweep_id: str,
    port: int = 0,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """Yields the link to the sweep's trials by rank, and serves it until the block is left.

    `port` 0 = any free one. An http(s) `uri` is already served: nothing is started.
    Raises ResourceError (port taken), PrefoptError (the server does not start), SweepError (no such experiment).
    """
    if uri.startswith(("http://", "https://")):
        yield _link(uri, experiment, sweep_id)
        return
    with _server(uri, artifact_root, port=port or _free_port(), start_timeout_s=start_timeout_s) as base_url:
        yield _link(base_url, experiment, sweep_id)


@contextmanager
def _server(uri: str, artifact_root: str | None, *, port: int, start_timeout_s: float) -> Iterator[str]:
    _refuse_taken(port)
    with tempfile.TemporaryDirectory(prefix="prefopt-ui-") as folder:
        log_path = Path(folder) / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                _command(uri, artifact_root or folder, port),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=folder,  # MLflow writes ./mlruns, and an old ./mlruns would change its defaults
                env=_environment(),
                start_new_session=True,  # its workers end with it, and Ctrl-C reaches us first
            )
        try:
            base_url = f"http://{LOOPBACK}:{port}"
            _wait_until_healthy(base_url, process, log_path=log_path, timeout_s=start_timeout_s)
            yield base_url
        finally:
            _end(process)


def _command(uri: str, artifact_root: str, port: int) -> list[str]:
    hosts = f"{LOOPBACK}:*,localhost:*"  # any port, for whoever comes through an ssh tunnel
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", LOOPBACK, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--artifacts-destination", artifact_root),
        *("--allowed-hosts", hosts),  # the default pattern 192.168.* also matches 192.168.evil.com
    ]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONSAFEPATH": "1",  # a file types.py beside the user would otherwise be imported by `-m`
    }


def _wait_until_healthy(base_url: str, process: subprocess.Popen[bytes], *, log_path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PrefoptError(f"mlflow server ended with exit code {process.returncode}:\n{_last_lines(log_path)}")
        if _is_healthy(base_url):
            return
        time.sleep(0.2)
    raise PrefoptError(f"mlflow server did not answer within {timeout_s:g} s:\n{_last_lines(log_path)}")


def _is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _link(base_url: str, experiment: str, sweep_id: str) -> str:
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        found = MlflowClient(base_url).get_experiment_by_name(experiment)
    except MlflowException as error:
        raise PrefoptError(f"{base_url} does not answer as an MLflow server: {error}") from error
    if found is None:
        raise SweepError(
            Problem(
                place=base_url,
                key="tracking.experiment",
                found=repr(experiment),
                rule="MLflow has no experiment of this name",
                fix="was the sweep tracked somewhere else, or has it not started?",
            )
        )
    if view_is_of(found.tags, sweep_id):
        return saved_view_url(base_url, found.experiment_id)
    return best_view_url(base_url, found.experiment_id, sweep_id)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left by another server is free
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            problem = Problem(LOOPBACK, "port", str(port), f"cannot be used ({error.strerror})", "name another port")
            raise ResourceError(problem) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server's own process group, which holds its worker too."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(END_TIMEOUT_S)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def _last_lines(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_SHOWN_LOG_LINES:])

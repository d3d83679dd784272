"""Real trackers, a real sqlite database, a real `mlflow server`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefopt_ray.tracking.delivery import TrackingSettings, prepare_environment
from prefopt_ray.tracking.runs import SweepIdentity, SweepTracker
@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to create its tables, so once is enough."""
    prepare_environment()
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def open_tracker(tmp_path: Path, uri: str) -> Iterator[Callable[..., SweepTracker]]:
    """Opens the sweep's tracker as a driver would, also a second time after the first was closed."""
    opened: list[SweepTracker] = []

    def open_one(run_ids: dict[str, str] | None = None, *, to: str = uri, experiment: str = "exp") -> SweepTracker:
        seen = {} if run_ids is None else run_ids
        tracker = SweepTracker(
            TrackingSettings(to, experiment),
            SweepIdentity("s1", "demo", tmp_path / "demo-s1"),
            on_run_created=seen.__setitem__,
        )
        opened.append(tracker)
        return tracker

    yield open_one
    for tracker in opened:
        tracker.close(0.0)


class MlflowServer:
    """A server process on a fixed loopback port that can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self._folder / "server.log").open("ab")
        self._process = subprocess.Popen(
            command, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "mlflow server did not start"
            time.sleep(0.1)

    def end(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    server = MlflowServer(folder)
    server.start()
    yield server
    server.end()

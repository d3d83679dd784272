"""Real trackers, a real sqlite database, a real `mlflow server`."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tracking.mlflow_server import MlflowServer

from prefopt_ray.tracking.delivery import TrackingSettings, prepare_environment
from prefopt_ray.tracking.runs import SweepIdentity, SweepTracker


@pytest.fixture(autouse=True)
def empty_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's defaults write ./mlruns and ./mlflow.db: no test here may leave anything behind."""
    folder = tmp_path / "current directory"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


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


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    server = MlflowServer(folder)
    server.start()
    yield server
    server.end()

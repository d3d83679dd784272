"""A file drawn after the sweep ended lies in its MLflow run."""

from pathlib import Path

import pytest

from prefopt_ray.errors import PrefoptError
from prefopt_ray.tracking.artifacts import attach


def test_a_file_is_attached_and_replaced(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client, store = MlflowClient(uri), tmp_path / "store"
    experiment = client.create_experiment("drawn", artifact_location=store.as_uri())
    run_id = client.create_run(experiment).info.run_id
    figure = tmp_path / "frontier.svg"
    for content in ("first", "second"):
        figure.write_text(content)
        attach(figure, uri=uri, run_id=run_id, artifact_path="figures")
    assert [file.path for file in client.list_artifacts(run_id, "figures")] == ["figures/frontier.svg"]
    (kept,) = store.rglob("frontier.svg")
    assert kept.read_text() == "second"


def test_a_run_that_is_gone_is_said_with_the_file_that_was_drawn(uri: str, tmp_path: Path) -> None:
    figure = tmp_path / "frontier.svg"
    figure.write_text("drawn")
    with pytest.raises(PrefoptError, match=r"frontier.svg was drawn, but MLflow .* does not take it"):
        attach(figure, uri=uri, run_id="0" * 32, artifact_path="figures")

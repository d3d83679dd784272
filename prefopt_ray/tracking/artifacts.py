"""A file added to a finished sweep's MLflow run. Knows nothing of what is in it.

Not through the journal: that belongs to the driver of a sweep, and here there is none any more.
"""

from pathlib import Path

from prefopt_ray.errors import PrefoptError
from prefopt_ray.tracking.delivery import prepare_environment


def attach(file: Path, *, uri: str, run_id: str, artifact_path: str) -> None:
    """Upload `file`, replacing one of the same name. Raises PrefoptError when MLflow does not take it."""
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(uri).log_artifact(run_id, str(file), artifact_path)
    except (MlflowException, OSError) as error:
        raise PrefoptError(f"{file} was drawn, but MLflow at {uri} does not take it: {error}") from error

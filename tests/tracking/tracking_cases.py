"""A configuration and reports to track, and the same read back from MLflow."""

from mlflow import MlflowClient
from mlflow.entities import Run

from prefopt_ray.trial import (
    EvaluationConfig,
    Report,
    StepPoint,
    TrainingConfig,
    TrialConfig,
    Verdict,
    pack_points,
)

HEALTHY = Verdict("healthy")


def trial_config(beta: float = 0.1) -> TrialConfig:
    return TrialConfig(
        loss="ipo_sum",
        loss_params={"beta": beta},
        learning_rate=5e-6,
        training=TrainingConfig(total_steps=100, stop_step=100),
        evaluation=EvaluationConfig(steps=(0, 100)),
    )


def report(step: int, *, gain: float = 0.1, since: int | None = None, **metrics: float) -> Report:
    """A report at `step`, with one training point for every step after `since` (10 steps unless said)."""
    first = (max(0, step - 10) if since is None else since) + 1
    points = [StepPoint(s, {"train/loss": 1 / s, "train/lr": 5e-6}) for s in range(first, step + 1)]
    return Report(
        step=step,
        pairs_seen=step * 64,
        metrics={"eval/gain": gain, "eval/rewards/accuracy": 0.6, **metrics},
        objective=gain,
        best_so_far=gain,
        best_step=step,
        verdict=HEALTHY,
        verdict_at_best=HEALTHY,
        points=pack_points(points),
    )


def runs(uri: str, experiment: str = "exp") -> dict[str, Run]:
    """Every run of the experiment by trial id, the parent as "sweep". Fails on two runs of one trial."""
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    by_key = {run.data.tags.get("trial_id", "sweep"): run for run in found}
    assert len(by_key) == len(found), [run.info.run_name for run in found]
    return by_key


def steps(uri: str, run: Run, metric: str) -> list[int]:
    """The steps of every stored point of a metric, duplicates included."""
    return sorted(point.step for point in MlflowClient(uri).get_metric_history(run.info.run_id, metric))

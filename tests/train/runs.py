"""Short runs of a trial, and what must be equal between two of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_worker, trial_config
from torch import Tensor

from prefopt_ray.train import Worker, train
from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.trial import Report, TrialConfig, unpack_points


def run(config: TrialConfig, worker: Worker | None = None, *, folder: Path | None = None) -> list[Report]:
    return list(train(config, worker or tiny_worker(), folder=folder))


def interrupt_after(steps: int) -> Callable[[], bool]:
    """`interrupted` as train asks it, at first and before every step: true once `steps` were made in this call."""
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) > steps + 1

    return interrupted


def run_in_pieces(
    config: TrialConfig, folder: Path, *, pieces: list[int], worker: Callable[[], Worker] = tiny_worker
) -> list[Report]:
    """Stopped after each number of steps and continued by new objects, as in a new process. Reports that are
    yielded once more on resuming are kept once."""
    reports: list[Report] = []
    for steps in [*pieces, 10_000]:
        for report in train(config, worker(), folder=folder, interrupted=interrupt_after(steps)):
            if report.step not in {known.step for known in reports}:
                reports.append(report)
    return reports


def comparable(report: Report) -> dict[str, object]:
    """Everything a report says, timings aside."""
    return report.to_dict() | {"seconds": None, "evaluating_seconds": None, "points": points_of([report])}


def points_of(reports: list[Report]) -> list[tuple[int, dict[str, float]]]:
    return [
        (point.step, {name: value for name, value in point.metrics.items() if name != "train/pairs_per_s"})
        for report in reports
        for point in unpack_points(report.points)
    ]


def assert_same_reports(first: list[Report], second: list[Report]) -> None:
    assert [comparable(report) for report in first] == [comparable(report) for report in second]


def assert_same_folders(first: Path, second: Path) -> None:
    """Last weights and optimizer, the steps kept, and the bytes of the per-pair evaluations."""
    one, other = Checkpoints(first / "checkpoints"), Checkpoints(second / "checkpoints")
    assert one.steps() and one.steps()[-1] == other.steps()[-1]
    mine, theirs = one.load(one.steps()[-1]).tensors, other.load(one.steps()[-1]).tensors
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (first / "evaluations.safetensors").read_bytes() == (second / "evaluations.safetensors").read_bytes()


def evaluated_at(config: TrialConfig, *steps: int, samples: tuple[int, ...] = ()) -> TrialConfig:
    return replace(config, evaluation=replace(config.evaluation, steps=steps, sample_steps=samples))


def short_config(adapter: str = "lora", **options: object) -> TrialConfig:
    """Six steps, evaluated at 0, 1, 4 and 6, samples at 4, with every kind of state in play."""
    config = trial_config(
        "simpo", params={"beta": 2.0, "gamma_ratio": 0.5}, adapter=adapter, steps=6, learning_rate=1e-2,
        micro_batch_pairs=3, schedule="cosine", warmup_steps=2, **options,
    )
    # Any drift is flagged, so that the last verdict depends on samples drawn at an earlier evaluation.
    config = replace(config, guards=replace(config.guards, drift_limit_per_token=1e-9))
    return evaluated_at(config, 0, 1, 4, 6, samples=(4,))


def all_finite(report: Report) -> bool:
    numbers = [*report.metrics.values(), report.objective, report.best_so_far, report.seconds]
    numbers += [value for _, metrics in points_of([report]) for value in metrics.values()]
    return bool(np.isfinite(numbers).all())


def tensors_of(folder: Path, step: int) -> dict[str, Tensor]:
    return Checkpoints(folder / "checkpoints").load(step).tensors

"""What Ray's own schedulers and tables can read from a trial: flat values that never go missing."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_worker, trial_config

from prefopt_ray.results.ledger import request_stop
from prefopt_ray.train import TrialState, Worker, train
from prefopt_ray.tuning.trainable import STOP_POLL_S, PreferenceTrainable

NUMBERS = ("step", "objective/current", "objective/best_so_far", "objective/best_step")
CONFIG = trial_config()


@pytest.fixture(scope="module")
def worker() -> Worker:
    return tiny_worker()


def test_flat_values_are_those_of_the_report(worker: Worker) -> None:
    results = _results(worker)
    reports = list(train(CONFIG, worker))
    assert [result["step"] for result in results] == [report.step for report in reports]
    for result, report in zip(results, reports, strict=True):
        assert result["objective/current"] == report.objective
        assert result["objective/best_so_far"] == report.best_so_far
        assert result["objective/best_step"] == report.best_step
        assert result["verdict"] == report.verdict.headline
        assert result["eval/gain"] == report.metrics["eval/gain"]


def test_the_objective_for_schedulers_never_falls(worker: Worker) -> None:
    best = [result["objective/best_so_far"] for result in _results(worker)]
    assert best == sorted(best) and best[0] == -1.0


def test_a_trial_that_fails_at_once_still_has_finite_numbers(worker: Worker) -> None:
    (result,) = _results(replace(worker, evaluators=[_Broken()]))
    assert "broken on purpose" in result["failure"] and result["done"]
    assert [result[name] for name in NUMBERS] == [0, -1.0, -1.0, -1]


def test_a_paused_trial_keeps_the_numbers_it_had(worker: Worker, tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "a"
    trainable = _open(worker, folder=folder)
    first = trainable.train()
    request_stop(tmp_path)
    time.sleep(STOP_POLL_S)  # it looks for the command that often
    paused = trainable.train()
    assert paused["paused"] and paused["report"] is None
    assert [paused[name] for name in NUMBERS] == [first[name] for name in NUMBERS]
    trainable.stop()


def test_a_reused_process_does_not_inherit_numbers(worker: Worker) -> None:
    trainable = _open(worker)
    _run(trainable)
    trainable.reset({"trial": CONFIG.to_dict(), "folder": None})
    first = trainable.train()
    assert (first["step"], first["objective/best_so_far"], first["objective/best_step"]) == (0, -1.0, -1)
    trainable.stop()


class _Broken:
    def metrics(self, view: Any) -> dict[str, float]:
        raise RuntimeError("broken on purpose")


def _results(worker: Worker) -> list[dict[str, Any]]:
    trainable = _open(worker)
    results = _run(trainable)
    trainable.stop()
    assert all(math.isfinite(result[name]) for result in results for name in NUMBERS)
    return results


def _open(worker: Worker, *, folder: Path | None = None) -> PreferenceTrainable:
    config = {"trial": CONFIG.to_dict(), "folder": folder and str(folder), "open_worker": lambda: worker}
    return PreferenceTrainable(config)


def _run(trainable: PreferenceTrainable) -> list[dict[str, Any]]:
    results = [trainable.train()]
    while not results[-1]["done"]:
        results.append(trainable.train())
    return results


def test_a_new_trial_on_a_warm_worker_starts_in_under_a_tenth_of_a_second(worker: Worker) -> None:
    trainable = _open(worker)
    _run(trainable)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        trainable.reset({"trial": CONFIG.to_dict(), "folder": None})
        TrialState.open(CONFIG, worker)  # what the first result does before it evaluates
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1  # the least of five: a busy machine is not a slow start

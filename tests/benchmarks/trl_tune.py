"""The sweep as a careful person assembles it from Ray Tune and TRL, and the program that runs it.

    python tests/benchmarks/trl_tune.py TASK_FOLDER RESULT.json [--tuned]

*default*: a function trainable, so a fresh process per trial that loads the model; TRL's defaults. *tuned*: actors are
reused with the model loaded, token ids and reference log-probs come through Ray's object store, the reference is scored
once by as many tasks as there are cores, evaluation rows are sorted by length, gradient checkpointing is off.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from ray import tune  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback  # noqa: E402

from benchmarks import trl_arm  # noqa: E402
from benchmarks.sweep_material import Task  # noqa: E402
from prefopt_ray.train.schedule import batch_indices  # noqa: E402
from prefopt_ray.trial import TrialConfig  # noqa: E402

if TYPE_CHECKING:
    from datasets import Dataset

Rows = dict[str, "Dataset"]  # train (in the order of the steps), select, probe


def main() -> None:
    options = _options()
    task = Task.read(options.task)
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as storage:
        results = _fit(task, Path(storage), tuned=options.tuned)
    options.result.write_text(json.dumps(results), encoding="utf-8")


def _fit(task: Task, storage: Path, *, tuned: bool) -> list[dict[str, Any]]:
    rows = _rows(task)
    if tuned:
        rows = _sorted_for_evaluation(_with_reference(task, rows))
        trainable = tune.with_parameters(WarmTrial, model=task.model, rows=rows)
    else:
        trainable = tune.with_parameters(fresh_trial, model=task.model, rows=rows)
    grid = [{"number": number, "trial": trial.to_dict()} for number, trial in enumerate(task.trials)]
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}), param_space={"run": tune.grid_search(grid)},
        tune_config=tune.TuneConfig(reuse_actors=tuned),
        run_config=tune.RunConfig(name="trl", storage_path=str(storage), verbose=0),
    )
    results = tuner.fit()
    if results.num_errors:
        raise results.errors[0]
    return sorted((result.metrics["outcome"] for result in results), key=lambda outcome: outcome["number"])


# -- trials ----------------------------------------------------------------------------------------


def fresh_trial(config: dict[str, Any], model: str, rows: Rows) -> None:
    tune.report({"outcome": _train(config["run"], _load(model), rows, tuned=False)})


class WarmTrial(tune.Trainable):
    """Model, token ids and reference stay; a trial gets a copy of the model, which TRL wraps and patches."""

    def setup(self, config: dict[str, Any], model: str, rows: Rows) -> None:
        self._run, self._rows, self._model = config["run"], rows, _load(model)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._run = new_config["run"]
        return True

    def step(self) -> dict[str, Any]:
        return {"outcome": _train(self._run, copy.deepcopy(self._model), self._rows, tuned=True), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing is kept."""


def _train(run: dict[str, Any], model: PreTrainedModel, rows: Rows, *, tuned: bool) -> dict[str, Any]:
    """One trial to its own stop step: its evaluations, and how long it stepped."""
    torch.set_num_threads(1)
    trl_arm.quiet()
    trial = TrialConfig.from_dict(run["trial"])
    diary = _Diary(trial.evaluation.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_arm.open_trainer(
            model, trial, rows=rows["train"], evaluated={"select": rows["select"], "probe": rows["probe"]},
            settings=trl_arm.TrlSettings(tuned=tuned, folder=folder), callbacks=[diary],
        )
        trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_select_loss" in entry]
    return {
        "number": run["number"], "stepping_s": diary.stepping_s,
        "evaluations": {
            str(entry["step"]): {
                "loss": entry["eval_select_loss"], "logps/chosen": entry["eval_logps/chosen"],
                "logps/rejected": entry["eval_logps/rejected"],
            }
            for entry in evaluations
        },
    }


class _Diary(TrainerCallback):
    """Evaluates at given steps and counts the seconds inside optimizer steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self._steps, self._began = frozenset(steps), 0.0
        self.stepping_s = 0.0

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: object, state: object, control: Any, **kwargs: object) -> None:
        self.stepping_s += time.perf_counter() - self._began
        control.should_evaluate = state.global_step in self._steps


# -- what trials share -----------------------------------------------------------------------------


def _rows(task: Task) -> Rows:
    """Train rows in the order of the steps; all trials have one seed, so one order."""
    training = task.trials[0].training
    order = np.concatenate([
        batch_indices(step, pairs=len(task.parts["train"]), batch=training.batch_pairs, seed=task.trials[0].seed)
        for step in range(training.total_steps)
    ])
    held_out = {name: trl_arm.dataset(task.parts[name]) for name in ("select", "probe")}
    return {"train": trl_arm.dataset(task.parts["train"], order=order.tolist()), **held_out}


def _with_reference(task: Task, rows: Rows) -> Rows:
    """Reference columns, scored by all cores, a share of every length each."""
    shares = max(1, int(ray.cluster_resources()["CPU"]))
    pending = {
        name: [_score.remote(task.model, task.trials[0].to_dict(), part.select(range(first, len(part), shares)))
               for first in range(shares)]
        for name, part in rows.items()
    }
    scored = {}
    for name, part in rows.items():
        logps = np.empty((len(part), 2))
        for first, reference in enumerate(pending[name]):
            logps[first::shares] = ray.get(reference)
        scored[name] = trl_arm.with_reference(part, logps)
    return scored


def _sorted_for_evaluation(rows: Rows) -> Rows:
    """Select and probe with like lengths side by side: an evaluation is a mean, whatever the order."""
    def longest_first(part: "Dataset") -> "Dataset":
        lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in part]
        return part.select(np.argsort(lengths)[::-1])

    return {name: part if name == "train" else longest_first(part) for name, part in rows.items()}


@ray.remote(num_cpus=1)
def _score(model: str, trial: dict[str, Any], rows: "Dataset") -> np.ndarray:
    torch.set_num_threads(1)
    trl_arm.quiet()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl_arm.TrlSettings(tuned=True, folder=folder)
        return trl_arm.reference_logps(_load(model), TrialConfig.from_dict(trial), rows, settings=settings)


def _load(model: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--tuned", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()

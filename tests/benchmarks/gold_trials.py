"""Gold-task trials recorded whole: everything that a later rule, threshold or score could want to read.

A trial is the product's own (`open_worker`'s blueprint, `train`) on a data sample, a data order and sampling noise
that all vary with the seed; the base model is shared. Nothing is stopped, guards only flag. Knows no rule and no
analysis; `gold_table.py` is the command.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from prefopt_ray.gold.base import ensure_gold_base
from prefopt_ray.gold.pairs import SPLITS, gold_rows
from prefopt_ray.measures.verdicts import TrialHistory
from prefopt_ray.prepare import Prepared, open_worker
from prefopt_ray.spec.load import parse_spec
from prefopt_ray.train import Worker, train
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.history import EVALUATIONS_FILE, history_of
from prefopt_ray.trial import Report, TrialConfig

STEPS = 320
EVALUATED = (0, 3, 10, 20, 40, 80, 120, 160, 240, 320)
DONE = "done.json"  # written last: a folder without it is a trial that was cut off

Values = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One trial to make. `adapter` is lora | none (full fine-tuning)."""

    loss: str
    values: Values  # loss parameters and learning_rate
    seed: int
    adapter: str = "lora"
    steps: int = STEPS
    evaluated: tuple[int, ...] = EVALUATED
    select_pairs: int = 2000
    prompts: int = 512  # completions are drawn for, at every evaluation; 0 = none
    data_seed: int | None = None  # None: the seed, which varies data, data order and sampling together

    @property
    def name(self) -> str:
        """A folder's name, and the trial's in every table."""
        values = "-".join(f"{key.replace('learning_rate', 'lr')}{value:g}" for key, value in self.values.items())
        return f"seed{self.seed}-{self.adapter}-{self.loss}-{values}"


@dataclass(frozen=True, eq=False)
class RecordedTrial:
    """What a finished trial's folder holds."""

    folder: Path
    config: TrialConfig
    reports: tuple[Report, ...]
    evaluations: EvaluationLog

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def history(self) -> TrialHistory:
        """As verdicts read it, gold scores included."""
        return history_of(self.evaluations, self.config)

    @cached_property
    def gold(self) -> dict[int, np.ndarray]:
        """Step -> (M,) gold reward of the policy's sample for each prompt."""
        return {record.step: record.samples.scores["gold"].policy for record in self._sampled}

    @property
    def reference_gold(self) -> np.ndarray:
        """(M,) of the reference's samples."""
        return self._sampled[0].samples.scores["gold"].reference

    @property
    def _sampled(self) -> list:
        return [record for record in self.history.evaluations if record.samples is not None]


def record(case: Case, out: Path) -> Path:
    """Train and store one trial, unless it is there; its folder."""
    folder = out / "trials" / case.name
    if (folder / DONE).is_file():
        return folder
    data_seed = case.seed if case.data_seed is None else case.data_seed
    worker, prepared = _worker(out, data_seed, case.select_pairs, case.prompts)
    config = trial_config(case, prepared)
    if folder.exists():
        shutil.rmtree(folder)  # cut off half-way
    folder.mkdir(parents=True)
    reports = [report.to_dict() for report in train(config, worker, folder=folder)]
    if (folder / "checkpoints").exists():  # not of a trial that diverged at once
        shutil.rmtree(folder / "checkpoints")
    partial = folder / "done.partial"
    partial.write_text(json.dumps({"config": config.to_dict(), "reports": reports}), encoding="utf-8")
    partial.replace(folder / DONE)
    return folder


def trial_config(case: Case, prepared: Prepared) -> TrialConfig:
    """The spec's trial, evaluated at the case's steps, with guards that only flag."""
    config = prepared.trial_config(case.loss, case.values)
    sampled = case.evaluated if case.prompts else ()
    return replace(
        config,
        seed=case.seed,
        adapter=replace(config.adapter, kind=case.adapter),
        training=replace(config.training, total_steps=case.steps, stop_step=case.steps),
        evaluation=replace(
            config.evaluation, steps=case.evaluated, sample_steps=sampled, sample_seed=case.seed
        ),
        guards=replace(config.guards, diverged="flag", overfit="flag", drift_limit_per_token=0.5),
    )


def read_trials(out: Path, *, names: str = "*") -> list[RecordedTrial]:
    """Every finished trial whose folder matches, in order of names."""
    folders = sorted(done.parent for done in (out / "trials").glob(f"{names}/{DONE}"))
    return [read_trial(folder) for folder in folders]


def read_trial(folder: Path) -> RecordedTrial:
    done = json.loads((folder / DONE).read_text(encoding="utf-8"))
    return RecordedTrial(
        folder=folder,
        config=TrialConfig.from_dict(done["config"]),
        reports=tuple(Report.from_dict(report) for report in done["reports"]),
        evaluations=EvaluationLog.load(folder / EVALUATIONS_FILE),
    )


@lru_cache(maxsize=2)
def _worker(out: Path, seed: int, select_pairs: int, prompts: int) -> tuple[Worker, Prepared]:
    """The warm worker of one data sample. Rows go through files, as anybody's own pairs would."""
    base = ensure_gold_base(out / "cache")
    sizes = {"train": 1000, "select": select_pairs, "test": 16}  # test is scored by no trial here
    files = {split: _rows_file(out, base, split, sizes[split], seed=seed) for split in SPLITS}
    spec = parse_spec({
        "name": "gold-table",
        "model": {"policy": str(base), "dtype": "float32"},
        "data": {**{split: {"source": str(file)} for split, file in files.items()}, "text": "plain", "max_tokens": 32},
        "training": {"steps": STEPS, "batch_pairs": 64, "warmup": 0},
        "search": {"method": "grid", "losses": {"sigmoid": {"beta": 0.1}}, "shared": {"learning_rate": 3e-4}},
        "scheduler": {"kind": "none"},
        "eval": {"train_probe": 256},
        "samples": {"prompts": max(1, prompts), "max_new_tokens": 16},
        "resources": {"cpus_per_trial": 1, "gpus_per_trial": 0},
        "storage": str(out),
    })
    _, prepared = open_worker(spec)
    return replace(prepared.blueprint, gold=True)(), prepared


def _rows_file(out: Path, base: Path, split: str, pairs: int, *, seed: int) -> Path:
    file = out / "rows" / f"{split}-{pairs}-seed{seed}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        rows = gold_rows(base, split=split, pairs=pairs, seed=seed)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(file)
    return file

"""A trial's best step back in an engine, and out as a folder that `peft` (LoRA) or `transformers` (full) loads."""

from pathlib import Path

from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.train.worker import Worker
from prefopt_ray.trial import TrialConfig


def load_best(config: TrialConfig, worker: Worker, folder: Path, *, best_step: int, slot: int = 0) -> None:
    """Open a slot with the weights that a trial's folder holds for `best_step`. Raises CheckpointError."""
    saved = Checkpoints(folder / "checkpoints").load(best_step)
    worker.engine.open(slot, config)
    worker.engine.load(slot, saved.tensors)


def export(config: TrialConfig, worker: Worker, folder: Path, *, slot: int = 0) -> Path:
    """Write a slot's weights to `folder/adapter`, or `folder/model` after full fine-tuning; that folder."""
    target = folder / ("model" if config.adapter.kind == "none" else "adapter")
    worker.engine.export(slot, target)
    return target

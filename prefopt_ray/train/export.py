"""The weights of a trial's best step as a folder that `peft` (LoRA) or `transformers` (full) loads."""

from pathlib import Path

from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.train.worker import Worker
from prefopt_ray.trial import TrialConfig


def export_best(config: TrialConfig, worker: Worker, folder: Path, *, best_step: int, slot: int = 0) -> Path:
    """Load the checkpoint of `best_step` from a trial's folder into a slot and export it beside it.

    Returns `folder/adapter` or `folder/model`. Raises CheckpointError when the checkpoint is unsound.
    """
    saved = Checkpoints(folder / "checkpoints").load(best_step)
    worker.engine.open(slot, config)
    worker.engine.load(slot, saved.tensors)
    target = folder / ("model" if config.adapter.kind == "none" else "adapter")
    worker.engine.export(slot, target)
    return target

"""Checkpoints: what is kept, what is noticed, and that the log which must survive is cheap to write."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import random_pairs, tiny_worker, trial_config
from train.runs import evaluated_at, run, tensors_of

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.errors import CheckpointError
from prefopt_ray.measures.verdicts import StepRecord
from prefopt_ray.train.checkpoints import Checkpoint, Checkpoints, lock_folder
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.export import export, load_best


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"weights/a": torch.full((3,), float(step))}, {"step": step, "none": None})


def test_only_the_best_and_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints, best = Checkpoints(tmp_path), {0: -1, 1: 1, 2: 1, 4: 4, 6: 4, 8: 4, 10: 4}
    kept = []
    for step, best_step in best.items():
        checkpoints.save(checkpoint(step), keep={best_step})
        kept.append(checkpoints.steps())
    assert kept == [[0], [0, 1], [1, 2], [2, 4], [4, 6], [4, 6, 8], [4, 8, 10]]


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(3), keep=())
    loaded = checkpoints.load(3)
    assert (loaded.step, loaded.state) == (3, checkpoint(3).state)
    assert torch.equal(loaded.tensors["weights/a"], checkpoint(3).tensors["weights/a"])
    assert Checkpoints(tmp_path / "nothing").latest() is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(3), keep=())
    checkpoints.save(Checkpoint(3, checkpoint(7).tensors, {"step": 3}), keep=())
    assert float(checkpoints.load(3).tensors["weights/a"][0]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_unreadable_newer_checkpoints_never_push_out_sound_ones(tmp_path: Path) -> None:
    """A trial continued from step 2 because 4 and 8 were damaged must still find what it saves at 3."""
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 8):
        checkpoints.save(checkpoint(step), keep={2})
    for step in (4, 8):
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    assert checkpoints.latest().step == 2
    checkpoints.save(checkpoint(3), keep={2})
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.latest().step == 3


def wrong_format(manifest: dict) -> dict:
    return manifest | {"format": 99}


def no_hashes(manifest: dict) -> dict:
    return {"format": 1, "step": 3}


def other_hash(manifest: dict) -> dict:
    return manifest | {"sha256": {"tensors.safetensors": "0" * 64}}


@pytest.mark.parametrize(
    ("change", "why"),
    [(wrong_format, "format 99, this version reads 1"), (no_hashes, "torn or unreadable"),
     (other_hash, "does not match its sha256")],
)
def test_an_unsound_checkpoint_says_why(change: Callable[[dict], dict], why: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(3), keep=())
    manifest = tmp_path / "step-00000003" / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(CheckpointError, match=why):
        checkpoints.load(3)


def test_a_checkpoint_holds_nothing_pickled(tmp_path: Path) -> None:
    run(evaluated_at(trial_config(steps=2), 0, 2), folder=tmp_path)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"evaluations.safetensors", "tensors.safetensors", "state.json", "manifest.json", ".lock"}


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_best_step_is_exported_whatever_came_after(adapter: str, tmp_path: Path) -> None:
    config = evaluated_at(trial_config(adapter=adapter, steps=6, learning_rate=1e-2), 0, *range(1, 7))
    reports = run(config, folder=tmp_path)
    best = max(reports[1:], key=lambda report: report.objective)
    assert reports[-1].best_step == best.step
    worker = tiny_worker()
    load_best(config, worker, tmp_path, best_step=best.step)
    target = export(config, worker, tmp_path)
    assert target.name == {"lora": "adapter", "none": "model"}[adapter]
    saved = tensors_of(tmp_path, best.step)
    (weights,) = target.glob("*.safetensors")

    def in_some_order(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:  # names differ by a prefix
        return sorted(tensors, key=lambda tensor: (tensor.numel(), tensor.sum().item()))

    wanted = in_some_order(tensor for name, tensor in saved.items() if name.startswith("weights/"))
    got = in_some_order(load_file(weights).values())
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_two_thousand_steps_and_ten_evaluations_of_four_thousand_pairs_are_written_in_a_blink(tmp_path: Path) -> None:
    """The whole log of a long trial, to the disk and back; 0.5 s allowed, 0.01 s when measured."""
    pairs = ReferencedPairs(random_pairs(4000), np.zeros((4000, 2), dtype=np.float32))
    log = EvaluationLog.of_parts({"select": pairs, "probe": pairs.take(np.arange(512))})
    for step in range(10):
        log.add("select", step, np.zeros((4000, 2), dtype=np.float32))
        log.add("probe", step, np.zeros((512, 2), dtype=np.float32))
    steps = [StepRecord(step, 0.69 / step, 1.0 / step, 0.1 * step, finite=True) for step in range(1, 2001)]
    start = time.process_time()
    log.put_steps(steps)
    log.save(tmp_path / "evaluations.safetensors")
    taken = time.process_time() - start
    print(taken, (tmp_path / "evaluations.safetensors").stat().st_size)
    assert EvaluationLog.load(tmp_path / "evaluations.safetensors").step_records() == steps
    assert taken < 0.5


def test_a_trial_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(CheckpointError, match="another process is training this trial"):
        lock_folder(tmp_path, wait_s=0.2)
    held.close()
    lock_folder(tmp_path, wait_s=0.0).close()

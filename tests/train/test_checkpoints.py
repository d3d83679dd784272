"""Checkpoints: what is kept, what is noticed, and that the state which must survive is cheap to write."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_worker, trial_config
from train.runs import evaluated_at, run, tensors_of

from prefopt_ray.errors import CheckpointError
from prefopt_ray.measures.verdicts import StepRecord
from prefopt_ray.train import TrialState
from prefopt_ray.train.checkpoints import Checkpoint, Checkpoints, lock_folder
from prefopt_ray.train.export import export, load_best


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"weights/a": torch.full((3,), float(step))}, {"step": step, "none": None})


def test_only_the_best_and_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints, best = Checkpoints(tmp_path), {0: -1, 1: 1, 2: 1, 4: 4, 6: 4, 8: 4, 10: 4}
    kept = []
    for step, best_step in best.items():
        checkpoints.save(checkpoint(step), best_step=best_step)
        kept.append(checkpoints.steps())
    assert kept == [[0], [0, 1], [1, 2], [2, 4], [4, 6], [4, 6, 8], [4, 8, 10]]


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(3), best_step=-1)
    loaded = checkpoints.load(3)
    assert (loaded.step, loaded.state) == (3, checkpoint(3).state)
    assert torch.equal(loaded.tensors["weights/a"], checkpoint(3).tensors["weights/a"])
    assert Checkpoints(tmp_path / "nothing").latest() is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(3), best_step=-1)
    checkpoints.save(Checkpoint(3, checkpoint(7).tensors, {"step": 3}), best_step=-1)
    assert float(checkpoints.load(3).tensors["weights/a"][0]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_unreadable_newer_checkpoints_never_push_out_sound_ones(tmp_path: Path) -> None:
    """A trial continued from step 2 because 4 and 8 were damaged must still find what it saves at 3."""
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 8):
        checkpoints.save(checkpoint(step), best_step=2)
    for step in (4, 8):
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    assert checkpoints.latest().step == 2
    checkpoints.save(checkpoint(3), best_step=2)
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
    checkpoints.save(checkpoint(3), best_step=-1)
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


def test_state_after_five_thousand_steps_is_written_in_a_blink() -> None:
    """Everything but the weights, through JSON and back; 0.2 s allowed, 0.016 s when measured."""
    trial = TrialState.open(trial_config(), tiny_worker())
    trial._history.steps.extend(
        StepRecord(step, 0.69 / step, 1.0 / step, 0.1 * step, finite=True) for step in range(1, 5001)
    )
    start = time.process_time()
    text = json.dumps(trial.state())
    taken = time.process_time() - start
    trial.load(json.loads(text))
    assert trial._history.steps[-1] == StepRecord(5000, 0.69 / 5000, 1.0 / 5000, 500.0, finite=True)
    assert taken < 0.2
    assert len(text) < 1_000_000


def test_a_trial_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(CheckpointError, match="another process is training this trial"):
        lock_folder(tmp_path, wait_s=0.2)
    held.close()
    lock_folder(tmp_path, wait_s=0.0).close()

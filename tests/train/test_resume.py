"""A trial that is interrupted and continued is the same trial, to the last bit, wherever it was cut."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_worker
from train.runs import (
    assert_same_folders,
    assert_same_reports,
    interrupt_after,
    run,
    run_in_pieces,
    short_config,
)

from prefopt_ray.errors import CheckpointError
from prefopt_ray.train import TrialState, Worker, train
from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.trial import TrialConfig


@pytest.fixture(scope="module", params=["lora", "none"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    config, folder = short_config(request.param), tmp_path_factory.mktemp("uninterrupted")
    return config, folder, run(config, folder=folder)


@pytest.mark.parametrize("cut", range(6))
def test_cut_at_any_step(uninterrupted: tuple, cut: int, tmp_path: Path) -> None:
    config, folder, expected = uninterrupted
    assert_same_reports(run_in_pieces(config, tmp_path, pieces=[cut]), expected)
    assert_same_folders(tmp_path, folder)


def test_cut_after_every_single_step(uninterrupted: tuple, tmp_path: Path) -> None:
    config, folder, expected = uninterrupted
    assert_same_reports(run_in_pieces(config, tmp_path, pieces=[1] * 6), expected)
    assert_same_folders(tmp_path, folder)


def test_continued_on_a_worker_that_trained_another_trial_meanwhile(uninterrupted: tuple, tmp_path: Path) -> None:
    config, folder, expected = uninterrupted
    worker = tiny_worker()

    def warm() -> Worker:
        run(short_config(config.adapter.kind, seed=9), worker)
        return worker

    assert_same_reports(run_in_pieces(config, tmp_path, pieces=[3], worker=warm), expected)
    assert_same_folders(tmp_path, folder)


def test_continued_where_more_memory_is_free_its_batches_are_still_cut_as_they_were(tmp_path: Path) -> None:
    """Another cut adds up in another order."""
    config = short_config("lora")
    config = replace(config, training=replace(config.training, micro_batch_pairs=None))
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    expected = run(config, _worker_with_room_for(12), folder=whole)
    workers = iter([_worker_with_room_for(12), _worker_with_room_for(4096)])
    assert_same_reports(run_in_pieces(config, cut, pieces=[3], worker=lambda: next(workers)), expected)
    assert_same_folders(cut, whole)
    run(config, _worker_with_room_for(4096), folder=other)
    uncut, kept = (Checkpoints(folder / "checkpoints").latest().tensors for folder in (other, whole))
    assert any(not torch.equal(uncut[name], tensor) for name, tensor in kept.items())


def _worker_with_room_for(tokens: int) -> Worker:
    worker = tiny_worker()
    worker.engine.plan = replace(worker.engine.plan, micro_batch_tokens=tokens)
    return worker


def test_a_finished_trial_says_its_last_report_again_and_trains_no_more(uninterrupted: tuple, tmp_path: Path) -> None:
    config, folder, expected = uninterrupted
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert_same_reports(list(train(config, tiny_worker(), folder=copy)), expected[-1:])
    assert_same_folders(copy, folder)


def test_the_process_may_die_between_a_report_and_the_next_step(uninterrupted: tuple, tmp_path: Path) -> None:
    """Nothing is saved on the way out: what was reported is what is on disk."""
    config, folder, expected = uninterrupted
    for reports_seen in (1, 3):
        place = tmp_path / str(reports_seen)
        dying = train(config, tiny_worker(), folder=place)
        for _ in range(reports_seen):
            next(dying)
        dying.close()
        reports = list(train(config, tiny_worker(), folder=place))
        assert_same_reports(reports, expected[reports_seen - 1 :])
        assert_same_folders(place, folder)


# -- damage ------------------------------------------------------------------------------------------


def truncate_tensors(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte_of_the_tensors(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))


def flip_a_byte_of_the_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))


def delete_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "st')


def replace_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def delete_the_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


DAMAGE = [
    truncate_tensors, flip_a_byte_of_the_tensors, flip_a_byte_of_the_state, delete_the_manifest, cut_the_manifest,
    replace_the_manifest, delete_the_tensors,
]


def interrupted_at_four(config: TrialConfig, folder: Path) -> None:
    list(train(config, tiny_worker(), folder=folder, interrupted=interrupt_after(4)))
    assert Checkpoints(folder / "checkpoints").steps()[-2:] == [1, 4]


@pytest.fixture(scope="module")
def cut_at_four(uninterrupted: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    interrupted_at_four(uninterrupted[0], folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_end_is_the_same(
    uninterrupted: tuple, cut_at_four: Path, damage: Callable[[Path], None], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, folder, expected = uninterrupted
    place = shutil.copytree(cut_at_four, tmp_path / "damaged")
    damage(place / "checkpoints" / "step-00000004")
    with caplog.at_level(logging.WARNING):
        reports = list(train(config, tiny_worker(), folder=place))
    assert "step-00000004" in caplog.text and "using the checkpoint before it" in caplog.text
    assert_same_reports(reports, expected[1:])  # step 1's again, then 4 and 6
    assert_same_folders(place, folder)


def test_evaluations_later_than_the_checkpoint_are_forgotten(
    uninterrupted: tuple, cut_at_four: Path, tmp_path: Path
) -> None:
    """Else verdicts would read the evaluation at step 4 twice."""
    place = shutil.copytree(cut_at_four, tmp_path / "damaged")
    delete_the_manifest(place / "checkpoints" / "step-00000004")
    trial = TrialState.open(uninterrupted[0], tiny_worker(), folder=place)
    assert [record.step for record in trial._history.evaluations] == [0, 1]


def test_when_every_checkpoint_is_damaged_the_trial_starts_again(
    uninterrupted: tuple, cut_at_four: Path, tmp_path: Path
) -> None:
    config, folder, expected = uninterrupted
    place = shutil.copytree(cut_at_four, tmp_path / "damaged")
    for checkpoint in (place / "checkpoints").iterdir():
        delete_the_manifest(checkpoint)
    assert_same_reports(list(train(config, tiny_worker(), folder=place)), expected)
    assert_same_folders(place, folder)


def test_what_a_killed_process_left_half_written_does_no_harm_and_goes(
    uninterrupted: tuple, cut_at_four: Path, tmp_path: Path
) -> None:
    config, folder, expected = uninterrupted
    place = shutil.copytree(cut_at_four, tmp_path / "killed")
    half = place / "checkpoints" / ".step-00000006.12345.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    (place / "evaluations.tmp").write_bytes(b"half")
    assert_same_reports(list(train(config, tiny_worker(), folder=place)), expected[2:])
    assert_same_folders(place, folder)
    assert not half.exists()


def test_a_folder_of_another_configuration_is_refused(cut_at_four: Path, uninterrupted: tuple, tmp_path: Path) -> None:
    config = uninterrupted[0]
    place = shutil.copytree(cut_at_four, tmp_path / "other")
    other = short_config(config.adapter.kind, seed=3)
    with pytest.raises(CheckpointError, match="another configuration"):
        next(train(other, tiny_worker(), folder=place))

"""The ledger: appended, read back, torn ends tolerated and nothing else."""

from pathlib import Path

import pytest
from sweep_folder import write_sweep

from prefopt_ray.errors import SweepError
from prefopt_ray.results.ledger import Ledger, read_sweep
from prefopt_ray.trial import EndState


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"0000": 0.5, "0001": 0.2})
    assert [t.end_state for t in sweep.trials.values()] == [EndState.COMPLETED] * 2
    assert sweep.baseline.trial_id == "0000" and sweep.state_counts == "2 completed"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_left_out_and_cut_before_the_next_append(tmp_path: Path, cut: int) -> None:
    write_sweep(tmp_path, {"0000": 0.5})
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_sweep(tmp_path).tested == {}  # the torn event was the last one
    ledger = Ledger(path)
    ledger.append("tested", trial="0000", step=4)
    ledger.close()
    assert read_sweep(tmp_path).tested == {"0000": 4}


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"0000": 0.5})
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    with pytest.raises(SweepError, match=r"ledger.jsonl:2"):
        read_sweep(tmp_path)


def test_a_folder_without_a_ledger_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="prefopt list"):
        read_sweep(tmp_path)

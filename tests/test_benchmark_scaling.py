"""The benchmarks that need a quiet machine or a GPU still run, in their smallest form, and judge as they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, scaling_pairs, scaling_trials
from benchmarks.model_shapes import ModelShape, random_model
from benchmarks.packing_probe import Bench, difference, isolates
from benchmarks.pair_lengths import LengthShape, random_pairs

TESTS = Path(__file__).parent
HOLD_40_MIB = """
import torch
from benchmarks.memory_clock import forget_peak, peak_bytes, resident_bytes
forget_peak()
before = resident_bytes()
torch.ones(40 * 2**20, dtype=torch.uint8).max()
print(peak_bytes() - before)
"""
TINY = ModelShape("tiny", 2, 32, 64, 4, 2, 64)


def test_the_gpu_benchmark_runs_on_a_cpu_and_its_engines_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--model", "tiny", "--lengths", "hh", "--rounds", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--json", str(out)])
    assert gpu.main() == 0
    found = json.loads(out.read_text())
    assert found["parity"]["agrees"] and not found["void"]
    assert found["parity"]["margin_at_start"] < 1e-3
    assert found["engines"]["auto"]["tokens_per_s"] > 0


def test_packed_trials_step_as_they_would_alone_and_a_nan_stays_with_its_own() -> None:
    lengths = LengthShape("few", 12, 6, 5, batch_pairs=3, prompt_spread=0.5, completion_spread=0.5).draw(3)
    model = random_model(TINY, device=torch.device("cpu"))
    bench = Bench(model, random_pairs(lengths, vocabulary=TINY.vocabulary), trials=3)
    assert difference(bench) < 1e-4
    assert isolates(bench)


def test_cost_per_added_trial_is_that_of_the_counts_between() -> None:
    late = {1: 0, 8: 0, 16: 8, 64: 8}
    runs = {count: {"cpu_s": 30.0 + 20.0 * count + more, "lost": 0.04} for count, more in late.items()}
    marginal = scaling_trials.marginal_costs(runs)
    assert marginal == {8: 20.0, 16: 21.0, 64: 20.0}
    judged = scaling_trials.judge(runs, marginal)
    assert [verdict["met"] for verdict in judged.values()] == [True, True]
    assert round(judged["CPU seconds per additional trial differ by"]["found"], 9) == 0.05


def test_a_stage_that_grows_with_the_square_of_the_pairs_is_missed() -> None:
    def run(pairs: int, power: int) -> dict[str, object]:
        return {"seconds": {stage: (pairs / 1_000) ** power for stage in scaling_pairs.STAGES}}

    for power, met in ((1, True), (2, False)):
        judged = scaling_pairs.judge({pairs: run(pairs, power) for pairs in (100, 1_000, 10_000)})
        assert {verdict["met"] for verdict in judged.values()} == {met}


def test_the_memory_clock_sees_what_was_held_for_a_moment() -> None:
    """In a process of its own, as the benchmarks measure: a long test run has freed memory that is still resident."""
    seen = subprocess.run([sys.executable, "-c", HOLD_40_MIB], cwd=TESTS, capture_output=True, text=True, check=True)
    assert 35 * 2**20 < int(seen.stdout) < 60 * 2**20

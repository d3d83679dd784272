"""What every stage before the trials costs with more pairs, and a trial's step: seconds per 1,000 pairs, and memory.

Each number of pairs in a fresh process, so that its peak memory is its own. A very small model: what grows with pairs
is the point, not the model. See scaling.py for the command.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import save_chat_model

from benchmarks.memory_clock import peak_bytes, resident_bytes
from prefopt_ray.prepare import cache_folder, open_worker, prepare
from prefopt_ray.spec import SweepSpec
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.train.state import TrialState

WORDS = "time year people way day man thing woman life child world school state family student group".split()
BATCH_PAIRS, STEPS = 8, 20  # of the trial whose steps are timed
HELD_OUT = 64  # select and test pairs, fixed: what grows is the train part
MOST_GROWTH = 1.5  # of a stage's seconds per pair from the last count but one to the last; quadratic would be 10
JUDGED_FROM = 1_000  # pairs: below, opening files and the model is what is measured
STAGES = ("tokenise", "from cache", "reference pass", "reference from cache", "epoch of batches")


def measure(counts: Sequence[int], out: Path) -> dict[str, Any]:
    """Nothing is kept: the largest count takes a few minutes."""
    runs = {}
    for count in counts:
        runs[count] = json.loads(subprocess.run(
            [sys.executable, "-c", _CHILD.format(path=sys.path[:2], pairs=count)],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()[-1])
        print(f"{count} pairs: {sum(runs[count]['seconds'].values()):.1f} CPU seconds", flush=True)
    return {"runs": runs, "judged": judge(runs)}


def table(result: dict[str, Any]) -> str:
    lines = ["\nCPU seconds per 1,000 pairs", f"  {'pairs':>8}" + "".join(f"{stage:>22}" for stage in STAGES)
             + f"{'step ms':>10}{'peak MiB over start':>21}"]
    for count, run in result["runs"].items():
        per_thousand = "".join(f"{1000 * run['seconds'][stage] / int(count):22.3f}" for stage in STAGES)
        lines.append(f"  {count:>8}{per_thousand}{1000 * run['step_s']:10.1f}{run['peak_bytes'] / 2**20:21.0f}")
    return "\n".join(lines)


def stages(pairs: int) -> dict[str, Any]:
    """All stages once on so many train pairs, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="prefopt-benchmark-") as home:
        spec = _spec(Path(home), pairs=pairs)
        start = resident_bytes()
        seconds = {}
        prepared, seconds["tokenise"] = _timed(lambda: _prepared(spec))
        _, seconds["from cache"] = _timed(lambda: _prepared(spec))
        cache = cache_folder(spec) / "reference"
        data = prepared.loaded.data
        _, seconds["reference pass"] = _timed(lambda: prepared.blueprint.with_reference(data, cache=cache))
        _, seconds["reference from cache"] = _timed(lambda: prepared.blueprint.with_reference(data, cache=cache))
        _, seconds["epoch of batches"] = _timed(lambda: _epoch(pairs))
        worker, prepared = open_worker(spec)
        trial = TrialState.open(prepared.trial_config("sigmoid", {"beta": 0.1, "learning_rate": 1e-5}), worker)
        worker.engine.step([trial])
        _, stepping = _timed(lambda: [worker.engine.step([trial]) for _ in range(STEPS - 1)])
        return {"seconds": seconds, "step_s": stepping / (STEPS - 1), "peak_bytes": peak_bytes() - start}


_CHILD = """
import json, sys
sys.path[:0] = {path}
from benchmarks.scaling_pairs import stages
print(json.dumps(stages({pairs})))
"""


def _epoch(pairs: int) -> None:
    """Which rows each step of an epoch takes."""
    for step in range(pairs // BATCH_PAIRS):
        batch_indices(step, pairs=pairs, batch=BATCH_PAIRS, seed=0)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    done = work()
    return done, time.process_time() - began


def _prepared(spec: SweepSpec) -> Any:
    return prepare(spec, stage=lambda name: lambda done, total: None, device="cpu", threads=1)


def _spec(home: Path, *, pairs: int) -> SweepSpec:
    model = save_chat_model(home / "model")
    train = home / "pairs.jsonl"
    rng = np.random.default_rng(0)
    with train.open("w", encoding="utf-8") as file:
        for number in range(pairs + 2 * HELD_OUT):
            prompt, chosen, rejected = (" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(3))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "chosen": chosen, "rejected": rejected}) + "\n")
    return SweepSpec.from_dict({
        "name": "pairs", "model": {"policy": str(model), "dtype": "float32"},
        "data": {
            "train": {"source": str(train)}, "select": {"from": "train", "pairs": HELD_OUT},
            "test": {"from": "train", "pairs": HELD_OUT},
        },
        "training": {"steps": STEPS, "batch_pairs": BATCH_PAIRS}, "eval": {"train_probe": HELD_OUT},
        "samples": {"at": "never"}, "search": {"trials_per_loss": 1, "losses": {"sigmoid": {}}},
        "storage": str(home / "results"),
    })


def judge(runs: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every stage between the two largest counts."""
    large = [count for count in sorted(runs) if count >= JUDGED_FROM][-2:]
    if len(large) < 2:
        return {}
    fewer, more = large
    out = {}
    for stage in STAGES:
        growth = (runs[more]["seconds"][stage] / more) / (runs[fewer]["seconds"][stage] / fewer)
        verdict = {"found": growth, "at_most": MOST_GROWTH, "met": growth <= MOST_GROWTH}
        out[f"{stage}, times as dear per pair"] = verdict
    return out

"""Running `prefopt` as a person does, in a process of its own, on a tiny chat model and made-up pairs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefopt_ray.results.ledger import SweepRecord, read_sweep

WORDS = "time year people way day man thing woman life child world school state family student group".split()


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def prefopt(*arguments: str, cwd: Path, timeout_s: float = 600) -> Outcome:
    done = subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """In a process group of its own, so that Ctrl-C reaches it and nothing else."""
    with (cwd / "started.log").open("w") as log:
        return subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(), stdout=log, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefopt_ray.cli", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "80"}


def wait_for(sweep_ready: Callable[[SweepRecord], bool], storage: Path, process: subprocess.Popen[str]) -> SweepRecord:
    """Until the ledger of the only sweep in `storage` shows it, while the process lives."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        folders = list(storage.glob("*/ledger.jsonl"))
        if folders:
            sweep = read_sweep(folders[0].parent)
            if sweep_ready(sweep):
                return sweep
        assert process.poll() is None, "the process ended before the sweep was ready"
        time.sleep(0.05)
    raise AssertionError("the sweep was never ready")


def interrupt(process: subprocess.Popen[str], *, how: signal.Signals) -> int:
    """A signal to the driver alone for SIGKILL; to its whole group for Ctrl-C, as a terminal does."""
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    return process.wait(timeout=300)


def write_pairs(path: Path, *, count: int = 160, seed: int = 0) -> Path:
    """Pairs whose chosen answer repeats a word of the question: learnable by a tiny model."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number in range(count):
            asked, other = rng.choice(WORDS, 2, replace=False)
            row = {
                "prompt": f"{number}: {asked}?",
                "chosen": f"{asked} {asked}",
                "rejected": f"{other} {rng.choice(WORDS)}",
            }
            file.write(json.dumps(row) + "\n")
    return path


def spec_text(model_folder: Path, pairs_file: Path, **changes: str) -> str:
    sections = {
        "name": "journey",
        "model": f"{{policy: {model_folder}, dtype: float32, adapter: {{kind: lora, rank: 4, alpha: 8}}}}",
        "data": f"{{train: {{source: {pairs_file}}}, max_tokens: 64}}",
        "training": "{steps: 60, batch_pairs: 8, warmup: 0}",
        "search": "{method: grid, losses: {sigmoid: {beta: [0.1, 0.5]}, ipo_sum: {beta: 0.05}},"
                  " shared: {learning_rate: [1e-3, 1e-2]}, baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}",
        "scheduler": "{kind: none}",
        "eval": "{at: [0, 1%, 25%, 50%, 75%], train_probe: 32}",
        "samples": "{at: [50%, 100%], prompts: 8, max_new_tokens: 8}",
        "resources": "{gpus_per_trial: 0}",
        "storage": "prefopt-results",
    }
    return "".join(f"{key}: {value}\n" for key, value in (sections | changes).items())

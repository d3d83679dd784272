"""Peak memory of a training step over the loaded model, by length and vocabulary, against what is predicted.

    python tests/benchmarks/memory.py [--tokens 128 1024 4096] [--vocabulary 8192 32000 128000] [--json FILE]
    python tests/benchmarks/memory.py --device cuda --model qwen2.5-0.5b --tokens 1024 4096

Every step in a fresh process: resident memory on a CPU, the allocator's peak on a GPU. Predicted: what autograd keeps
per token (measured by the engine on one pair of 384 tokens) times the tokens of the largest forward, and gradients
and moments of the adapter. What is not in it: the head's chunk of logits, kernels' workspaces, fragmentation.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.memory_clock import forget_peak, peak_bytes, resident_bytes  # noqa: E402
from benchmarks.model_shapes import MODELS, random_model  # noqa: E402
from benchmarks.pair_lengths import random_pairs  # noqa: E402
from benchmarks.scaling_length import even_lengths  # noqa: E402
from benchmarks.step_arms import open_engine, step_trial  # noqa: E402
from benchmarks.timing import machine  # noqa: E402
from prefopt_ray.engine.base import ReferencedPairs  # noqa: E402
from prefopt_ray.engine.batches import shared_lengths  # noqa: E402
from prefopt_ray.engine.local import LocalEngine  # noqa: E402
from prefopt_ray.engine.memory import GRADIENT_AND_MOMENTS  # noqa: E402
from prefopt_ray.pairs.tokens import PairTokens  # noqa: E402
from prefopt_ray.train.state import TrialState  # noqa: E402
from prefopt_ray.train.worker import make_worker  # noqa: E402
from prefopt_ray.trial import TrialConfig  # noqa: E402

ENGINES = ("auto", "plain")
STEP_TOKENS = 2048  # of a step, or one pair; always one forward
STEPS = 3  # the moments are there from the first one on


def main() -> int:
    options = _options()
    rows = []
    for vocabulary in options.vocabulary or [MODELS[options.model].vocabulary]:
        for tokens in options.tokens:
            for engine in ENGINES:
                rows.append(_in_fresh_process(options, engine=engine, tokens=tokens, vocabulary=vocabulary))
                print(_row(rows[-1]), flush=True)
    line = json.dumps({"benchmark": "memory", "model": options.model, "rows": rows,
                       "machine": machine(torch.device(options.device))})
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


def measure(model: str, *, engine: str, tokens: int, vocabulary: int, device: str) -> dict[str, object]:
    """A few steps in this process, which has done nothing yet. Bytes over the loaded model."""
    torch.set_num_threads(1)
    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    shape = replace(MODELS[model], vocabulary=vocabulary)
    lengths = even_lengths(tokens, pairs=max(1, STEP_TOKENS // tokens))
    trial = step_trial(steps=STEPS, batch_pairs=len(lengths))
    trial = replace(trial, training=replace(trial.training, micro_batch_pairs=len(lengths)))  # one forward
    opened = open_engine(engine, random_model(shape, device=place, dtype=dtype), trial=trial)
    rows = random_pairs(lengths, vocabulary=vocabulary)
    # A short step first: libraries load their code and take their workspaces at the first product they make.
    _steps(opened, trial, random_pairs(even_lengths(16, pairs=len(lengths)), vocabulary=vocabulary))
    opened.open(0, trial)
    gc.collect()
    loaded = _begin(place)
    _steps(opened, trial, rows)
    peak = _peak(place) - loaded
    weights = sum(t.nbytes for name, t in opened.state(0).items() if name.startswith("weights/"))
    kept, forward = opened.kept(0).per_token, int(shared_lengths(rows).sum())
    return {
        "engine": opened.plan.engine, "tokens": tokens, "pairs": len(lengths), "vocabulary": vocabulary,
        "forward_tokens": forward, "kept_bytes_per_token": kept, "peak_bytes": peak,
        "predicted_bytes": kept * forward + GRADIENT_AND_MOMENTS * weights,
    }


def _steps(engine: LocalEngine, trial: TrialConfig, rows: PairTokens) -> None:
    pairs = ReferencedPairs(rows, np.zeros((len(rows), 2), dtype=np.float32))  # what it holds changes no memory
    worker = make_worker(
        engine, {part: pairs for part in ("train", "select", "test")}, decode=str, probe_pairs=1, sample_prompts=1,
        reference_is_start=False,
    )
    state = TrialState.open(trial, worker)
    for _ in range(STEPS):
        engine.step([state])


_CHILD = """
import json, sys
sys.path[:0] = {path}
from benchmarks.memory import measure
print(json.dumps(measure({model!r}, engine={engine!r}, tokens={tokens}, vocabulary={vocabulary}, device={device!r})))
"""


def _in_fresh_process(options: argparse.Namespace, *, engine: str, tokens: int, vocabulary: int) -> dict[str, object]:
    code = _CHILD.format(
        path=sys.path[:2], model=options.model, engine=engine, tokens=tokens, vocabulary=vocabulary,
        device=options.device,
    )
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=quiet)
    return json.loads(done.stdout.splitlines()[-1])


def _begin(device: torch.device) -> int:
    """Bytes now; the peak is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    forget_peak()
    return resident_bytes()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def _row(row: Mapping[str, object]) -> str:
    peak, predicted = (row[name] / 2**20 for name in ("peak_bytes", "predicted_bytes"))
    what = f"vocabulary {row['vocabulary']:>6}, {row['pairs']:>2} pairs of {row['tokens']:>5} tokens"
    return (
        f"{what}, {row['engine']:<5}: peak {peak:7.0f} MiB, predicted {predicted:7.0f} MiB ({peak / predicted:.2f}); "
        f"{row['kept_bytes_per_token'] / 1000:.0f} kB kept per token"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small-8k")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096], help="of a pair")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="instead of the model's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the JSON line there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""How near the flat engine comes to the machine's matrix-multiply peak, on random weights of a real model's shape.

    python tests/benchmarks/gpu.py --model qwen2.5-0.5b|llama-3.2-1b|7b --lengths hh|512-256 [--json FILE]
    python tests/benchmarks/gpu.py --device cpu --model tiny --lengths hh

Base in bfloat16, adapters and optimizer in float32 (on a CPU all float32). Losses and gradient norms of the flat engine
must lie within the plain engine's own spread, and the step-0 margin below 0.01 nats, or nothing is timed and the exit
code is 1. Needs torch, transformers and peft only. Against TRL see step.py, which also runs on a GPU.
"""

import argparse
import gc
import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.flops import necessary_flops  # noqa: E402
from benchmarks.model_shapes import MODELS, ModelShape, random_model  # noqa: E402
from benchmarks.pair_lengths import SHAPES, LengthShape, pair_lengths, random_pairs  # noqa: E402
from benchmarks.parity import FLOAT32, Difference, Limits, largest_relative  # noqa: E402
from benchmarks.step_arms import RANK, OurArm, StepRun, Workbench, row_order, step_trial  # noqa: E402
from benchmarks.timing import machine, matmul_peak, paired_ratio  # noqa: E402

TINY = ModelShape("tiny", 2, 64, 128, 4, 2, 512)
SHAPES_OF_MODELS = {
    "tiny": TINY, "qwen2.5-0.5b": MODELS["qwen2.5-0.5b"], "llama-3.2-1b": MODELS["llama-3.2-1b"],
    "7b": MODELS["qwen2.5-7b"],
}
ENGINES = ("auto", "plain")
LARGEST_MARGIN = 1e-2  # nats at step 0, mean of the first batch; exact would be 0
SPREAD_ALLOWED = 3.0  # times the plain engine's own: one pair of runs is a small sample of it
LEAST = Limits(loss=2e-3, grad_norm=2e-2)  # of bfloat16, where the spread happens to be nothing


@dataclass(frozen=True)
class Measured:
    """One engine's rounds."""

    engine: str  # which one it became
    step_s: tuple[float, ...]
    working_bytes: int  # at the peak, over what was resident before the step


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    shape, lengths = SHAPES_OF_MODELS[options.model], SHAPES[options.lengths]
    bench = _workbench(shape, lengths, device, steps=options.steps)
    result: dict[str, object] = {"model": shape.name, "lengths": lengths.name, "batch_pairs": lengths.batch_pairs}
    result |= {"parity": _parity(bench, options.steps)}
    void = not result["parity"]["agrees"]
    if not void:
        result |= _rates(bench, shape, rounds=options.rounds, steps=options.steps)
    line = json.dumps({"benchmark": "gpu", "void": void, "machine": machine(device), **result})
    print(_table(result))
    print(line)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    return 1 if void else 0


def _workbench(shape: ModelShape, lengths: LengthShape, device: torch.device, *, steps: int) -> Workbench:
    """Rows for exactly the steps made; those that are timed are typical of the lengths."""
    trial = step_trial(steps=steps, batch_pairs=lengths.batch_pairs)
    in_order = np.concatenate([lengths.draw(lengths.batch_pairs), lengths.draw_typical(steps - 1)])
    drawn = np.empty_like(in_order)
    drawn[row_order(trial, len(in_order))] = in_order
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pairs = random_pairs(drawn, vocabulary=shape.vocabulary)
    return Workbench(random_model(shape, device=device, dtype=dtype), pairs, trial, device)


# -- parity ----------------------------------------------------------------------------------------


def _parity(bench: Workbench, steps: int) -> dict[str, object]:
    """Flat against plain, and plain against itself with its batches cut in two."""
    half = max(1, bench.trial.training.batch_pairs // 2)
    flat, plain = (_run_once(bench, engine, steps=steps) for engine in ENGINES)
    spread = _difference(_run_once(bench, "plain", steps=steps, micro_batch_pairs=half), plain)
    found, limits = _difference(flat, plain), FLOAT32
    if bench.dtype is torch.bfloat16:
        limits = Limits(
            max(LEAST.loss, SPREAD_ALLOWED * spread.loss), max(LEAST.grad_norm, SPREAD_ALLOWED * spread.grad_norm)
        )
    beta = bench.trial.loss_params["beta"]
    margin = 2 * abs(flat.losses[0] - math.log(2)) / beta  # -log sigmoid(beta h) = ln 2 - beta h / 2 near zero
    return {
        "loss": found.loss, "grad_norm": found.grad_norm, "limits": [limits.loss, limits.grad_norm],
        "plain_spread": [spread.loss, spread.grad_norm], "margin_at_start": margin,
        "agrees": found.within(limits) and margin <= LARGEST_MARGIN,
    }


def _run_once(bench: Workbench, engine: str, *, steps: int, micro_batch_pairs: int | None = None) -> StepRun:
    """The memory it took is free again afterwards: a model with adapters refers to itself."""
    run = OurArm(bench, engine, micro_batch_pairs=micro_batch_pairs).run(steps, logged=True)
    gc.collect()
    return run


def _difference(ours: StepRun, theirs: StepRun) -> Difference:
    return Difference(
        largest_relative(ours.losses, theirs.losses), largest_relative(ours.grad_norms, theirs.grad_norms)
    )


# -- rates -----------------------------------------------------------------------------------------


def _rates(bench: Workbench, shape: ModelShape, *, rounds: int, steps: int) -> dict[str, object]:
    """Both engines in turn; every share against the peak of its own round."""
    arms = {engine: OurArm(bench, engine) for engine in ENGINES}
    measured, peaks = _rounds(arms, bench, rounds=rounds, steps=steps)
    batch = bench.trial.training.batch_pairs
    timed = pair_lengths(bench.pairs.take(row_order(bench.trial, len(bench.pairs))))[batch:]
    needed = necessary_flops(shape, timed, rank=RANK) / (steps - 1)
    tokens = float(timed.sum()) / (steps - 1)
    engines = {
        engine: {
            "step_s": median(found.step_s), "pairs_per_s": batch / median(found.step_s),
            "tokens_per_s": tokens / median(found.step_s),
            "share_of_peak": median(needed / (s * peak) for s, peak in zip(found.step_s, peaks, strict=True)),
            "working_gib": found.working_bytes / 2**30, "engine": found.engine,
        }
        for engine, found in measured.items()
    }
    return {
        "tokens_per_step": tokens, "necessary_gflop": needed / 1e9, "peak_tflops": [peak / 1e12 for peak in peaks],
        "model_gib": sum(p.nbytes for p in bench.model.parameters()) / 2**30, "engines": engines,
        "plain_over_flat": paired_ratio(measured["plain"].step_s, measured["auto"].step_s).to_dict(),
    }


def _rounds(
    arms: Mapping[str, OurArm], bench: Workbench, *, rounds: int, steps: int
) -> tuple[dict[str, Measured], Sequence[float]]:
    """Seconds per step on the wall (a GPU is busy while the wall's clock runs; of a CPU, its own)."""
    rng, peaks, on_gpu = random.Random(0), [], bench.device.type == "cuda"
    seconds: dict[str, list[float]] = {engine: [] for engine in arms}
    working = dict.fromkeys(arms, 0)
    for _ in range(rounds):
        peaks.append(matmul_peak(bench.device, bench.dtype))
        for engine in rng.sample(sorted(arms), len(arms)):
            run = arms[engine].run(steps, logged=False)
            seconds[engine].append((run.spent.wall_s if on_gpu else run.spent.cpu_s) / (steps - 1))
            working[engine] = max(working[engine], run.peak_bytes)
    measured = {
        engine: Measured(arm.engine, tuple(seconds[engine]), working[engine])
        for engine, arm in arms.items()
    }
    return measured, peaks


# -- what is printed -------------------------------------------------------------------------------


def _table(result: Mapping[str, object]) -> str:
    parity = result["parity"]
    lines = [
        f"\n{result['model']}, {result['lengths']}: {result['batch_pairs']} pairs a step",
        f"  flat against plain: loss {parity['loss']:.1e}, gradient norm {parity['grad_norm']:.1e} (allowed "
        f"{parity['limits'][0]:.0e}, {parity['limits'][1]:.0e}); "
        f"margin at step 0 {parity['margin_at_start']:.1e} nats: "
        f"{'agrees' if parity['agrees'] else 'DIFFERS, no times'}",
    ]
    if not parity["agrees"]:
        return "\n".join(lines)
    lines.append(f"  {'':6}{'ms/step':>9}{'pairs/s':>9}{'tokens/s':>10}{'of peak':>9}{'GiB':>7}")
    for found in result["engines"].values():
        lines.append(
            f"  {found['engine']:6}{1000 * found['step_s']:9.1f}{found['pairs_per_s']:9.1f}"
            f"{found['tokens_per_s']:10.0f}{found['share_of_peak']:9.1%}{found['working_gib']:7.2f}"
        )
    ratio = result["plain_over_flat"]
    return "\n".join([
        *lines,
        f"  flat is {ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['most']:.2f}) times as fast; GiB are over the "
        f"model's {result['model_gib']:.2f} and what else was resident",
        f"  necessary {result['necessary_gflop']:.1f} GFLOP and {result['tokens_per_step']:.0f} tokens per step, "
        f"matrix-multiply peak {median(result['peak_tflops']):.3f} TFLOP/s",
    ])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES_OF_MODELS, required=True)
    parser.add_argument("--lengths", choices=("hh", "512-256"), default="hh")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of every run; the first is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the JSON line there too")
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be 2 or more, --rounds 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())

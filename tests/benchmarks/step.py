"""One optimizer step: our engine against TRL's DPOTrainer, the same weights, rows, order and threads.

    python tests/benchmarks/step.py [--shape hh ...] [--model small-8k ...] [--rounds 3] [--json FILE] [--out DIR]
    python tests/benchmarks/step.py --device cuda --model qwen2.5-0.5b --shape hh 512-256

Before any timing, losses and gradient norms of some steps must agree; if they do not, nothing is timed and the exit
code is 1. Then every round runs all arms in a random order. A table for people, one JSON line at the end.
Where trl is not installed (a machine with a GPU), the plain engine is the peer.
"""

import argparse
import json
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import trl_arm  # noqa: E402
from benchmarks.flops import PaddedStep, necessary_flops, padded_flops, shared_rows_flops  # noqa: E402
from benchmarks.kept_runs import KeptRuns, OtherSettings  # noqa: E402
from benchmarks.model_shapes import MODELS, ModelShape, random_model  # noqa: E402
from benchmarks.pair_lengths import SHAPES, LengthShape, padding_factor, pair_lengths, random_pairs  # noqa: E402
from benchmarks.parity import Difference, Limits, float32_limits, largest_relative  # noqa: E402
from benchmarks.step_arms import RANK, OurArm, StepArm, StepRun, TrlArm, Workbench, row_order, step_trial  # noqa: E402
from benchmarks.timing import code, machine, matmul_peak, paired_ratio, versions  # noqa: E402

OURS, PLAIN = "prefopt auto", "prefopt plain"
# In bfloat16 a run differs from itself when its batches are cut otherwise; some more than that is still rounding.
SPREAD_ALLOWED = 3.0
LEAST_BFLOAT16 = Limits(loss=2e-3, grad_norm=2e-2)


@dataclass(frozen=True)
class Timed:
    """One arm's rounds, per optimizer step."""

    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    peak_bytes: int


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    trl_arm.quiet()
    settings = {
        "device": options.device, "threads": options.threads, "rounds": options.rounds, "steps": options.steps,
        "versions": dict(versions()), "code": code(),
    }
    try:
        kept = KeptRuns.open(options.out, settings) if options.out else None
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2
    results = []
    for model, shape in product(options.model, options.shape):
        make = partial(_measure, MODELS[model], SHAPES[shape], device, options)
        results.append(kept.get_or_make(f"{model}-{shape}", make) if kept else make())
        print(_table(results[-1]), flush=True)
    void = any(result["void"] for result in results)
    line = json.dumps({"benchmark": "step", "void": void, "machine": machine(device), "results": results})
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 1 if void else 0


def _measure(
    model: ModelShape, shape: LengthShape, device: torch.device, options: argparse.Namespace
) -> dict[str, object]:
    """One model at one shape: gate, rounds, ratios."""
    bench = _workbench(model, shape, device, steps=options.steps)
    ours = OurArm(bench, "auto")
    arms: list[StepArm] = [ours, *_peers(bench)]
    gate = _gate(arms, bench, options.steps)
    # In the order of the steps, without the first, which warms up.
    timed = pair_lengths(bench.pairs.take(row_order(bench.trial, len(bench.pairs))))[shape.batch_pairs :]
    facts = {
        "model": model.name, "shape": shape.name, "batch_pairs": shape.batch_pairs, "rank": RANK, "engine": ours.engine,
        "padding": round(padding_factor(timed, batch=shape.batch_pairs), 3), "parity": gate,
        "void": not all(check["agrees"] for check in gate.values()),
    }
    if facts["void"]:
        return facts
    times, peaks = _rounds(arms, device, bench.dtype, rounds=options.rounds, steps=options.steps)
    return facts | _summary(model, shape, timed, times=times, peaks=peaks, on_gpu=device.type == "cuda")


def _workbench(model: ModelShape, shape: LengthShape, device: torch.device, *, steps: int) -> Workbench:
    """Rows for exactly the steps made, one epoch; those of the steps that are timed are typical of the shape."""
    trial = step_trial(steps=steps, batch_pairs=shape.batch_pairs)
    in_order = np.concatenate([shape.draw(shape.batch_pairs), shape.draw_typical(steps - 1)])
    lengths = np.empty_like(in_order)
    lengths[row_order(trial, len(in_order))] = in_order
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pairs = random_pairs(lengths, vocabulary=model.vocabulary)
    return Workbench(random_model(model, device=device, dtype=dtype), pairs, trial, device)


def _peers(bench: Workbench) -> list[StepArm]:
    if not trl_arm.available():
        return [OurArm(bench, "plain")]
    return [TrlArm(bench, tuned=True), TrlArm(bench, tuned=False)]


# -- parity ----------------------------------------------------------------------------------------


def _gate(arms: Sequence[StepArm], bench: Workbench, steps: int) -> dict[str, dict[str, object]]:
    """Our arm against every other one, by name."""
    ours, *others = (arm.run(steps, logged=True) for arm in arms)
    completion = float(np.concatenate([bench.pairs.chosen.lengths, bench.pairs.rejected.lengths]).mean())
    # Random weights give every token about the same probability.
    limits = float32_limits(completion * math.log(bench.model.config.vocab_size), beta=bench.trial.loss_params["beta"])
    if bench.dtype is torch.bfloat16:
        limits = _bfloat16_limits(bench, steps)
    out = {}
    for arm, theirs in zip(arms[1:], others, strict=True):
        found = _difference(ours, theirs)
        out[arm.name] = {
            "loss": found.loss, "grad_norm": found.grad_norm, "agrees": found.within(limits),
            "limits": [limits.loss, limits.grad_norm],
        }
    return out


def _difference(ours: StepRun, theirs: StepRun) -> Difference:
    return Difference(
        largest_relative(ours.losses, theirs.losses), largest_relative(ours.grad_norms, theirs.grad_norms)
    )


def _bfloat16_limits(bench: Workbench, steps: int) -> Limits:
    """From the spread of the plain engine against itself with micro-batches of half the size."""
    batch = bench.trial.training.batch_pairs
    whole, halved = (
        OurArm(bench, "plain", micro_batch_pairs=size).run(steps, logged=True) for size in (batch, max(1, batch // 2))
    )
    spread = _difference(halved, whole)
    return Limits(
        max(LEAST_BFLOAT16.loss, SPREAD_ALLOWED * spread.loss),
        max(LEAST_BFLOAT16.grad_norm, SPREAD_ALLOWED * spread.grad_norm),
    )


# -- times -----------------------------------------------------------------------------------------


def _rounds(
    arms: Sequence[StepArm], device: torch.device, dtype: torch.dtype, *, rounds: int, steps: int
) -> tuple[dict[str, Timed], list[float]]:
    """Every arm once per round, in an order drawn per round, beside the matrix-multiply peak of that round."""
    rng = random.Random(0)
    runs: dict[str, list[StepRun]] = defaultdict(list)
    peaks = []
    for _ in range(rounds):
        peaks.append(matmul_peak(device, dtype))
        for arm in rng.sample(list(arms), len(arms)):
            runs[arm.name].append(arm.run(steps, logged=False))
    timed = {
        arm.name: Timed(
            tuple(run.spent.cpu_s / (steps - 1) for run in runs[arm.name]),
            tuple(run.spent.wall_s / (steps - 1) for run in runs[arm.name]),
            max(run.peak_bytes for run in runs[arm.name]),
        )
        for arm in arms
    }
    return timed, peaks


def _summary(
    model: ModelShape, shape: LengthShape, lengths: np.ndarray, *,
    times: Mapping[str, Timed], peaks: Sequence[float], on_gpu: bool,
) -> dict[str, object]:
    """Per arm what a step takes, per peer how many times ours that is, expected (by counting) and measured."""
    steps = len(lengths) / shape.batch_pairs
    needed = necessary_flops(model, lengths, rank=RANK) / steps
    arms = {}
    for name, timed in times.items():
        # A GPU is busy while the wall's clock runs; a core may be lent to others meanwhile.
        seconds = timed.wall_s if on_gpu else timed.cpu_s
        arms[name] = {
            "cpu_s": median(timed.cpu_s), "wall_s": median(timed.wall_s),
            "pairs_per_s": shape.batch_pairs / median(timed.wall_s),
            "tokens_per_s": lengths.sum() / steps / median(timed.wall_s),
            "share_of_peak": median(needed / (s * peak) for s, peak in zip(seconds, peaks, strict=True)),
            "peak_gib": timed.peak_bytes / 2**30,
        }
    ours = times[OURS]
    ratios = {
        name: {
            "cpu": paired_ratio(timed.cpu_s, ours.cpu_s).to_dict(),
            "wall": paired_ratio(timed.wall_s, ours.wall_s).to_dict(),
            "expected": _expected(model, shape, lengths, name, on_gpu=on_gpu) / (needed * steps),
        }
        for name, timed in times.items() if name != OURS
    }
    return {"necessary_gflop": needed / 1e9, "peak_gflops": [p / 1e9 for p in peaks], "arms": arms, "ratios": ratios}


def _expected(model: ModelShape, shape: LengthShape, lengths: np.ndarray, name: str, *, on_gpu: bool) -> float:
    """Operations of a peer, counted. TRL's head scores completions only where it has a Triton kernel."""
    if name == PLAIN:  # both completions of a pair in one row
        return shared_rows_flops(model, lengths, rank=RANK, batch=shape.batch_pairs)
    whole = name == trl_arm.DEFAULT
    step = PaddedStep(reference=whole, recomputed=whole, scores_padding=not on_gpu)
    return padded_flops(model, lengths, rank=RANK, batch=shape.batch_pairs, step=step)


# -- what is printed -------------------------------------------------------------------------------


def _table(result: Mapping[str, object]) -> str:
    lines = [f"\n{result['model']}, {result['shape']}: {result['batch_pairs']} pairs, padding {result['padding']}, "
             f"{result['engine']} engine"]
    for name, check in result["parity"].items():
        verdict = "agrees" if check["agrees"] else "DIFFERS, no times"
        lines.append(f"  parity with {name}: loss {check['loss']:.1e}, gradient norm {check['grad_norm']:.1e}: {verdict}")
    if result["void"]:
        return "\n".join(lines)
    lines.append(f"  {'':16}{'CPU s':>9}{'wall s':>9}{'pairs/s':>9}{'tokens/s':>10}{'of peak':>9}{'GiB':>7}"
                 "   of ours: CPU, wall (least-most), expected")
    for name, arm in result["arms"].items():
        lines.append(
            f"  {name:16}{arm['cpu_s']:9.3f}{arm['wall_s']:9.3f}{arm['pairs_per_s']:9.2f}{arm['tokens_per_s']:10.0f}"
            f"{arm['share_of_peak']:9.1%}{arm['peak_gib']:7.2f}   {_ratio_text(result['ratios'].get(name))}"
        )
    lines.append(f"  necessary {result['necessary_gflop']:.1f} GFLOP per step, "
                 f"matrix-multiply peak {median(result['peak_gflops']):.0f} GFLOP/s")
    return "\n".join(lines)


def _ratio_text(ratio: Mapping[str, object] | None) -> str:
    if ratio is None:
        return "1"
    cpu, wall = (f"{r['median']:.2f} ({r['least']:.2f}-{r['most']:.2f})" for r in (ratio["cpu"], ratio["wall"]))
    return f"{cpu}, {wall}, {ratio['expected']:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["160-96", "hh"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["small-8k", "small-32k"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every run, the first not timed (5 on a CPU, 21 on a GPU)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the JSON line there too")
    parser.add_argument("--out", type=Path, help="keep finished shapes there: a second start makes only what is missing")
    options = parser.parse_args()
    options.steps = options.steps or (21 if options.device == "cuda" else 5)
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be 2 or more, --rounds 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())

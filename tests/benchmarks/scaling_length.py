"""What a step costs with longer pairs, for each engine: CPU seconds per 1,000 tokens, and the share of the peak.

Half of a pair is prompt, a quarter each completion; the tokens of a step stay about the same. See scaling.py for the
command.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.flops import necessary_flops
from benchmarks.model_shapes import MODELS, random_model
from benchmarks.pair_lengths import random_pairs
from benchmarks.parity import float32_limits, largest_relative
from benchmarks.step_arms import RANK, OurArm, Workbench, step_trial
from benchmarks.timing import matmul_peak

MODEL = MODELS["small-8k"]
STEP_TOKENS = 2048  # of a step, or one pair
STEPS, ROUNDS = 4, 3
ENGINES = ("auto", "plain")


def measure(counts: Sequence[int], out: Path) -> dict[str, Any]:
    """Engines in turn, round by round; nothing is kept."""
    model = random_model(MODEL, device=torch.device("cpu"))
    runs = {}
    for tokens in counts:
        pairs = max(1, STEP_TOKENS // tokens)
        lengths = even_lengths(tokens, pairs=pairs * STEPS)
        trial = step_trial(steps=STEPS, batch_pairs=pairs)
        bench = Workbench(model, random_pairs(lengths, vocabulary=MODEL.vocabulary), trial, torch.device("cpu"))
        arms = [OurArm(bench, engine) for engine in ENGINES]
        # Random weights: every token of a completion is about as likely as any other.
        nats = tokens // 4 * math.log(MODEL.vocabulary)
        limit = float32_limits(nats, beta=trial.loss_params["beta"]).loss
        runs[tokens] = {"pairs": pairs, "loss_limit": limit, **_timed(arms, tokens * pairs, lengths[:pairs])}
        print(f"{tokens} tokens: done", flush=True)
    worst = max(run["loss_difference"] / run["loss_limit"] for run in runs.values())
    judged = {"found": worst, "at_most": 1.0, "met": worst <= 1.0}
    return {
        "model": MODEL.name, "runs": runs, "judged": {"difference of the engines' losses over what is allowed": judged}
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"\n{result['model']}, CPU seconds per 1,000 tokens of a step (share of the peak on necessary operations)",
             f"  {'tokens':>8}{'pairs':>7}" + "".join(f"{engine:>16}" for engine in ENGINES)]
    for tokens, run in result["runs"].items():
        cells = "".join(f"{run[e]['s_per_1000']:8.3f} ({run[e]['share']:4.0%})" for e in ENGINES)
        lines.append(f"  {tokens:>8}{run['pairs']:>7}{cells}")
    return "\n".join(lines)


def even_lengths(tokens: int, *, pairs: int) -> np.ndarray:
    """(pairs, 3) of so many tokens each: half of them prompt, a quarter each completion."""
    return np.tile([tokens // 2, tokens // 4, tokens // 4], (pairs, 1))


def _timed(arms: Sequence[OurArm], tokens: int, lengths: np.ndarray) -> dict[str, Any]:
    rounds = [{arm.name: arm.run(STEPS, logged=True) for arm in arms} for _ in range(ROUNDS)]
    peak = max(matmul_peak(torch.device("cpu"), torch.float32) for _ in range(ROUNDS))
    needed = necessary_flops(MODEL, lengths, rank=RANK)
    out: dict[str, Any] = {}
    for engine, arm in zip(ENGINES, arms, strict=True):
        step_s = median(runs[arm.name].spent.cpu_s for runs in rounds) / (STEPS - 1)
        out[engine] = {"step_s": step_s, "s_per_1000": 1000 * step_s / tokens, "share": needed / (step_s * peak)}
    losses = [rounds[0][arm.name].losses for arm in arms]
    return out | {"loss_difference": largest_relative(*losses)}

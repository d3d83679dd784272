"""The recorded table of gold-task trials, and what it says about verdicts, rankings and claims.

    python tests/benchmarks/gold_table.py run --seeds 0 1 2 3 4 --null 24 --out DIR   trains what is missing
    python tests/benchmarks/gold_table.py report DIR > docs/experiments/gold-table.md
    python tests/benchmarks/gold_table.py trials | verdicts | ranks | null DIR     one part of the report

On one idle core of a laptop a trial takes 20 s fully trained and 35 s with a LoRA.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from benchmarks.gold_report import (  # noqa: E402
    null_part,
    rank_part,
    table_trials,
    trial_part,
    verdict_part,
    whole_report,
)
from benchmarks.gold_trials import Case, record  # noqa: E402

# Loss, parameters, learning rates. Full fine-tuning steps twice as fast as a LoRA, so most of the table is that.
FULL_GRID = (
    ("sigmoid", {"beta": 0.1}, (3e-4, 1e-4, 3e-5, 1e-5)),
    ("ipo_sum", {"beta": 0.1}, (3e-4, 1e-4)),
    ("ipo_sum", {"beta": 0.02}, (3e-4,)),
    ("ipo_sum", {"beta": 1.0}, (3e-4,)),
    ("sigmoid", {"beta": 0.05}, (3e-4,)),
    ("sigmoid", {"beta": 1.0}, (1e-4,)),
    ("simpo", {"beta": 2.0, "gamma_ratio": 0.5}, (3e-5,)),
    ("hinge", {"beta": 0.1}, (1e-4,)),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, (1e-4,)),
    ("ipo_mean", {"beta": 0.5}, (1e-4,)),
    ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}, (1e-4,)),
    ("sigmoid", {"beta": 0.1}, (1e-3, 1e-2)),
    ("ipo_sum", {"beta": 0.1}, (1e-3,)),
)
LORA_GRID = (
    ("sigmoid", {"beta": 0.1}, (3e-4, 1e-4)),
    ("ipo_sum", {"beta": 0.1}, (3e-4, 1e-2)),
    ("sigmoid", {"beta": 0.03}, (1e-4,)),
    ("ipo_sum", {"beta": 0.1}, (1e-4,)),
    ("sigmoid", {"beta": 0.1}, (3e-5, 1e-5)),
)
PARTS = {
    "report": "all parts as one document",
    "trials": "every trial: gold reward and verdict",
    "verdicts": "precision and recall of positive headlines",
    "ranks": "rank correlation of scores with the gold reward",
    "null": "claims when nothing is better",
}
LORA_SEEDS = (0, 1)
NULL_SEED = 1000  # far from the table's seeds


def table_cases(seed: int) -> list[Case]:
    """Every trial of one seed, the quick ones first."""
    grids = (("none", FULL_GRID), ("lora", LORA_GRID if seed in LORA_SEEDS else ()))
    return [
        Case(loss, params | {"learning_rate": rate}, seed, adapter)
        for adapter, grid in grids for loss, params, rates in grid for rate in rates
    ]


def null_cases(count: int) -> list[Case]:
    """One configuration again and again on the same pairs: only the training seed differs."""
    values = {"beta": 0.1, "learning_rate": 3e-4}
    return [
        Case("sigmoid", values, NULL_SEED + number, "none", steps=80, evaluated=(0, 20, 40, 80), select_pairs=6000,
             prompts=0, data_seed=NULL_SEED)
        for number in range(count)
    ]


def run(cases: Sequence[Case], out: Path, *, processes: int) -> None:
    """Train what is missing, in order."""
    started = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(record, case, out) for case in cases]
        for done, job in enumerate(as_completed(jobs), start=1):
            print(f"{done}/{len(cases)} {job.result().name} at {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train the trials that are missing")
    training.add_argument("--seeds", type=int, nargs="*", default=[])
    training.add_argument("--null", type=int, default=0, metavar="N", help="so many trials of one configuration")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--processes", type=int, default=1)
    for name, about in PARTS.items():
        commands.add_parser(name, help=about).add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command != "run":
        print(_part(options.command, options.folder.absolute()))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = [case for seed in options.seeds for case in table_cases(seed)] + null_cases(options.null)
    run(cases, options.out.absolute(), processes=options.processes)


def _part(name: str, out: Path) -> str:
    if name == "report":
        return whole_report(out)
    if name == "null":
        return null_part(out)
    return {"trials": trial_part, "verdicts": verdict_part, "ranks": rank_part}[name](table_trials(out))


if __name__ == "__main__":
    main()

"""What a sweep costs with more trials, a preparation with more pairs, a step with longer pairs.

    python tests/benchmarks/scaling.py trials [--counts 1 8 16 64] [--out DIR] [--json FILE]
    python tests/benchmarks/scaling.py pairs [--counts 100 1000 10000 100000] [--json FILE]
    python tests/benchmarks/scaling.py length [--counts 128 256 512 1024 2048 4096] [--json FILE]

`trials`: `prefopt run` in a fresh process, no early stops; CPU seconds of its whole process tree. Judged: CPU seconds
per additional trial within 10 % from 8 to 64, and at the largest count less than 5 % of what the slots offer not used
by trials. Finished runs stay in --out. `pairs`: every stage in a fresh process; judged: no stage gets dearer per pair.
`length`: a step of each engine, CPU seconds per 1,000 tokens. A table for people, one JSON line; exit code 1 where
something judged misses.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402

from benchmarks import scaling_length, scaling_pairs, scaling_trials  # noqa: E402
from benchmarks.timing import machine  # noqa: E402


@dataclass(frozen=True)
class Against:
    """What costs are measured against."""

    measure: Callable[[Sequence[int], Path], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    counts: tuple[int, ...]


AGAINST = {
    "trials": Against(scaling_trials.measure, scaling_trials.table, (1, 8, 16, 64)),
    "pairs": Against(scaling_pairs.measure, scaling_pairs.table, (100, 1_000, 10_000, 100_000)),
    "length": Against(scaling_length.measure, scaling_length.table, (128, 256, 512, 1024, 2048, 4096)),
}


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    against = AGAINST[options.against]
    result = against.measure(options.counts or against.counts, options.out)
    line = json.dumps({
        "benchmark": f"scaling {options.against}", "machine": machine(torch.device("cpu")), **result,
    })
    print(against.table(result))
    for name, judged in result["judged"].items():
        verdict = "met" if judged["met"] else "MISSED"
        print(f"  {name}: {judged['found']:.3g}, at most {judged['at_most']:g}: {verdict}")
    print(line)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    return 0 if all(judged["met"] for judged in result["judged"].values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=AGAINST)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of trials or pairs, or tokens of a pair")
    parser.add_argument("--out", type=Path, help="where finished runs are kept (default: benchmark-scaling-AGAINST)")
    parser.add_argument("--json", type=Path, help="write the JSON line there too")
    options = parser.parse_args()
    options.out = (options.out or Path(f"benchmark-scaling-{options.against}")).absolute()
    return options


if __name__ == "__main__":
    sys.exit(main())

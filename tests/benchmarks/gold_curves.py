"""The recorded gold table as tables of curves for `prefopt replay`, one file for each seed and adapter.

    python tests/benchmarks/gold_curves.py DIR OUT
    prefopt replay OUT/seed*-none.jsonl --within sweep
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from benchmarks.gold_table import table_cases  # noqa: E402
from benchmarks.gold_trials import DONE, Case  # noqa: E402

SEEDS = range(5)
BASELINE = ("sigmoid", {"beta": 0.1, "learning_rate": 1e-4})


def write_curves(folder: Path, out: Path) -> list[Path]:
    """Raises FileNotFoundError for a trial of the table that was not recorded."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[Path, list[str]] = {}
    for seed in SEEDS:
        for case in table_cases(seed):
            files.setdefault(out / f"seed{seed}-{case.adapter}.jsonl", []).extend(_rows(folder, case))
    for file, rows in files.items():
        file.write_text("".join(rows), encoding="utf-8")
    return list(files)


def _rows(folder: Path, case: Case) -> list[str]:
    reports = json.loads((folder / "trials" / case.name / DONE).read_text(encoding="utf-8"))["reports"]
    return [
        json.dumps({
            "trial": case.name, "loss": case.loss, "step": report["step"], "value": report["objective"],
            "seconds": report["seconds"], "baseline": (case.loss, case.values) == BASELINE,
            "end": report["end_state"] or "",
        }) + "\n"
        for report in reports
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what gold_table.py run wrote")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for file in write_curves(options.folder, options.out):
        print(file)

"""A sweep of N like trials, none stopped: CPU seconds per additional trial, and what its slots lose to anything else.

Steps of more than half a second, as many as make starting a process a small part. See scaling.py for the command.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import KeptRuns
from benchmarks.process_tree import spent_by
from benchmarks.sweep_material import Task, make_material
from benchmarks.timing import code, versions
from prefopt_ray.results.ledger import LEDGER_FILE, read_events, read_sweep

STEPS, BATCH_PAIRS = 50, 16
MATERIAL_BATCH = 8  # pairs per step of what `make_material` writes
MOST_LOST = 0.05  # of slots x wall
MOST_SPREAD = 0.10  # of the marginal cost
JUDGED_FROM = 8  # trials: below, processes are still being started
ROOT = Path(__file__).parents[2]


def measure(counts: Sequence[int], out: Path) -> dict[str, Any]:
    """Every count once, in order; runs kept in `out` are not made again."""
    kept = KeptRuns.open(out, {"steps": STEPS, "batch_pairs": BATCH_PAIRS, "versions": dict(versions()), "code": code()})
    material = out / "material"
    kept.get_or_make("material", lambda: _made(material))
    runs = {}
    for count in counts:
        run = runs[count] = kept.get_or_make(f"trials-{count}", partial(_run, material, trials=count))
        print(f"{count} trials: {run['wall_s']:.0f} s on the wall, {run['cpu_s']:.0f} CPU seconds", flush=True)
    marginal = marginal_costs(runs)
    return {
        "steps": STEPS, "batch_pairs": BATCH_PAIRS, "runs": runs, "marginal_cpu_s": marginal,
        "judged": judge(runs, marginal),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"\n{result['steps']} steps of {result['batch_pairs']} pairs per trial",
             f"  {'trials':>8}{'CPU s':>9}{'wall s':>9}{'step s':>8}{'CPU s / trial':>15}{'CPU s / added':>15}"
             f"{'not in trials':>15}{'while trials ran':>18}"]
    for count, run in result["runs"].items():
        added = result["marginal_cpu_s"].get(count)
        lines.append(
            f"  {count:>8}{run['cpu_s']:9.0f}{run['wall_s']:9.0f}{run['step_s']:8.2f}{run['cpu_s'] / int(count):15.2f}"
            f"{'' if added is None else f'{added:.2f}':>15}{run['lost']:15.1%}{run['lost_while_running']:18.1%}"
        )
    return "\n".join(lines)


def _made(material: Path) -> dict[str, Any]:
    make_material("hh", material, steps=STEPS * BATCH_PAIRS // MATERIAL_BATCH)
    return {"model": Task.read(material).model}


def _run(material: Path, *, trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="prefopt-benchmark-") as name:
        home = Path(name)
        spec = "".join(f"{key}: {json.dumps(value)}\n" for key, value in _spec(material, trials=trials).items())
        (home / "spec.yaml").write_text(spec, encoding="utf-8")
        command = [sys.executable, "-m", "prefopt_ray.cli", "run", "spec.yaml", "--storage", str(home / "results")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        spent = spent_by(command, cwd=home, log=home / "log", env=environment)
        sweep = read_sweep(next((home / "results").glob(f"*/{LEDGER_FILE}")).parent)
        times = dict(_trial_times(sweep.folder))
    last = [trial.last for trial in sweep.trials.values()]
    if len(last) != trials or any(report is None or report.step != STEPS for report in last):
        raise RuntimeError(f"{sweep.state_counts}: every one of {trials} trials should have made {STEPS} steps")
    busy = sum(report.seconds for report in last)
    training = sum(report.seconds - report.evaluating_seconds for report in last)
    slots = os.cpu_count() or 1
    return {
        "cpu_s": spent.cpu_s, "wall_s": spent.wall_s, "engine_s": busy, "step_s": training / (STEPS * trials),
        "lost": 1 - busy / (slots * spent.wall_s),
        "lost_while_running": 1 - busy / (slots * (times["last"] - times["first"])),
    }


def _trial_times(folder: Path) -> Iterator[tuple[str, float]]:
    """When the first trial was ordered and when the last one ended."""
    events = [event for event in read_events(folder / LEDGER_FILE) if event["event"] in ("trial", "end")]
    yield "first", events[0]["at"]
    yield "last", events[-1]["at"]


def _spec(material: Path, *, trials: int) -> dict[str, object]:
    rates = [round(1e-6 * (1 + number / trials), 9) for number in range(trials)]
    return {
        "name": f"scaling-{trials}",
        "model": {
            "policy": Task.read(material).model, "dtype": "float32",
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        },
        "data": {
            "train": {"source": str(material / "pairs.jsonl")}, "select": {"from": "train", "pairs": 32},
            "test": {"from": "train", "pairs": 16}, "max_tokens": 1024, "text": "plain",
        },
        "training": {"steps": STEPS, "batch_pairs": BATCH_PAIRS, "warmup": 0},
        "search": {
            "method": "grid", "losses": {"sigmoid": {"beta": 0.1}}, "shared": {"learning_rate": rates},
            "baseline": {"loss": "sigmoid", "beta": 0.1, "learning_rate": rates[0]},
        },
        "scheduler": {"kind": "none"},
        "eval": {"at": [0, "50%"], "train_probe": 16},
        "samples": {"at": "never"},
        "guards": {"diverged": "flag", "broken": "flag", "memorised": "flag", "overfit": "flag"},
        "resources": {"gpus_per_trial": 0, "cpus_per_trial": 1},
    }


def marginal_costs(runs: dict[int, dict[str, Any]]) -> dict[int, float]:
    """CPU seconds per trial added since the count before."""
    counts = list(runs)
    return {
        more: (runs[more]["cpu_s"] - runs[fewer]["cpu_s"]) / (more - fewer)
        for fewer, more in zip(counts, counts[1:], strict=False)
    }


def judge(runs: dict[int, dict[str, Any]], marginal: dict[int, float]) -> dict[str, dict[str, Any]]:
    costs = [cost for count, cost in marginal.items() if count > JUDGED_FROM]
    found = {f"share of the slots' time not in trials, {max(runs)} trials": (runs[max(runs)]["lost"], MOST_LOST)}
    if len(costs) > 1:
        found["CPU seconds per additional trial differ by"] = (max(costs) / min(costs) - 1, MOST_SPREAD)
    return {name: {"found": value, "at_most": most, "met": value <= most} for name, (value, most) in found.items()}

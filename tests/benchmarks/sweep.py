"""A sweep from its command to its answer: ours against Ray Tune with TRL, default and tuned.

    python tests/benchmarks/sweep.py --data hh [--rounds 3] [--minutes 40] [--out DIR]
    PREFOPT_TEST_DATA=DIR python tests/benchmarks/sweep.py --data sharegpt

8 trials of a small random model on two cores, the same stop steps for all; start-up, reference pass and evaluations
included. Our arm is `prefopt run` in a fresh process, with its ledger, checkpoints, MLflow runs and scores on the test
part; the others keep nothing. Finished runs stay in --out, and a second start makes only what is missing. The trials'
evaluations must agree at every step, or the numbers are void and the exit code is 1. A run that would not be done
after --minutes is not begun: start the command again (exit code 75 says so).
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402

from benchmarks.kept_runs import KeptRuns, OtherSettings  # noqa: E402
from benchmarks.parity import largest_relative  # noqa: E402
from benchmarks.process_tree import spent_by  # noqa: E402
from benchmarks.sweep_material import BATCH_PAIRS, SPEC, STEPS, Task, make_material  # noqa: E402
from benchmarks.timing import code, machine, matmul_peak, paired_ratio, versions  # noqa: E402
from benchmarks.trl_arm import DEFAULT, TUNED  # noqa: E402
from prefopt_ray.results.ledger import read_sweep  # noqa: E402

OURS = "prefopt"
ARMS = (OURS, TUNED, DEFAULT)
LARGEST_DIFFERENCE = 1e-4  # relative, of losses and mean log-probs at equal steps
LEAST_TRAINING = 0.4  # of an arm's time; below it start-up is measured, not training
CONTINUE = 75  # exit code: not done, start again
COMPARED = ("loss", "logps/chosen", "logps/rejected")
ROOT = Path(__file__).parents[2]

Run = dict[str, Any]


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started is ended too
    settings = {"data": options.data, "steps": options.steps, "versions": dict(versions()), "code": code()}
    try:
        kept = KeptRuns.open(options.out, settings)
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2
    material = options.out / "material"
    kept.get_or_make("material", lambda: _made(options.data, material, steps=options.steps))
    rounds: list[Mapping[str, Run]] = []
    clock = Clock(60 * options.minutes)
    for number in range(options.rounds):
        try:
            rounds.append(_round(number, kept, material, clock=clock))
        except OutOfTimeError:
            print(f"{options.minutes} minutes are over; start again, what is finished stays in {options.out}")
            return CONTINUE
        void = _disagreements(rounds[-1])
        if void:
            print("\n".join(["the arms did not compute the same; no times:", *void]), file=sys.stderr)
            print(json.dumps({"benchmark": "sweep", "data": options.data, "void": True}))
            return 1
    summary = _summary(rounds, Task.read(material))
    line = json.dumps({
        "benchmark": "sweep", "data": options.data, "void": False, "machine": machine(torch.device("cpu")), **summary,
    })
    print(_table(options, summary))
    print(line)
    return 0


# -- runs ------------------------------------------------------------------------------------------


def _made(data: str, material: Path, *, steps: int) -> Run:
    make_material(data, material, steps=steps)
    return {"data": data, "batch_pairs": BATCH_PAIRS[data]}


class OutOfTimeError(RuntimeError):
    """The next run would not be done in time."""


class Clock:
    """How long the command has run, and whether another run like the longest so far still fits."""

    def __init__(self, limit_s: float) -> None:
        self._end, self._longest = time.monotonic() + limit_s, 0.0

    def timed(self, make: Callable[[], Run]) -> Run:
        """What `make` gives. Raises OutOfTimeError instead of beginning too late."""
        began = time.monotonic()
        if began + self._longest > self._end:
            raise OutOfTimeError
        made = make()
        self._longest = max(self._longest, time.monotonic() - began)
        return made


def _round(number: int, kept: KeptRuns, material: Path, *, clock: Clock) -> dict[str, Run]:
    """Every arm once, in an order drawn per round, beside the matrix-multiply peak."""
    makers: dict[str, Callable[[Path], Run]] = {
        OURS: lambda folder: _ours(material, folder),
        TUNED: lambda folder: _trl(material, folder, tuned=True),
        DEFAULT: lambda folder: _trl(material, folder, tuned=False),
    }
    peak = kept.get_or_make(
        f"round{number}-peak", lambda: {"flops": matmul_peak(torch.device("cpu"), torch.float32)}
    )
    runs: dict[str, Run] = {"peak": peak}
    for name in random.Random(number).sample(ARMS, len(ARMS)):
        run_name = f"round{number}-{name.replace(' ', '-')}"
        fresh = not kept.has(run_name)
        make = partial(clock.timed, partial(_in_fresh_folder, makers[name]))
        run = runs[name] = kept.get_or_make(run_name, make)
        print(f"round {number + 1}, {name}: {run['wall_s']:.0f} s on the wall, {run['cpu_s']:.0f} CPU seconds"
              f"{'' if fresh else ' (kept)'}", flush=True)
    return runs


def _in_fresh_folder(make: Callable[[Path], Run]) -> Run:
    with tempfile.TemporaryDirectory(prefix="prefopt-sweep-") as folder:
        return make(Path(folder))


def _ours(material: Path, folder: Path) -> Run:
    command = [sys.executable, "-m", "prefopt_ray.cli", "run", str(material / SPEC), "--storage", str(folder / "results")]
    spent = spent_by(command, cwd=folder, log=folder / "log", env=_environment())
    sweep = read_sweep(next((folder / "results").glob("*/ledger.jsonl")).parent)
    trials = sorted(sweep.trials.values(), key=lambda trial: trial.number)
    reports = [trial.reports[max(trial.reports)] for trial in trials]
    return {
        "cpu_s": spent.cpu_s, "wall_s": spent.wall_s,
        "training_s": sum(report.seconds - report.evaluating_seconds for report in reports),
        "evaluations": [
            {
                str(step): {name: report.metrics[f"eval/{name}"] for name in COMPARED}
                for step, report in trial.reports.items() if step > 0 and report.metrics
            }
            for trial in trials
        ],
    }


def _trl(material: Path, folder: Path, *, tuned: bool) -> Run:
    result = folder / "result.json"
    command = [
        sys.executable, str(ROOT / "tests" / "benchmarks" / "trl_tune.py"), str(material), str(result),
        *(["--tuned"] if tuned else []),
    ]
    spent = spent_by(command, cwd=folder, log=folder / "log", env=_environment())
    trials = json.loads(result.read_text(encoding="utf-8"))
    return {
        "cpu_s": spent.cpu_s, "wall_s": spent.wall_s, "training_s": sum(trial["stepping_s"] for trial in trials),
        "evaluations": [trial["evaluations"] for trial in trials],
    }


def _environment() -> dict[str, str]:
    """The same for all arms; workers import from the same places."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}


# -- what they say ---------------------------------------------------------------------------------


def _disagreements(runs: Mapping[str, Run]) -> list[str]:
    """Where an arm's evaluations are not ours, one line each."""
    found = []
    for arm in (TUNED, DEFAULT):
        for number, (ours, theirs) in enumerate(zip(runs[OURS]["evaluations"], runs[arm]["evaluations"], strict=True)):
            if ours.keys() != theirs.keys():
                found.append(f"{arm}, trial {number}: evaluated at {[*theirs]}, ours at {[*ours]}")
                continue
            for step in ours:
                gap = _gap(ours[step], theirs[step])
                if not gap <= LARGEST_DIFFERENCE:
                    found.append(f"{arm}, trial {number}, step {step}: {gap:.1e} relative")
    return found


def _gap(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    return largest_relative([ours[name] for name in COMPARED], [theirs[name] for name in COMPARED])


def _largest_gap(rounds: list[Mapping[str, Run]], arm: str) -> float:
    return max(
        _gap(ours[step], theirs[step])
        for runs in rounds
        for ours, theirs in zip(runs[OURS]["evaluations"], runs[arm]["evaluations"], strict=True)
        for step in ours
    )


def _summary(rounds: list[Mapping[str, Run]], task: Task) -> dict[str, Any]:
    """Medians per arm; ratios to ours formed within each round."""
    slots = os.cpu_count() or 1
    arms = {
        arm: {
            "wall_s": median(r[arm]["wall_s"] for r in rounds), "cpu_s": median(r[arm]["cpu_s"] for r in rounds),
            "trials_per_hour": 3600 * len(task.trials) / median(r[arm]["wall_s"] for r in rounds),
            "training_share": median(r[arm]["training_s"] / (slots * r[arm]["wall_s"]) for r in rounds),
        }
        for arm in ARMS
    }
    ratios = {
        arm: {
            clock: paired_ratio([r[arm][clock] for r in rounds], [r[OURS][clock] for r in rounds]).to_dict()
            for clock in ("wall_s", "cpu_s")
        } | {"largest_difference": _largest_gap(rounds, arm)}
        for arm in (TUNED, DEFAULT)
    }
    steps = [trial.training.stop_step for trial in task.trials]
    return {
        "trials": len(steps), "optimizer_steps": sum(steps), "rounds": len(rounds), "arms": arms, "ratios": ratios,
        "peak_gflops": [r["peak"]["flops"] / 1e9 for r in rounds],
        "enough_training": all(arms[arm]["training_share"] >= LEAST_TRAINING for arm in (TUNED, DEFAULT)),
    }


def _table(options: argparse.Namespace, summary: Mapping[str, Any]) -> str:
    lines = [
        f"\n{options.data}: {summary['trials']} trials, {summary['optimizer_steps']} optimizer steps, "
        f"{summary['rounds']} rounds, {os.cpu_count()} cores",
        f"  {'':12}{'wall s':>8}{'CPU s':>8}{'trials/h':>10}{'training':>10}   of ours: wall, CPU (least-most)",
    ]
    for name, arm in summary["arms"].items():
        ratio = summary["ratios"].get(name)
        text = "1"
        if ratio:
            text = ", ".join(f"{r['median']:.2f} ({r['least']:.2f}-{r['most']:.2f})" for r in (ratio["wall_s"], ratio["cpu_s"]))
            text += f"; evaluations within {ratio['largest_difference']:.0e}"
        lines.append(f"  {name:12}{arm['wall_s']:8.0f}{arm['cpu_s']:8.0f}{arm['trials_per_hour']:10.0f}"
                     f"{arm['training_share']:10.0%}   {text}")
    if not summary["enough_training"]:
        lines.append(f"  less than {LEAST_TRAINING:.0%} of a TRL arm's time is training: this measures start-up")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BATCH_PAIRS, default="hh")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=40, help="begin nothing that would end later (default: 40)")
    parser.add_argument("--steps", type=int, help="of the longest trial (60; of chat pairs 36)")
    parser.add_argument("--out", type=Path, help="where finished runs are kept (default: benchmark-sweep-DATA)")
    options = parser.parse_args()
    options.steps = options.steps or STEPS[options.data]
    options.out = (options.out or Path(f"benchmark-sweep-{options.data}")).absolute()
    return options


if __name__ == "__main__":
    sys.exit(main())

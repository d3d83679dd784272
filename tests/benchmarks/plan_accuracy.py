"""How well `prefopt plan` foretells a trial: its memory and time beside those of a real sweep's worker processes.

    python tests/benchmarks/plan_accuracy.py [--pairs 2000] [--hidden 256] [--layers 4] [--vocabulary 400]

A random Llama and made-up pairs as in evaluation_share.py. Plans, runs two trials, and reads the peak resident set
that the system kept of each worker. Prints one JSON line.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from evaluation_share import random_spec, sizes  # noqa: E402
from journeys.journey import command, environment, prefopt  # noqa: E402

from prefopt_ray.results.ledger import SweepRecord, read_sweep  # noqa: E402

POLL_S = 0.1


def main() -> None:
    options = sizes(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        spec = random_spec(home, options)
        spec["search"] = {"method": "grid", "losses": {"sigmoid": {"beta": [0.1, 0.2], "learning_rate": 1e-4}},
                          "baseline": {"loss": "sigmoid", "beta": 0.1, "learning_rate": 1e-4}}
        spec["scheduler"] = {"kind": "none"}
        (home / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
        planned = json.loads(_successful("plan", "spec.yaml", "--json", cwd=home))
        peaks, sweep = _run(home)
    trials = [trial.last for trial in sweep.trials.values()]
    seconds = sum(report.seconds for report in trials) / len(trials)
    memory = planned["memory_bytes"]["trial"]
    print(json.dumps({
        "planned_mib": memory // 2**20, "real_mib": [peak // 2**20 for peak in peaks],
        "planned_over_real": [round(memory / peak, 3) for peak in peaks],
        "parts_mib": {name: size // 2**20 for name, size in planned["memory_bytes"].items()},
        "planned_trial_s": round(planned["seconds"]["trial"], 1), "real_trial_s": round(seconds, 1),
        "planned_share": round(planned["evaluating_share"], 3),
        "real_share": round(sum(r.evaluating_seconds for r in trials) / sum(r.seconds for r in trials), 3),
    }))


def _successful(*arguments: str, cwd: Path) -> str:
    outcome = prefopt(*arguments, cwd=cwd)
    if outcome.code != 0:
        raise SystemExit(outcome.err)
    return outcome.out


def _run(home: Path) -> tuple[list[int], SweepRecord]:
    """Peak bytes of each worker process, and the sweep."""
    with (home / "run.log").open("w") as log:
        process = subprocess.Popen(command("run", "spec.yaml"), cwd=home, env=environment(), stdout=log, stderr=log)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for ledger in home.glob("results/*/ledger.jsonl"):
            peaks |= _peaks(ledger)
        time.sleep(POLL_S)
    if process.returncode != 0:
        raise SystemExit((home / "run.log").read_text())
    return list(peaks.values()), read_sweep(next(home.glob("results/*/ledger.jsonl")).parent)


def _peaks(ledger: Path) -> dict[int, int]:
    """Of the workers that are alive."""
    found = {}
    for line in ledger.read_text().split("\n")[:-1]:  # the last one may still be written
        placement = json.loads(line).get("placement") if '"placement"' in line else None
        status = Path(f"/proc/{placement['pid']}/status") if placement else None
        if status and status.is_file():
            (peak,) = [row for row in status.read_text().splitlines() if row.startswith("VmHWM")] or [""]
            if peak:
                found[placement["pid"]] = int(peak.split()[1]) * 1024
    return found


if __name__ == "__main__":
    main()

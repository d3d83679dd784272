"""What the cluster runs: `python -m prefopt_ray.cluster.job run|status|kill ...`, on the head, in the uploaded folder."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from prefopt_ray.cluster.messages import ACCEPTED, EVENT, REFUSED, SUMMARY, tell
from prefopt_ray.cluster.upload import SPEC, Order, unpack
from prefopt_ray.errors import InputError, PrefoptError, Problem
from prefopt_ray.results.ledger import LEDGER_FILE, SweepRecord, read_sweep
from prefopt_ray.results.summary import sweep_summary
from prefopt_ray.report.terminal import TerminalObserver, make_console, print_outcome, quiet_libraries
from prefopt_ray.results.answer import find_answer
from prefopt_ray.spec import SweepSpec, load_spec


def main() -> int:
    options = _options()
    try:
        if options.what == "kill":
            return kill(int(options.subject))
        return run() if options.what == "run" else status(Path(options.subject))
    except InputError as error:
        return _refuse(error.problems)
    except PrefoptError as error:
        print(f"prefopt: {error}", file=sys.stderr)
        return error.exit_code


def run() -> int:
    """Check the cluster, answer, and run the sweep, or go on with it. The ledger's events go into the log."""
    from prefopt_ray.cluster.checks import find_problems  # here: asking for the status needs none of it
    from prefopt_ray.tuning.resources import start_ray
    from prefopt_ray.tuning.run import new_sweep_id, resume_sweep, run_sweep, same_sweeps

    quiet_libraries()
    folder = Path.cwd()
    order = Order.read(folder)
    spec = unpack(folder, order)
    start_ray()
    problems = find_problems(spec, order.versions)
    if problems:
        return _refuse(problems)
    begun = None if order.fresh else next(iter(same_sweeps(spec)), None)
    sweep_id = begun.sweep_id if begun else new_sweep_id()
    tell(ACCEPTED, {
        "sweep": sweep_id, "folder": str(begun.folder if begun else spec.storage / f"{spec.name}-{sweep_id}"),
        "resumed": begun is not None, "finished": begun is not None and begun.finished,
    })
    console = make_console()
    with _TellingObserver(console) as observer:
        if begun is None:
            sweep = run_sweep(spec, observer, sweep_id=sweep_id)
        elif begun.finished:
            sweep = begun
        else:
            sweep = resume_sweep(begun.folder, observer)
        observer.watch(sweep)
    print_outcome(console, sweep, find_answer(sweep))
    tell(SUMMARY, sweep_summary(sweep, expected=spec.trial_count))
    return 0 if sweep.finished else 130


def status(folder: Path) -> int:
    """How far a sweep is, from its files alone."""
    tell(SUMMARY, sweep_summary(read_sweep(folder), expected=load_spec(folder / SPEC).trial_count))
    return 0


def kill(pid: int) -> int:
    """End a sweep's driver on this machine, and nothing else."""
    command = Path(f"/proc/{pid}/cmdline")
    if command.is_file() and __spec__.name.encode() in command.read_bytes():
        os.kill(pid, signal.SIGKILL)
        return 0
    print(f"process {pid} is no sweep's driver", file=sys.stderr)
    return 1


class _TellingObserver(TerminalObserver):
    """Also tells every event of the ledger, those before a resume first."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._read = 0  # bytes of the ledger

    def started(self, sweep: SweepRecord, spec: SweepSpec, notes: list[str]) -> None:
        super().started(sweep, spec, notes)
        self.watch(sweep)

    def watch(self, sweep: SweepRecord) -> None:
        super().watch(sweep)
        path = sweep.folder / LEDGER_FILE
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            *lines, _ = file.read().split(b"\n")  # the last one may still be written
        self._read += sum(len(line) + 1 for line in lines)
        for line in lines:
            tell(EVENT, _light(json.loads(line)))


def _light(event: dict) -> dict:
    """Without what a table never shows: the steps between two reports."""
    return {**event, "report": {**event["report"], "points": ""}} if "report" in event else event


def _refuse(problems: "list[Problem] | tuple[Problem, ...]") -> int:
    tell(REFUSED, {"problems": [vars(problem) for problem in problems]})
    for problem in problems:
        print(f"prefopt: {problem}", file=sys.stderr)
    return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "status", "kill"))
    parser.add_argument("subject", nargs="?", help="status: the sweep's folder; kill: the driver's process id")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

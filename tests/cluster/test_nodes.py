"""Several nodes: a sweep spreads, loses one, gains one, and leaves one that is taken away; nothing is trained twice."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from journeys.journey import environment, start, write_pairs
from tiny import save_chat_model

from prefopt_ray.results.ledger import SweepRecord, read_events, read_sweep
from prefopt_ray.trial import EndState

TRIALS = 12
SPEC = """
name: spread
model: {policy: ./model, dtype: float32}
data: {train: {source: pairs.jsonl}, max_tokens: 64}
training: {steps: 600, batch_pairs: 8}
eval: {at: [0, 100, 200, 300, 400, 500], train_probe: 8}
search:
  method: grid
  losses: {sigmoid: {beta: [0.05, 0.1, 0.2]}, ipo_sum: {beta: [0.05, 0.1, 0.2]}}
  shared: {learning_rate: [1e-4, 3e-4]}
  baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-4}
scheduler: {kind: none}
guards: {diverged: flag, overfit: flag}
samples: {at: never}
resources: {gpus_per_trial: 0}
"""


class Nodes:
    """See nodes.py."""

    def __init__(self) -> None:
        program = [sys.executable, str(Path(__file__).parent / "nodes.py")]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment(), start_new_session=True,
        )
        self.address = self._line()

    def ask(self, what: str, subject: object) -> str:
        self._process.stdin.write(f"{what} {subject}\n")
        self._process.stdin.flush()
        return self._line()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=120)

    def _line(self) -> str:
        line = self._process.stdout.readline().strip()
        assert line, "the cluster's process has ended"
        return line


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.close()


def test_a_sweep_outlives_its_machines(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chat_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", count=200)
    (tmp_path / "sweep.yaml").write_text(SPEC)
    lost, leaving = nodes.ask("add", 1), nodes.ask("add", 1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    process = start("run", "sweep.yaml", cwd=tmp_path)
    folder = wait_for(tmp_path, process, lambda sweep: placed_on(sweep) >= {lost, leaving} and reported(sweep, lost))
    nodes.ask("kill", lost)
    joined = nodes.ask("add", 1)
    wait_for(tmp_path, process, lambda sweep: reported(sweep, joined) and reported(sweep, leaving))
    assert nodes.ask("drain", leaving)
    assert process.wait(timeout=600) == 0, (tmp_path / "started.log").read_text()
    sweep = read_sweep(folder)
    assert sweep.finished and len(sweep.trials) == TRIALS
    assert {trial.end_state for trial in sweep.trials.values()} == {EndState.COMPLETED}
    assert len({trial.run_id for trial in sweep.trials.values()}) == TRIALS
    events = list(read_events(folder / "ledger.jsonl"))
    reports = [(event["trial"], event["report"]["step"]) for event in events if event["event"] == "report"]
    asked = sum(len(trial.config.evaluation.steps) for trial in sweep.trials.values())
    assert len(reports) == len(set(reports)) == asked
    # Whoever trained where a machine went has gone on elsewhere from its checkpoint, not from the beginning.
    where = {trial: [e["placement"]["node"] for e in events if _placed(e, trial)] for trial in sweep.trials}
    assert [nodes_of for nodes_of in where.values() if lost in nodes_of[:-1]]
    assert [nodes_of for nodes_of in where.values() if leaving in nodes_of[:-1]]
    assert not any(sweep.trials[trial].reason.startswith("its process") for trial in where)


def _placed(event: dict, trial: str) -> bool:
    return event["event"] == "placed" and event["trial"] == trial


def placed_on(sweep: SweepRecord) -> set[str]:
    return {trial.placement.get("node", "") for trial in sweep.trials.values()}


def reported(sweep: SweepRecord, node: str) -> bool:
    """A trial that runs there is past its first training steps."""
    there = (t for t in sweep.trials.values() if t.placement.get("node") == node and t.end_state is None)
    return any(trial.last is not None and trial.last.step >= 100 for trial in there)


def wait_for(home: Path, process: subprocess.Popen[str], ready: Callable[[SweepRecord], bool]) -> Path:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for ledger in (home / "prefopt-results").glob("*/ledger.jsonl"):
            if ready(read_sweep(ledger.parent)):
                return ledger.parent
        assert process.poll() is None, (home / "started.log").read_text()
        time.sleep(0.1)
    raise AssertionError((home / "started.log").read_text())

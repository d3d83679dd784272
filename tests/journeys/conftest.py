"""One model, one file of pairs and one finished sweep, shared by the journeys."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from journeys.journey import Outcome, prefopt, spec_text, write_pairs
from tiny import save_chat_model

from prefopt_ray.results.ledger import SweepRecord, read_sweep


@dataclass(frozen=True)
class FinishedSweep:
    home: Path  # the folder it was run in
    spec: Path
    outcome: Outcome
    record: SweepRecord


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny-chat")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="session")
def finished(chat_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedSweep:
    home = tmp_path_factory.mktemp("journey")
    spec = home / "sweep.yaml"
    spec.write_text(spec_text(chat_model, pairs_file))
    outcome = prefopt("run", "sweep.yaml", "--json", cwd=home)
    assert outcome.code == 0, outcome.err
    (ledger,) = (home / "prefopt-results").glob("*/ledger.jsonl")
    return FinishedSweep(home, spec, outcome, read_sweep(ledger.parent))

"""What a sweep will take, told by the command, and which engine ran it, told by the sweep."""

import json
from pathlib import Path

from journeys.conftest import FinishedSweep
from journeys.journey import prefopt, spec_text, write_pairs
from tiny import save_chat_model


def test_plan_probes_a_trial_in_a_worker_of_its_own(tmp_path: Path) -> None:
    model, pairs = save_chat_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "spec.yaml").write_text(spec_text(model, pairs))
    outcome = prefopt("plan", "spec.yaml", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["trials"] == 6 and plan["steps"] == 60 and plan["evaluated_at"] == [0, 1, 15, 30, 45, 60]
    assert plan["plan"]["engine"] == "flat" and plan["at_once"] >= 1
    assert plan["seconds"]["trial"] > 60 * plan["seconds"]["step"] > 0
    assert 200 * 2**20 < plan["memory_bytes"]["trial"] < 4 * 2**30
    assert not list((tmp_path / "prefopt-results").glob("*/ledger.jsonl"))  # it is no sweep


def test_a_sweep_says_which_engine_runs_it_and_why(finished: FinishedSweep) -> None:
    assert finished.record.facts["engine"].startswith("flat (llama is served")
    assert "engine: flat (llama is served" in " ".join(finished.outcome.err.split())
    shown = prefopt("show", "journey", cwd=finished.home)
    said = "Engine: flat (llama is served: no padding, each prompt computed once per pair)."
    assert said in " ".join(shown.out.split())

"""A budget is a hard stop, and the sweep still ends with its answer."""

import json
from pathlib import Path

from journeys.journey import prefopt, spec_text

from prefopt_ray.results.ledger import read_sweep, stop_requested
from prefopt_ray.trial import EndState

WALL_S = 45  # starting Ray and two workers takes most of it


def test_a_sweep_whose_time_is_up_ends_with_an_answer(chat_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    text = spec_text(
        chat_model, pairs_file, name="short", training="{steps: 200000, batch_pairs: 8}", samples="{at: never}",
        search="{method: grid, losses: {sigmoid: {beta: [0.1, 0.3]}, hinge: {beta: 0.1}},"
               " shared: {learning_rate: [1e-3]}, baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}",
        scheduler="{kind: none}", eval="{at: [0, 5, 10, 20, 40, 80], train_probe: 32}",
        resources="{gpus_per_trial: 0, max_concurrent: 2}", guards="{diverged: flag, overfit: flag}",
    )
    (tmp_path / "sweep.yaml").write_text(f"{text}\nbudget: {{wall_clock: {WALL_S}s}}\n")
    outcome = prefopt("run", "sweep.yaml", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    (ledger,) = (tmp_path / "prefopt-results").glob("short-*/ledger.jsonl")
    sweep = read_sweep(ledger.parent)
    assert sweep.finished and not stop_requested(sweep.folder)
    assert {trial.end_state for trial in sweep.trials.values()} == {EndState.STOPPED_EARLY}
    assert all("hours on the wall are spent" in trial.reason for trial in sweep.trials.values())
    answer = json.loads(outcome.out)
    assert answer["finished"] and answer["best"] is not None and sweep.tested

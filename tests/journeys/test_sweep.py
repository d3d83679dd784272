"""From one YAML file to the best configuration, as a person goes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from journeys.conftest import FinishedSweep
from journeys.journey import prefopt, spec_text
from safetensors.numpy import load_file

from prefopt_ray.trial import EndState


def test_every_configuration_is_a_completed_row(finished: FinishedSweep) -> None:
    answer = json.loads(finished.outcome.out)  # one JSON document and nothing else
    assert len(answer["trials"]) == 6
    assert {row["end_state"] for row in answer["trials"]} == {"completed"}
    assert [row["rank"] for row in answer["trials"]] == [1, 2, 3, 4, 5, 6]
    assert answer["finished"] and answer["best"]["training_seeds"] == 1


def test_the_baseline_is_the_first_trial(finished: FinishedSweep) -> None:
    first = finished.record.trials["0000"]
    assert first.baseline and first.config.label == "sigmoid beta=0.1 lr=0.001"


def test_two_warm_processes_ran_all_trials(finished: FinishedSweep) -> None:
    assert len({trial.placement["pid"] for trial in finished.record.trials.values()}) <= 2


def test_mlflow_holds_one_parent_and_one_run_per_trial(finished: FinishedSweep) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.home / 'prefopt-results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prefopt/journey")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [r for r in runs if r.data.tags["kind"] == "sweep"]
    children = {r.data.tags["trial_id"]: r for r in runs if r.data.tags["kind"] == "trial"}
    assert len(parents) == 1 and set(children) == set(finished.record.trials)
    for trial_id, trial in finished.record.trials.items():
        run = children[trial_id]
        assert run.info.run_id == trial.run_id
        assert run.info.status == "FINISHED" and run.data.tags["end_state"] == "completed"
        assert run.data.metrics["score"] == pytest.approx(trial.score, abs=5e-5)
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(1, 61))
    ranks = sorted((run.data.metrics["rank"], trial_id) for trial_id, run in children.items())
    answer = json.loads(finished.outcome.out)
    assert [trial_id for _, trial_id in ranks] == [row["trial"] for row in answer["trials"]]
    best = answer["best"]
    shown = {name: children[best["trial"]].data.metrics[f"test_{name}"] for name in ("gain", "gain_low", "gain_high")}
    assert shown["gain"] == pytest.approx(best["test_gain"]["gain"], abs=5e-5)
    assert shown["gain_low"] < shown["gain"] < shown["gain_high"]
    assert {trial_id for trial_id, run in children.items() if "test_gain" in run.data.metrics} == set(
        finished.record.tested
    )


def test_best_agrees_with_a_hand_computation_from_the_per_pair_files(finished: FinishedSweep) -> None:
    best = json.loads(prefopt("best", "journey", "--json", cwd=finished.home).out)["best"]
    trial, baseline = finished.record.trials[best["trial"]], finished.record.baseline
    select = {t.trial_id: gain_by_search(margins(finished, t.trial_id, "select", t.best_step, t.config.loss))
              for t in finished.record.trials.values()}
    assert max(select, key=lambda name: select[name]) == best["trial"]
    assert select[best["trial"]] == pytest.approx(trial.score, abs=1e-6)
    on_test = margins(finished, trial.trial_id, "test", trial.best_step, trial.config.loss)
    assert best["test_gain"]["gain"] == pytest.approx(gain_by_search(on_test), abs=1e-6)
    if trial is not baseline:
        other = margins(finished, "0000", "test", baseline.best_step, baseline.config.loss)
        difference = gain_by_search(on_test) - gain_by_search(other)
        assert best["minus_baseline"]["mean"] == pytest.approx(difference, abs=1e-6)


def margins(finished: FinishedSweep, trial_id: str, part: str, step: int, loss: str) -> np.ndarray:
    file = "test" if part == "test" else "evaluations"
    arrays = load_file(finished.record.folder / "trials" / trial_id / f"{file}.safetensors")
    assert loss in ("sigmoid", "ipo_sum")  # both have the summed log-ratio as reward
    ratios = arrays[f"{part}/policy/{step:08d}"].astype(np.float64) - arrays[f"{part}/reference"].astype(np.float64)
    return ratios[:, 0] - ratios[:, 1]


def gain_by_search(h: np.ndarray) -> float:
    """1 - min over a of mean log2(1 + exp(-a h)), by a fine grid: slow and plain."""
    scales = np.concatenate([[0.0], np.geomspace(1e-3, 20 / np.median(np.abs(h[h != 0])), 20_000)])
    means = [np.logaddexp(0, -a * h).mean() for a in scales]
    return 1.0 - min(means) / np.log(2)


def test_best_is_a_spec_that_train_accepts_and_repeats_to_the_bit(finished: FinishedSweep) -> None:
    printed = prefopt("best", "journey", cwd=finished.home)
    (finished.home / "best.yaml").write_text(printed.out)
    checked = json.loads(prefopt("validate", "best.yaml", "--json", cwd=finished.home).out)
    assert checked["trials"] == 1
    trained = prefopt("train", "best.yaml", "--json", "--output", "again", cwd=finished.home)
    assert trained.code == 0, trained.err
    report = json.loads(trained.out)
    answer = json.loads(finished.outcome.out)
    trial = finished.record.trials[answer["best"]["trial"]]
    assert report["step"] == trial.best_step
    assert report["metrics"] == dict(trial.reports[trial.best_step].metrics)


def test_the_winners_adapter_in_mlflow_loads_with_peft(finished: FinishedSweep, chat_model: Path) -> None:
    from mlflow import MlflowClient
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trial_id = json.loads(finished.outcome.out)["best"]["trial"]
    client = MlflowClient(f"sqlite:///{finished.home / 'prefopt-results' / 'mlflow.db'}")
    folder = client.download_artifacts(finished.record.trials[trial_id].run_id, "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), folder)
    moved = sum(float(p.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n)
    assert moved > 0


def test_a_finished_sweep_resumed_runs_nothing_again(finished: FinishedSweep) -> None:
    ends = end_times(finished)
    before = (finished.record.folder / "ledger.jsonl").read_text().count('"event": "report"')
    again = prefopt("resume", "journey", "--json", cwd=finished.home)
    assert again.code == 0, again.err
    assert (finished.record.folder / "ledger.jsonl").read_text().count('"event": "report"') == before
    assert json.loads(again.out)["best"] == json.loads(finished.outcome.out)["best"]
    assert end_times(finished) == ends


def end_times(finished: FinishedSweep) -> dict[str, int]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.home / 'prefopt-results' / 'mlflow.db'}")
    return {t.trial_id: client.get_run(t.run_id).info.end_time for t in finished.record.trials.values()}


def test_list_and_show_read_the_ledger(finished: FinishedSweep) -> None:
    assert "6 completed" in prefopt("list", cwd=finished.home).out
    shown = prefopt("show", "journey", cwd=finished.home)
    assert shown.code == 0
    table = shown.out.splitlines()[:8]
    assert all(len(line) <= 80 for line in table)


def test_a_spec_changed_after_the_start_is_not_resumed(finished: FinishedSweep, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("ledger.jsonl", "spec.yaml"):
        (copy / name).write_bytes((finished.record.folder / name).read_bytes())
    (copy / "spec.yaml").write_text((copy / "spec.yaml").read_text().replace("beta: [0.1, 0.5]", "beta: [0.1, 0.6]"))
    refused = prefopt("resume", str(copy), cwd=finished.home)
    assert refused.code == 2 and "spec was changed" in refused.err and "Traceback" not in refused.err


def test_trials_that_cannot_start_are_rows_with_their_reason(chat_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    text = spec_text(
        chat_model, pairs_file,
        model=f"{{policy: {chat_model}, dtype: float32, adapter: {{kind: lora, target: [no_such_layer]}}}}",
        search="{method: grid, losses: {sigmoid: {beta: 0.1}}, shared: {learning_rate: 1e-3},"
               " baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}",
    )
    (tmp_path / "sweep.yaml").write_text(text)
    outcome = prefopt("run", "sweep.yaml", "--json", cwd=tmp_path)
    assert outcome.code == 1, outcome.err
    (row,) = json.loads(outcome.out)["trials"]
    assert row["end_state"] == EndState.FAILED and "no_such_layer" in row["reason"]


def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(
    chat_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "sweep.yaml").write_text(spec_text(chat_model, pairs_file, resources="{gpus_per_trial: 1}"))
    outcome = prefopt("run", "sweep.yaml", cwd=tmp_path)
    assert outcome.code == 2 and "resources.gpus_per_trial" in outcome.err and "Traceback" not in outcome.err


def test_real_sharegpt_pairs_give_an_answer(chat_model: Path, tmp_path: Path) -> None:
    folder = os.environ.get("PREFOPT_TEST_DATA")
    if not folder:
        pytest.skip("PREFOPT_TEST_DATA names no folder with sharegpt_en.json and sharegpt_zh.json")
    text = spec_text(
        chat_model, Path(folder) / "sharegpt_zh.json",
        data=f"{{train: {{source: {Path(folder) / 'sharegpt_zh.json'}}}, max_tokens: 128}}",
        training="{steps: 12, batch_pairs: 8}", scheduler="{kind: asha, preset: standard}",
        search="{method: tpe, trials_per_loss: 2, losses: {simpo: {}, ipo: {}}}", samples="{at: never}",
    )
    (tmp_path / "sweep.yaml").write_text(text)
    outcome = prefopt("run", "sweep.yaml", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert {row["loss"] for row in answer["trials"]} == {"sigmoid", "simpo", "ipo_mean"}  # full names, baseline too
    assert len(answer["trials"]) == 5

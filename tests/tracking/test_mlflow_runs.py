"""What MLflow holds after a sweep, read back through its own client and its own database."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name
from tracking.tracking_cases import report, runs, steps, trial_config

from prefopt_ray.tracking.delivery import TrackingSettings, artifact_location
from prefopt_ray.tracking.journal import Journal
from prefopt_ray.tracking.operations import DatasetInfo, LogBatch, OpenRun
from prefopt_ray.tracking.runs import (
    SweepIdentity,
    SweepSummary,
    SweepTracker,
    flat_params,
    leaderboard_json,
    metric_key,
    tracking_uri,
)
from prefopt_ray.tracking.views import VIEW_TAG, best_view_url, view_is_of
from prefopt_ray.trial import EndState, Verdict

OpenTracker = Callable[..., SweepTracker]
DATASETS = [
    DatasetInfo("uf", "org/uf", "d" * 64, "train", split="train_prefs", revision="abc"),
    DatasetInfo("uf-test", "org/uf", "e" * 64, "test"),
]


def finish_trial(tracker: SweepTracker, trial_id: str, end_state: EndState = EndState.COMPLETED) -> None:
    tracker.trial_ended(trial_id, report(30), end_state, reason="the budget is spent", headline={"score": 0.123456})


def points_in(database: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(database) as connection:
        return sorted(connection.execute("select run_uuid, key, step, timestamp, value from metrics"))


def test_a_sweep_is_one_parent_run_with_one_child_per_trial(open_tracker: OpenTracker, uri: str) -> None:
    created: dict[str, str] = {}
    tracker = open_tracker(created)
    tracker.start("name: demo\n", {"search": {"method": "grid"}}, DATASETS)
    for number in range(2):
        tracker.trial_started(f"t{number}", trial_config(), number=number, tags={"baseline": "yes"})
        tracker.report(f"t{number}", report(10))
        finish_trial(tracker, f"t{number}")
    assert tracker.close(60) == 0

    found = runs(uri)
    assert {key: run.info.run_id for key, run in found.items()} == created
    parent, child = found["sweep"], found["t1"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.run_name == "ipo_sum β=0.1 lr=5e-06 #1"
    assert parent.data.params == {"search.method": "grid"}
    assert {"loss": "ipo_sum", "beta": "0.1", "adapter.rank": "16", "number": "1"}.items() <= child.data.params.items()
    expected_tags = {
        "kind": "trial",
        "sweep_id": "s1",
        "trial_id": "t1",
        "end_state": "completed",
        "verdict": "healthy",
        "verdict_at_best": "healthy",
        "stop_reason": "the budget is spent",
        "baseline": "yes",
        "mlflow.source.name": "prefopt run demo",
    }
    assert expected_tags.items() <= child.data.tags.items()
    note = child.data.tags["mlflow.note.content"].split("\n")
    assert note[0] == "healthy; completed at step 30; best gain 0.1 at step 30"
    expected_metrics = {
        "beta": 0.1,
        "learning_rate": 5e-6,
        "lr_log10": -5.301,
        "beta_log10": -1.0,
        "score": 0.1235,
        "objective/best_step": 30,
        "eval/rewards/accuracy": 0.6,
        "nonfinite_metrics": 0,
    }
    assert expected_metrics.items() <= child.data.metrics.items()
    # report(10) brings the training steps 1 to 10, report(30) those of 21 to 30
    assert steps(uri, child, "train/loss") == [*range(1, 11), *range(21, 31)]
    assert steps(uri, child, "eval/gain") == [10, 30]
    for run in (parent, child):
        inputs = {i.dataset.name: i for i in run.inputs.dataset_inputs}
        assert {name: i.tags[0].value for name, i in inputs.items()} == {"uf": "train", "uf-test": "test"}
        assert json.loads(inputs["uf"].dataset.source)["path"] == "org/uf"


@pytest.mark.parametrize("end_state", EndState)
def test_only_crashes_are_shown_as_failed(open_tracker: OpenTracker, uri: str, end_state: EndState) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.trial_ended("t0", None, end_state, reason="", headline={})
    assert tracker.close(60) == 0
    crashed, interrupted = {"failed", "out_of_memory"}, {"stopped_by_user"}
    expected = "FAILED" if end_state in crashed else "KILLED" if end_state in interrupted else "FINISHED"
    run = runs(uri)["t0"]
    assert (run.info.status, run.data.tags["end_state"]) == (expected, end_state.value)


def test_a_resumed_driver_and_a_resumed_trial_repeat_nothing(open_tracker: OpenTracker, uri: str) -> None:
    ledger: dict[str, str] = {}
    tracker = open_tracker(ledger)
    tracker.start("", {"a": 1}, DATASETS)
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.report("t0", report(10))
    tracker.report("t0", report(20))
    assert tracker.close(60) == 0
    before = dict(ledger)

    tracker = open_tracker(ledger)
    tracker.start("", {"a": 1}, DATASETS)
    tracker.trial_started("t0", trial_config(), number=0, run_id=ledger["t0"])
    tracker.report("t0", report(15, since=5))  # from the checkpoint at step 5, evaluated elsewhere
    tracker.report("t0", report(30, since=15))
    finish_trial(tracker, "t0")
    finish_trial(tracker, "t0")
    assert tracker.close(60) == 0

    assert ledger == before
    run = runs(uri)["t0"]
    assert steps(uri, run, "train/loss") == list(range(1, 31))
    assert steps(uri, run, "eval/gain") == [10, 20, 30]
    for once in ("lr_log10", "score", "nonfinite_metrics"):
        assert steps(uri, run, once) == [0], once


@pytest.mark.parametrize("run_id", [None, "0123456789abcdef0123456789abcdef"])
def test_a_run_is_found_by_its_tags_when_the_ledger_does_not_know_it(
    open_tracker: OpenTracker, uri: str, run_id: str | None
) -> None:
    for _ in range(2):
        tracker = open_tracker()
        tracker.start("", {}, [])
        tracker.trial_started("t0", trial_config(), number=0, run_id=run_id)
        assert tracker.close(60) == 0
    assert set(runs(uri)) == {"sweep", "t0"}


def test_delivering_the_whole_journal_again_changes_nothing(
    open_tracker: OpenTracker, uri: str, tmp_path: Path
) -> None:
    tracker = open_tracker()
    tracker.start("a: 1\n", {"a": 1}, DATASETS)
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.report("t0", report(10))
    finish_trial(tracker, "t0")
    tracker.finish(SweepSummary("t0", "t0 is best", [{"rank": 1, "trial": "t0"}]))
    assert tracker.close(60) == 0
    before = {key: run.to_dictionary() for key, run in runs(uri).items()}
    points = points_in(tmp_path / "mlflow.db")

    (tmp_path / "demo-s1" / "journal" / "delivered.json").unlink()
    assert open_tracker().close(60) == 0
    assert {key: run.to_dictionary() for key, run in runs(uri).items()} == before
    assert points_in(tmp_path / "mlflow.db") == points


def test_nan_and_infinity_are_counted_and_never_stored(open_tracker: OpenTracker, uri: str, tmp_path: Path) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.report("t0", report(10, **{"eval/ece": float("nan"), "samples/kl": float("inf")}))
    tracker.report("t0", report(20, **{"eval/ece": float("nan"), "samples/kl": 1.0}))
    headline = {"score": -1.0, "final_kl": float("inf")}
    tracker.trial_ended("t0", report(20), EndState.DIVERGED, reason="the loss is not finite", headline=headline)
    assert tracker.close(60) == 0
    run = runs(uri)["t0"]
    assert run.data.metrics["nonfinite_metrics"] == 4
    assert "eval/ece" not in run.data.metrics and "final_kl" not in run.data.metrics
    assert steps(uri, run, "samples/kl") == [20]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        bad = database.execute("select key from metrics where is_nan or abs(value) > 1e300").fetchall()
    assert bad == []


def test_one_bad_key_costs_only_itself(open_tracker: OpenTracker, uri: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "demo-s1" / "journal")
    journal.append(OpenRun("sweep", "demo"))
    points = ((1, {"acc@1": 0.5, "good": 0.1}), (2, {"acc@1": 0.6, "good": 0.2}))
    journal.append(LogBatch("sweep", points=points, params={"fine": "1", "b=d": "2"}, tags={"also": "fine"}))
    journal.append(LogBatch("sweep", points=((3, {"good": 0.3}),)))
    journal.close()
    assert open_tracker().close(60) == 0
    run = runs(uri)["sweep"]
    assert steps(uri, run, "good") == [1, 2, 3]
    assert run.data.params == {"fine": "1"} and run.data.tags["also"] == "fine"
    [letter] = journal.refused_path.read_text().splitlines()
    refused = json.loads(letter)
    assert refused["points"] == [[1, {"acc@1": 0.5}], [2, {"acc@1": 0.6}]]
    assert refused["params"] == {"b=d": "2"} and "tags" not in refused
    assert "acc@1" in refused["why"]


def test_a_run_deleted_by_hand_does_not_stop_the_others(open_tracker: OpenTracker, uri: str) -> None:
    ledger: dict[str, str] = {}
    tracker = open_tracker(ledger)
    tracker.start("", {}, [])
    for number in range(2):
        tracker.trial_started(f"t{number}", trial_config(), number=number)
    assert tracker.close(60) == 0
    MlflowClient(uri).delete_run(ledger["t0"])

    tracker = open_tracker(ledger)
    for trial_id in ("t0", "t1"):
        tracker.report(trial_id, report(10))
    assert tracker.close(60) == 0
    assert steps(uri, runs(uri)["t1"], "eval/gain") == [10]


def test_a_paused_trial_is_killed_and_runs_again_when_resumed(open_tracker: OpenTracker, uri: str) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.trial_paused("t0")
    tracker.paused()
    assert tracker.close(60) == 0
    found = runs(uri)
    assert (found["t0"].info.status, found["t0"].data.tags["end_state"]) == ("KILLED", "stopped_by_user")
    assert found["sweep"].info.status == "KILLED"

    tracker = open_tracker()
    tracker.start("", {}, [])
    tracker.trial_resumed("t0")
    assert tracker.close(60) == 0
    found = runs(uri)
    assert (found["t0"].info.status, found["t0"].data.tags["end_state"]) == ("RUNNING", "running")
    assert found["sweep"].info.status == "RUNNING"


def test_ranks_are_sent_when_they_change_and_sort_the_trials(open_tracker: OpenTracker, uri: str) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    for number in range(3):
        tracker.trial_started(f"t{number}", trial_config(), number=number)
    tracker.rank([["t0"], ["t1"], ["t2"]])
    tracker.rank([["t0"], ["t2"], ["t1"]])
    tracker.rank([["t0"], ["t2"], ["t1"]])
    assert tracker.close(60) == 0
    found = runs(uri)
    assert {key: run.data.metrics.get("rank") for key, run in found.items()} == {
        "sweep": None,
        "t0": 1,
        "t1": 3,
        "t2": 2,
    }
    assert len(steps(uri, found["t0"], "rank")) == 1 and len(steps(uri, found["t1"], "rank")) == 2


def test_the_answer_is_on_the_parent_run_once_however_often_it_is_given(open_tracker: OpenTracker, uri: str) -> None:
    tracker = open_tracker()
    tracker.start("name: demo\n", {}, [])
    for number, end_state in enumerate([EndState.COMPLETED, EndState.DIVERGED, EndState.DIVERGED]):
        tracker.trial_started(f"t{number}", trial_config(), number=number)
        finish_trial(tracker, f"t{number}", end_state)
    rows = [{"rank": 1, "trial": "t0", "gain": 0.06}, {"rank": 2, "trial": "t1", "gain": float("nan")}]
    for _ in range(2):
        tracker.finish(SweepSummary("t0", "ipo_sum beta 0.1, stopped at step 30\n\nmore", rows))
    assert tracker.close(60) == 0

    client, found = MlflowClient(uri), runs(uri)
    parent = found["sweep"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_run_id"] == found["t0"].info.run_id
    assert parent.data.tags["mlflow.note.content"].startswith("ipo_sum beta 0.1, stopped at step 30\n")
    counts = {name: value for name, value in parent.data.metrics.items() if name.startswith("sweep/n_")}
    assert counts == {f"sweep/n_{state}": {"completed": 1, "diverged": 2}.get(state, 0) for state in EndState}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"spec.yaml", "leaderboard.json"}
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "leaderboard.json")).read_text())
    assert table == {"columns": ["rank", "trial", "gain"], "data": [[1, "t0", 0.06], [2, "t1", None]]}
    assert json.loads(parent.data.tags["mlflow.loggedArtifacts"]) == [{"path": "leaderboard.json", "type": "table"}]


def test_an_adapter_is_uploaded_byte_for_byte_and_a_lost_one_is_a_dead_letter(
    open_tracker: OpenTracker, uri: str, tmp_path: Path
) -> None:
    adapter = tmp_path / "export"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    tracker = open_tracker()
    tracker.start("", {}, [])
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.adapter("t0", adapter)
    tracker.adapter("t0", tmp_path / "gone")
    tracker.report("t0", report(10))
    assert tracker.close(60) == 0
    run = runs(uri)["t0"]
    stored = MlflowClient(uri).download_artifacts(run.info.run_id, "adapter/adapter_model.safetensors")
    assert Path(stored).read_bytes() == bytes(range(256))
    assert "gone" in (tmp_path / "demo-s1" / "journal" / "refused.jsonl").read_text()
    assert steps(uri, run, "eval/gain") == [10]


def test_the_newest_sweep_of_an_experiment_has_the_saved_view(open_tracker: OpenTracker, uri: str) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    assert tracker.close(60) == 0
    tags = MlflowClient(uri).get_experiment_by_name("exp").tags
    assert view_is_of(tags, "s1") and not view_is_of(tags, "s2") and not view_is_of({}, "s1")
    state = json.loads(json.loads(tags[VIEW_TAG])["state"])
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`rank`", True)


def test_an_old_mlruns_folder_in_the_current_directory_is_left_alone(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, storage = tmp_path / "here", tmp_path / "a storage #1 with é"
    (here / "mlruns" / "0").mkdir(parents=True)
    (here / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    storage.mkdir()
    (storage / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.chdir(here)
    uri = tracking_uri("sqlite", storage)
    tracker = SweepTracker(
        TrackingSettings(uri, "a/b"), SweepIdentity("s1", "demo", storage / "s"), on_run_created=lambda key, run: None
    )
    tracker.start("name: demo\n", {}, [])
    assert tracker.close(60) == 0
    parent = runs(uri, "a/b")["sweep"]
    assert (storage / "artifacts" / "a_b" / parent.info.run_id / "artifacts" / "spec.yaml").exists()
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*")) == [
        "mlruns",
        "mlruns/0",
        "mlruns/0/meta.yaml",
    ]


def test_a_deleted_experiment_keeps_everything_in_the_journal_until_it_is_restored(
    open_tracker: OpenTracker, uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("exp", artifact_location=(tmp_path / "artifacts").as_uri())
    client.delete_experiment(experiment_id)
    tracker = open_tracker()
    tracker.start("", {}, [])
    assert tracker.close(1.0) > 0
    client.restore_experiment(experiment_id)
    assert open_tracker().close(60) == 0
    assert set(runs(uri)) == {"sweep"}


def test_a_driver_killed_in_the_middle_loses_and_repeats_no_point(
    open_tracker: OpenTracker, uri: str, tmp_path: Path
) -> None:
    folder = tmp_path / "demo-s1"
    command = [sys.executable, str(Path(__file__).with_name("kill_me.py")), uri, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        delivered, reported = folder / "journal" / "delivered.json", 0
        deadline = time.monotonic() + 60
        # Killed with several batches delivered and several not: in the middle of the shipping, too.
        while not (delivered.exists() and json.loads(delivered.read_text())["bytes"] > 6_000 and reported >= 50):
            assert time.monotonic() < deadline and driver.poll() is None
            reported = int(driver.stdout.readline())
        os.kill(driver.pid, signal.SIGKILL)
        last = max([reported, *(int(line) for line in driver.stdout.read().split())])
    undelivered = Journal(folder / "journal").undelivered
    assert undelivered > 0

    tracker = open_tracker()
    tracker.start("a: 1\n", {}, [])
    for number in range(3):
        tracker.trial_started(f"t{number}", trial_config(), number=number)
        tracker.report(f"t{number}", report(last, since=last - 15))  # from a checkpoint before the kill
        tracker.report(f"t{number}", report(last + 10))
        tracker.report(f"t{number}", report(last + 20))
        finish_trial(tracker, f"t{number}")
    assert tracker.close(120) == 0
    found = runs(uri)
    assert set(found) == {"sweep", "t0", "t1", "t2"}
    for trial_id in ("t0", "t1", "t2"):
        assert steps(uri, found[trial_id], "train/loss") == list(range(1, last + 21))
        assert steps(uri, found[trial_id], "eval/gain") == list(range(10, last + 21, 10))
        assert steps(uri, found[trial_id], "lr_log10") == [0]


@given(st.text(max_size=300))
def test_every_metric_name_becomes_one_that_mlflow_takes(name: str) -> None:
    _validate_metric_name(metric_key(name))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("eval/rewards/accuracy", "eval/rewards/accuracy"),
        ("acc@1", "acc_at_1"),
        ("/a//b/../c", "a/b/./c"),
        ("h[0]=β", "h_0___"),
    ],
)
def test_metric_names_stay_readable(name: str, key: str) -> None:
    assert metric_key(name) == key


def test_params_are_flat_text_with_loss_parameters_on_top() -> None:
    params = {"loss_params": {"beta": 0.1}, "training": {"optimizer": {"betas": (0.9, 0.999)}}, "none": None}
    assert flat_params(params) == {"beta": "0.1", "training.optimizer.betas": "0.9,0.999"}


def test_params_may_be_keyed_by_number_as_given_stop_steps_are() -> None:
    params = {"scheduler": {"kind": "fixed", "stop_steps": {1: 7, 2: 20}}}
    flat = {"scheduler.kind": "fixed", "scheduler.stop_steps.1": "7", "scheduler.stop_steps.2": "20"}
    assert flat_params(params) == flat


def test_an_empty_leaderboard_is_still_a_table() -> None:
    assert json.loads(leaderboard_json([])) == {"columns": [], "data": []}


def test_the_sqlite_uri_is_absolute_and_other_uris_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite", Path("results")) == f"sqlite:///{tmp_path}/results/mlflow.db"
    assert tracking_uri("sqlite:///my.db", Path("results")) == f"sqlite:///{tmp_path}/my.db"
    for uri in ("https://mlflow.example.org", "postgresql://u:p@h/db", "sqlite:////abs/my.db"):
        assert tracking_uri(uri, Path("results")) == uri


@pytest.mark.parametrize(
    ("settings", "location"),
    [
        (TrackingSettings("sqlite:////s/a%20b/mlflow.db", "p/q"), "file:///s/a%20b/artifacts/p_q"),
        (TrackingSettings("sqlite:////s/mlflow.db", "p", "/art"), "file:///art/p"),
        (TrackingSettings("sqlite:////s/mlflow.db", "../..", "/art"), "file:///art/_"),
        (TrackingSettings("https://h", "p", "s3://bucket/x/"), "s3://bucket/x/p"),
        (TrackingSettings("https://h", "p"), None),
    ],
)
def test_artifacts_never_depend_on_the_current_directory(settings: TrackingSettings, location: str | None) -> None:
    assert artifact_location(settings) == location


def test_only_a_gain_is_called_one_also_by_a_driver_that_did_not_start_the_trial(
    open_tracker: OpenTracker, uri: str
) -> None:
    config = trial_config()
    judged = replace(config, evaluation=replace(config.evaluation, objective="judge/win_lcb"))
    first = open_tracker()
    first.start("", {}, [])
    first.trial_started("t0", judged, number=0)
    assert first.close(60) == 0
    tracker = open_tracker()
    finish_trial(tracker, "t0")
    assert tracker.close(60) == 0
    note = runs(uri)["t0"].data.tags["mlflow.note.content"].split("\n")
    assert note[0] == "healthy; completed at step 30; best objective 0.1 at step 30"


def test_the_first_line_of_a_description_is_the_verdict_in_plain_text(open_tracker: OpenTracker, uri: str) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    tracker.trial_started("t0", trial_config(), number=0)
    tracker.trial_started("t1", trial_config(), number=1)
    overfit = Verdict("overfit", ("overfit", "drift_limit"), onset_step=20, evidence="gain fell by 0.03 from step 20")
    healthy = Verdict("healthy", evidence="gain 0.1")
    last = replace(report(30), verdict=overfit, verdict_at_best=healthy, best_step=10)
    tracker.trial_ended("t0", last, EndState.STOPPED_OVERFIT, reason="the overfit guard", headline={})
    tracker.trial_ended("t1", None, EndState.FAILED, reason="the tokenizer is broken", headline={})
    assert tracker.close(60) == 0
    found = runs(uri)
    assert found["t0"].data.tags["mlflow.note.content"].split("\n\n") == [
        "overfit from step 20; stopped overfit at step 30; best gain 0.1 at step 10",
        "the overfit guard",
        "gain fell by 0.03 from step 20",
        "at step 10 healthy: gain 0.1",
    ]
    verdicts = {
        "verdict": "overfit", "flags": "overfit,drift_limit", "onset_step": "20",
        "evidence": "gain fell by 0.03 from step 20",
        "verdict_at_best": "healthy", "flags_at_best": "", "onset_step_at_best": "none", "evidence_at_best": "gain 0.1",
    }
    assert verdicts.items() <= found["t0"].data.tags.items()
    assert found["t1"].data.tags["mlflow.note.content"].split("\n\n") == [
        "failed before its first evaluation",
        "the tokenizer is broken",
    ]


def test_the_link_has_the_form_that_the_ui_does_not_rewrite() -> None:
    link = best_view_url("http://h:1/", "7", "s1")
    assert link.startswith("http://h:1/#/experiments/7/runs?searchFilter=tags.kind%20%3D%20%27trial%27%20and%20")
    assert "workflowType=machine_learning" in link and "orderByKey=metrics.%60rank%60&orderByAsc=true" in link

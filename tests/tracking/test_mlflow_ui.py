"""A real server: trackers that talk to it over HTTP, the one that `prefopt ui` starts, and what a browser shows."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest
from mlflow import MlflowClient
from tracking import browser
from tracking.mlflow_server import MlflowServer
from tracking.tracking_cases import report, runs, steps, trial_config

from prefopt_ray.errors import PrefoptError, ResourceError, SweepError
from prefopt_ray.tracking.runs import SweepTracker
from prefopt_ray.tracking.server import serve_ui
from prefopt_ray.tracking.views import best_view_url
from prefopt_ray.trial import EndState

OpenTracker = Callable[..., SweepTracker]


def test_a_server_that_goes_down_in_the_middle_gets_every_point_once(
    open_tracker: OpenTracker, mlflow_server: MlflowServer
) -> None:
    ledger: dict[str, str] = {}
    tracker = open_tracker(ledger, to=mlflow_server.url, experiment="down")
    tracker.start("a: 1\n", {"a": 1}, [])
    tracker.trial_started("t0", trial_config(), number=0)
    slowest_s = 0.0
    for step in range(10, 401, 10):
        if step == 100:
            mlflow_server.end()
        if step == 300:
            mlflow_server.start()
            tracker.trial_started("t1", trial_config(), number=1)
        started = time.perf_counter()
        tracker.report("t0", report(step))
        slowest_s = max(slowest_s, time.perf_counter() - started)
        time.sleep(0.01)
    tracker.trial_ended("t0", report(400), EndState.COMPLETED, reason="", headline={"score": 0.1})
    assert tracker.close(60) == 0
    assert slowest_s < 0.5, "the driver waited for the server"

    found = runs(mlflow_server.url, "down")
    assert {key: run.info.run_id for key, run in found.items()} == ledger
    assert steps(mlflow_server.url, found["t0"], "train/loss") == list(range(1, 401))
    assert steps(mlflow_server.url, found["t0"], "eval/gain") == list(range(10, 401, 10))
    assert found["t0"].info.status == "FINISHED"


def test_the_link_to_a_remote_server_starts_nothing(open_tracker: OpenTracker, mlflow_server: MlflowServer) -> None:
    tracker = open_tracker(to=mlflow_server.url, experiment="remote")
    tracker.start("", {}, [])
    assert tracker.close(60) == 0
    with serve_ui(mlflow_server.url, None, experiment="remote", sweep_id="s1") as link:
        assert link.startswith(f"{mlflow_server.url}/#/experiments/")
    with serve_ui(mlflow_server.url, None, experiment="remote", sweep_id="an older sweep") as link:
        assert "an%20older%20sweep" in link


def test_an_unknown_experiment_is_named(mlflow_server: MlflowServer) -> None:
    with pytest.raises(SweepError, match="'typo'"), serve_ui(mlflow_server.url, None, experiment="typo", sweep_id="s"):
        pass


def test_a_remote_server_that_is_down_is_said_to_be() -> None:
    with (
        pytest.raises(PrefoptError, match="127.0.0.1:9 does not answer"),
        serve_ui("http://127.0.0.1:9", None, experiment="e", sweep_id="s"),
    ):
        pass


def test_a_taken_port_is_refused_before_anything_is_started() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ResourceError, match=str(port)),
            serve_ui("sqlite:////nowhere.db", None, experiment="e", sweep_id="s", port=port),
        ):
            pass


def test_a_server_that_does_not_come_up_in_time_is_given_up(uri: str) -> None:
    with (
        pytest.raises(PrefoptError, match="did not answer within 0.1 s"),
        serve_ui(uri, None, experiment="e", sweep_id="s", start_timeout_s=0.1),
    ):
        pass


def test_the_local_server_answers_only_its_own_names_and_ends_with_the_block(
    open_tracker: OpenTracker, uri: str
) -> None:
    tracker = open_tracker()
    tracker.start("", {}, [])
    assert tracker.close(60) == 0
    with serve_ui(uri, None, experiment="exp", sweep_id="s1") as link:
        base_url = link.split("/#/")[0]
        assert base_url.startswith("http://127.0.0.1:")
        assert MlflowClient(base_url).get_experiment_by_name("exp") is not None
        question = f"{base_url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=exp"
        assert "experiment" in ask(question, host="localhost:5000")  # through an ssh tunnel
        for host in ("192.168.evil.example", "localhost.evil.example:5000", "evil.example"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                ask(question, host=host)
    with pytest.raises(urllib.error.URLError):
        ask(question, host="localhost:5000")


@pytest.mark.browser
@pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))
def test_both_links_show_this_sweeps_trials_in_rank_order(
    open_tracker: OpenTracker, mlflow_server: MlflowServer
) -> None:
    order = [3, 0, 4, 1, 2, 10, 9, 8, 7, 6, 5]  # eleven: sorted as text, 10 would come before 2
    tracker = open_tracker(to=mlflow_server.url, experiment="seen")
    tracker.start("", {}, [])
    for number in range(len(order)):
        tracker.trial_started(f"t{number}", trial_config(beta=0.01 * (number + 1)), number=number)
        tracker.trial_ended(f"t{number}", report(10), EndState.COMPLETED, reason="", headline={"score": 0.1})
    tracker.rank([[f"t{number}"] for number in order])
    assert tracker.close(60) == 0
    experiment = MlflowClient(mlflow_server.url).get_experiment_by_name("seen")
    with serve_ui(mlflow_server.url, None, experiment="seen", sweep_id="s1") as saved_view:
        links = [best_view_url(mlflow_server.url, experiment.experiment_id, "s1"), saved_view]
    for link in links:
        with browser.chromium() as tab:
            tab.open(link)
            names = tab.wait_for(RUN_NAMES, lambda rows: len(rows) == len(order))
            assert [int(re.search(r"#(\d+)$", name)[1]) for name in names] == order, link
            headers = tab.run(HEADERS)
    assert {"rank", "score", "verdict", "beta"} <= set(headers), "the saved view's columns"


RUN_NAMES = """
return [...document.querySelectorAll(".ag-pinned-left-cols-container .ag-row")]
    .sort((a, b) => a.getAttribute("row-index") - b.getAttribute("row-index"))
    .map(row => row.innerText.split("\\n").find(line => line.includes("β")) || "");
"""
HEADERS = 'return [...document.querySelectorAll(".ag-header-row")].flatMap(row => row.innerText.split("\\n"));'


def ask(url: str, *, host: str) -> dict[str, object]:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=5) as answer:
        return json.load(answer)
